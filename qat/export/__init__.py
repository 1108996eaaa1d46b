"""From a quantized model to a checked Q/DQ ONNX file, and the proof that both compute the same."""

from .check import Finding, check_onnx
from .detection import BackboneAndHead
from .onnx import export_onnx
from .parity import parity
from .report import ParityReport

__all__ = ["BackboneAndHead", "Finding", "ParityReport", "check_onnx", "export_onnx", "parity"]
