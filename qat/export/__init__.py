"""From a quantized model to a checked Q/DQ ONNX file, and the proof that both compute the same."""

from importlib.util import find_spec

from .check import Finding, check_onnx

__all__ = ["BackboneAndHead", "Finding", "ParityReport", "Simplification", "check_onnx", "export_onnx", "parity", "simplify"]

# A machine that only builds engines checks graphs without having PyTorch.
if find_spec("torch") is not None:
    from .detection import BackboneAndHead
    from .onnx import export_onnx
    from .parity import parity
    from .report import ParityReport
from .simplify import Simplification, simplify
