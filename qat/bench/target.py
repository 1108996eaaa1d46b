"""What a measurement needs to know of whatever it measures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .cuda import Stream


def nothing() -> None:
    """No copies."""


@dataclass
class Target:
    """Something to measure.

    Attributes:
        label: What it is.
        enqueue: Starts one run. Without a ``stream`` it returns when the run is done.
        batch: Items of one run.
        stream: The CUDA stream that ``enqueue`` works on.
        device: Where it runs.
        copy_in: Enqueues the copy of the inputs to the GPU.
        copy_out: Enqueues the copy of the outputs back.
        cuda_graph: Whether ``enqueue`` replays a CUDA graph.
        versions: Of the software it needs.
        notes: What a reader of the figures should know.
    """

    label: str
    enqueue: Callable[[], object]
    batch: int | None = None
    stream: Stream | None = None
    device: str = field(default_factory=lambda: platform.processor() or platform.machine())
    copy_in: Callable[[], object] = nothing
    copy_out: Callable[[], object] = nothing
    cuda_graph: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def synchronize(self) -> None:
        """Wait until all runs are done."""
        if self.stream is not None:
            self.stream.synchronize()


def batch_of(values: Any, batch: int | None) -> int | None:
    """``batch``, or else the first dimension that all inputs with dimensions share; ``None`` if they differ."""
    if batch is not None:
        return batch
    sizes = {int(value.shape[0]) for value in values if getattr(value, "ndim", 0)}
    return sizes.pop() if len(sizes) == 1 else None
