"""Latency, throughput and GPU load for several batch sizes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QATError
from ..support.files import write_text
from .measure import latency
from .result import Latency
from .target import Target
from .targets import from_path, is_a

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("batch", "median ms", "p99 ms", "CV %", "enqueue ms", "runs/s", "items/s", "GPU load %", "SM MHz", "")


@dataclass(frozen=True)
class Sweep:
    """Measurements by batch size.

    Attributes:
        rows: In the order asked for.
        failures: Why a batch size could not be measured.
    """

    rows: Mapping[int, Latency]
    failures: Mapping[int, str]

    @property
    def enqueue_bound(self) -> tuple[int, ...]:
        """Batch sizes at which the host limits the speed, not the GPU."""
        return tuple(batch for batch, row in self.rows.items() if row.is_enqueue_bound)

    @property
    def fastest(self) -> int:
        """The batch size of the highest throughput in items."""
        return max(self.rows, key=lambda batch: self.rows[batch].throughput * batch)

    @property
    def conclusions(self) -> tuple[str, ...]:
        """What the table shows, in words."""
        best = self.rows[self.fastest].throughput * self.fastest
        found = [f"most items per second at batch {self.fastest}: {best:.1f}"]
        if bound := self.enqueue_bound:
            graphed = all(self.rows[batch].settings.cuda_graph for batch in bound)
            remedy = "use larger batches" if graphed else "capture a CUDA graph (cuda_graph=True) or use larger batches"
            found.append(f"bound by enqueueing at batch {', '.join(map(str, bound))}: {remedy}")
        found += [f"batch {batch}: {reason}" for batch, reason in self.failures.items()]
        found += sorted({row.gpu_missing for row in self.rows.values() if row.gpu_missing})
        return tuple(found)

    def _cells(self) -> list[tuple[str, ...]]:
        return [_cells(batch, row) for batch, row in self.rows.items()]

    def table(self) -> Table:
        """The measurements as a rich table, with the conclusions as its caption."""
        from rich.table import Table

        first = next(iter(self.rows.values()))
        table = Table(title=f"{first.target} on {first.device} ({first.settings})", caption="\n".join(self.conclusions))
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        lines = [_COLUMNS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *self.conclusions])

    def to_json(self) -> str:
        """Everything as JSON."""
        rows = [row.to_dict() for row in self.rows.values()]
        failures = {str(batch): reason for batch, reason in self.failures.items()}
        content = {"rows": rows, "failures": failures, "conclusions": list(self.conclusions)}
        return json.dumps(content, indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON.

        Raises:
            QATError: If the file cannot be written; an older one stays whole.
        """
        write_text(path, self.to_json() + "\n")


def _cells(batch: int, row: Latency) -> tuple[str, ...]:
    load = None if row.gpu is None else row.gpu.utilization
    clock = None if row.gpu is None else row.gpu.sm_clock
    return (
        str(batch),
        f"{row.latency.median:.3f}",
        f"{row.latency.p99:.3f}",
        f"{row.compute.variation:.1f}",
        "-" if row.enqueue is None else f"{row.enqueue.median:.3f}",
        f"{row.throughput:.1f}",
        f"{row.throughput * batch:.1f}",
        "-" if load is None else f"{load.mean:.0f}",
        "-" if clock is None else f"{clock.mean:.0f}",
        "bound by enqueueing" if row.is_enqueue_bound else "",
    )


def sweep(target: Any, batches: Iterable[int], inputs: Any = None, **options: Any) -> Sweep:
    """Measure ``target`` at several batch sizes.

    Args:
        target: As for :func:`qat.bench.latency`; or a function of the batch size that returns a target, or a pair of a target
            and its inputs.
        batches: Positive, different sizes.
        inputs: One example whose first dimension is the batch; its items are repeated to each size. A module needs it.
        **options: Of :func:`qat.bench.latency`.

    Returns:
        The measurements. A batch size that the target refuses, or for which memory does not suffice, is listed with the reason.

    Raises:
        QATError: If a size is not positive or given twice, or no size could be measured.

    Example:
        >>> from qat.bench import Target
        >>> result = sweep(lambda batch: Target("sum", lambda: sum(range(batch))), [1, 2], duration=0.01, warm_up=0)
        >>> list(result.rows)
        [1, 2]
    """
    sizes = list(batches)
    if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes) or len(set(sizes)) < len(sizes):
        raise QATError(f"batches={sizes}: pass positive integers, each once")
    rows: dict[int, Latency] = {}
    failures: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        if isinstance(target, (str, os.PathLike)):
            # Opened once, not for each size.
            target = from_path(Path(target), stack)
        for size in sizes:
            measured = _measure(target, inputs, size, options)
            if isinstance(measured, Latency):
                rows[size] = measured
            else:
                failures[size] = str(measured)
                if len(failures) == len(sizes):
                    raise measured
    return Sweep(rows, failures)


def _measure(target: Any, inputs: Any, batch: int, options: Mapping[str, Any]) -> Latency | QATError:
    """The measurement at one batch size, or why there is none."""
    try:
        made, example = _at(target, inputs, batch)
        return latency(made, example, batch=batch, **options)
    except QATError as error:
        return error


def _at(target: Any, inputs: Any, batch: int) -> tuple[Any, Any]:
    """The target and its inputs at one batch size."""
    is_factory = callable(target) and not isinstance(target, Target) and not is_a(target, "torch.nn", "Module")
    if not is_factory:
        return target, repeat(inputs, batch)
    if inputs is not None:
        raise QATError("inputs: a function of the batch size makes its own, return (target, inputs)")
    made = target(batch)
    return made if isinstance(made, tuple) else (made, None)


def repeat(inputs: Any, batch: int) -> Any:
    """Arrays and tensors in tuples, lists and dicts with their items repeated, or cut, to ``batch`` along dimension 0.

    Raises:
        QATError: If one is empty.

    Example:
        >>> import numpy as np
        >>> repeat({"x": np.array([1, 2])}, 3)
        {'x': array([1, 2, 1])}
    """
    if isinstance(inputs, Mapping):
        return {name: repeat(value, batch) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(repeat(value, batch) for value in inputs)
    if not getattr(inputs, "ndim", 0):
        return inputs
    if not inputs.shape[0]:
        raise QATError(f"an input has shape {list(inputs.shape)}: there is no item to repeat")
    # Works for both: a list of indices makes a copy on the array's own device.
    return inputs[[index % inputs.shape[0] for index in range(batch)]]
