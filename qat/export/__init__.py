"""From a quantized model to a checked Q/DQ ONNX file. Nothing is imported before it is used: old names need no PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..support import aliases

_PUBLIC = {
    "BackboneAndHead": "detection",
    "export_float": "onnx",
    "export_onnx": "onnx",
}
__all__ = [*_PUBLIC, *aliases.names_of(__name__)]  # noqa: PLE0604

if TYPE_CHECKING:
    from .detection import BackboneAndHead
    from .onnx import export_float, export_onnx


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    return aliases.find_name(__name__, name)


def __dir__() -> list[str]:
    return sorted(__all__)
