"""Keep TensorRT's kernels loaded between the builds of one process."""

from __future__ import annotations

from typing import Any


def warm_builder() -> Any:
    """A builder to hold: TensorRT loads its kernels with the first one of a process and drops them with the last."""
    from qat.tensorrt import find_runtime
    from qat.tensorrt.log import BuildLog, messages_of

    trt: Any = find_runtime().module
    return trt.Builder(messages_of(trt).listen(BuildLog(), 10))
