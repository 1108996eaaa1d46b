"""Latency of a PyTorch module, a CUDA graph of it, an ONNX Runtime session or an engine, and the load of the GPU meanwhile.

Importing this imports neither PyTorch nor TensorRT; measuring an engine needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public names and where they live. cuda_graph needs PyTorch and is imported on first use.
_PUBLIC = {
    "CudaGraph": "capture",
    "GpuLoad": "gpu",
    "GpuMonitor": "gpu",
    "Latency": "result",
    "NoSynchronisation": "result",
    "Settings": "result",
    "Summary": "statistics",
    "Sweep": "batches",
    "Target": "target",
    "cuda_graph": "capture",
    "demonstrate_no_sync": "measure",
    "latency": "measure",
    "percentile": "statistics",
    "sweep": "batches",
}
__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from .batches import Sweep as Sweep
    from .batches import sweep as sweep
    from .capture import CudaGraph as CudaGraph
    from .capture import cuda_graph as cuda_graph
    from .gpu import GpuLoad as GpuLoad
    from .gpu import GpuMonitor as GpuMonitor
    from .measure import demonstrate_no_sync as demonstrate_no_sync
    from .measure import latency as latency
    from .result import Latency as Latency
    from .result import NoSynchronisation as NoSynchronisation
    from .result import Settings as Settings
    from .statistics import Summary as Summary
    from .statistics import percentile as percentile
    from .target import Target as Target


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
