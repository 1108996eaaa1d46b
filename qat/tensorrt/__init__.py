"""From ONNX to an INT8 engine on TensorRT 8.6, 10, 11 and TensorRT-RTX: build, run, save, load, inspect.

Needs the runtime, NumPy and, to run engines, polygraphy; PyTorch and ONNX are used where they are there, never required.
"""

from typing import Any

from ..support import aliases
from .build import build
from .calibrators import EntropyCalibrator, EntropyCalibrator2, LegacyCalibrator, MinMaxCalibrator
from .engine import Engine, ExecutionContext, TensorInfo, load
from .inspect import inspect
from .inspection import InspectedNode, Inspection
from .log import BuildLog, Record
from .profile import layer_times
from .runtime import Runtime, find_runtime

__all__ = [
    "build",
    "load",
    "inspect",
    "layer_times",
    "find_runtime",
    "BuildLog",
    "Engine",
    "EntropyCalibrator",
    "EntropyCalibrator2",
    "ExecutionContext",
    "InspectedNode",
    "Inspection",
    "LegacyCalibrator",
    "MinMaxCalibrator",
    "Record",
    "Runtime",
    "TensorInfo",
]


def __getattr__(name: str) -> Any:
    return aliases.find_name(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *aliases.names_of(__name__)})
