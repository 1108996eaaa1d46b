"""Quantization-aware training for PyTorch, down to a verified TensorRT INT8 engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .support import aliases
from .support.version import __version__ as __version__

# Public names and where they live. Imported on first use: ``import qat`` is quick, and qat.tensorrt needs no torch.
_PUBLIC = {
    "Format": "core.formats",
    "INT4": "core.formats",
    "INT8": "core.formats",
    "QATCallback": "lightning.callback",
    "QATError": "errors",
    "QuantConfig": "core.config",
    "Rule": "core.config",
    "calibrate": "calibration",
    "compile_options": "training.compiling",
    "correct_biases": "posttraining",
    "equalize": "posttraining",
    "export_onnx": "export",
    "fake_quantize": "core.numerics",
    "load_from_checkpoint": "lightning.loading",
    "oscillation_penalty": "training.oscillation",
    "parity": "verify.onnx_parity",
    "prepare": "preparation",
    "restore": "preparation",
    "round_weights": "posttraining",
}
# Modules that documentation tells users to call by their short names.
_MODULES = (
    *("analysis", "batchnorm", "bench", "calibration", "checkpoints", "distillation", "export", "inputs", "interop"),
    *("nn", "preparation", "quantizer", "ranges", "report", "tensorrt", "verify"),
)
# Rooms, and modules under their names of before: found, but not listed.
_ROOMS = ("core", "errors", "graph", "lightning", "posttraining", "recipes", "support", "training")
__all__ = ["__version__", *_PUBLIC, *_MODULES]  # noqa: PLE0604

aliases.install()

if TYPE_CHECKING:
    from . import analysis, bench, calibration, export, interop, nn, preparation, report, tensorrt, verify
    from .calibration import calibrate
    from .core import quantizer
    from .core.config import QuantConfig, Rule
    from .core.formats import INT4, INT8, Format
    from .core.numerics import fake_quantize
    from .errors import QATError
    from .export import export_onnx
    from .lightning.callback import QATCallback
    from .lightning.loading import load_from_checkpoint
    from .posttraining import correct_biases, equalize, round_weights
    from .preparation import prepare, restore
    from .support import inputs
    from .training import batchnorm, checkpoints, distillation, ranges
    from .training.compiling import compile_options
    from .training.oscillation import oscillation_penalty
    from .verify.onnx_parity import parity


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES or name in _ROOMS or name in aliases.MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
