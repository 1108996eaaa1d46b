"""Quantization-aware training for PyTorch, down to a verified TensorRT INT8 engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. Imported on first use: ``import qat`` is quick, and qat.tensorrt needs no torch.
_PUBLIC = {
    "Format": "numerics",
    "INT4": "numerics",
    "INT8": "numerics",
    "QATCallback": "callbacks",
    "QATError": "errors",
    "QuantConfig": "config",
    "Rule": "config",
    "calibrate": "calibration",
    "compile_options": "compiling",
    "correct_biases": "refinement",
    "equalize": "refinement",
    "export_onnx": "export",
    "fake_quantize": "numerics",
    "load_from_checkpoint": "loading",
    "oscillation_penalty": "oscillation",
    "parity": "export",
    "prepare": "preparation",
    "restore": "preparation",
    "round_weights": "refinement",
}
_MODULES = frozenset(_PUBLIC.values()) | {
    *("analysis", "batchnorm", "bench", "checkpoints", "distillation", "inputs", "interop"),
    *("nn", "quantizer", "ranges", "report", "tensorrt", "verify"),
}
__all__ = ["__version__", *_PUBLIC, "analysis", "bench", "interop", "nn", "report", "tensorrt", "verify"]  # noqa: PLE0604

if TYPE_CHECKING:
    from . import analysis, bench, interop, nn, report, tensorrt, verify
    from .calibration import calibrate
    from .callbacks import QATCallback
    from .compiling import compile_options
    from .config import QuantConfig, Rule
    from .errors import QATError
    from .export import export_onnx, parity
    from .loading import load_from_checkpoint
    from .numerics import INT4, INT8, Format, fake_quantize
    from .oscillation import oscillation_penalty
    from .preparation import prepare, restore
    from .refinement import correct_biases, equalize, round_weights


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
