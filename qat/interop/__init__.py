"""Models and ranges that other tools made: pytorch-quantization, ModelOpt, TensorRT's calibrators. None of them is needed."""

from .cache import load_calibration_cache, read_calibration_cache, tensor_names
from .convert import from_pytorch_quantization, load_pytorch_quantization
from .result import Imported
from .write import to_pytorch_quantization

__all__ = [
    "Imported",
    "from_pytorch_quantization",
    "load_calibration_cache",
    "load_pytorch_quantization",
    "read_calibration_cache",
    "tensor_names",
    "to_pytorch_quantization",
]
