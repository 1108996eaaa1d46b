"""From a quantized model to a checked Q/DQ ONNX file, and the proof that both compute the same."""

from .check import Finding, check_onnx
from .onnx import BackboneAndHead, export_onnx
from .parity import ParityReport, parity

__all__ = ["BackboneAndHead", "Finding", "ParityReport", "check_onnx", "export_onnx", "parity"]
