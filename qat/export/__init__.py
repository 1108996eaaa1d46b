"""From a quantized model to a checked Q/DQ ONNX file, and the proof that both compute the same.

Checking and simplifying files needs no PyTorch, so what does is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .check import Finding, check_onnx
from .report import ParityReport
from .simplify import Simplification, simplify

_NEED_TORCH = {
    "BackboneAndHead": "detection",
    "export_float": "onnx",
    "export_onnx": "onnx",
    "parity": "comparison",
}
__all__ = ["Finding", "ParityReport", "Simplification", "check_onnx", "simplify", *_NEED_TORCH]  # noqa: PLE0604

if TYPE_CHECKING:
    from .comparison import parity
    from .detection import BackboneAndHead
    from .onnx import export_float, export_onnx


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
