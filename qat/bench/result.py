"""What a measurement found: figures, how they were taken, what to make of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ..support.files import write_text
from .gpu import GpuLoad
from .statistics import Summary

# Thresholds of trtexec (samples/common/sampleReporting.cpp): a measurement above them is unstable, or not bound by compute.
UNSTABLE = 2.5
ENQUEUE_BOUND = 0.8


@dataclass(frozen=True)
class Settings:
    """How a measurement was taken. Figures with different settings can't be compared.

    Attributes:
        copies: Inputs were copied from, and outputs to, pinned host memory in every run.
        spin_wait: The host waited for the GPU by polling.
        cuda_graph: The work was captured once and replayed.
        profile: A profiler was attached; never the case here.
        in_flight: Runs enqueued before the oldest is waited for.
        warm_up: Seconds of runs before the measurement.
        duration: Seconds the measurement took at least.
        min_runs: Runs it had at least.
    """

    copies: bool
    spin_wait: bool
    cuda_graph: bool
    profile: bool
    in_flight: int
    warm_up: float
    duration: float
    min_runs: int

    def __str__(self) -> str:
        switches = {
            "copies": self.copies,
            "spin wait": self.spin_wait,
            "CUDA graph": self.cuda_graph,
            "profile run": self.profile,
        }
        return ", ".join(f"{name} {'on' if on else 'off'}" for name, on in switches.items())


@dataclass(frozen=True)
class Latency:
    """Latency of a target, all times in ms; defined as in ``trtexec``.

    Attributes:
        target: What was measured.
        device: Where.
        batch: Items of one run, if known.
        runs: Number of measured runs.
        compute: One run without copies: between CUDA events around it on a GPU, by the host's clock on a CPU.
        latency: Copy to the GPU + compute + copy back, of one run.
        enqueue: Host time of the call that starts a run; ``None`` on a CPU, where the call computes.
        h2d: Copy of the inputs to the GPU, if ``settings.copies``.
        d2h: Copy of the outputs back, likewise.
        walltime: Seconds from the start of the first run to the end of the last one.
        throughput: Runs per second: ``runs / walltime``; measured apart with one synchronisation at the end, if asked for.
        synchronised_once: Whether ``throughput`` was measured so.
        settings: How it was measured.
        versions: Of all software involved.
        gpu: Load of the GPU during the runs.
        gpu_missing: Why there is no ``gpu``.
        notes: What the target itself has to say.
    """

    target: str
    device: str
    batch: int | None
    runs: int
    compute: Summary
    latency: Summary
    enqueue: Summary | None
    h2d: Summary | None
    d2h: Summary | None
    walltime: float
    throughput: float
    synchronised_once: bool
    settings: Settings
    versions: dict[str, str] = field(default_factory=dict)
    gpu: GpuLoad | None = None
    gpu_missing: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def items_per_second(self) -> float | None:
        """Throughput in items, if the batch size is known."""
        return None if self.batch is None else self.throughput * self.batch

    @property
    def is_enqueue_bound(self) -> bool:
        """Whether starting a run takes more than 0.8 of computing it, so that the host may be what limits the figure."""
        return self.enqueue is not None and self.enqueue.median > ENQUEUE_BOUND * self.compute.median

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the figures doubtful, each with a remedy."""
        found = []
        if self.compute.variation > UNSTABLE:
            found.append(
                f"unstable: the coefficient of variation is {self.compute.variation:.1f} % (more than {UNSTABLE} %). "
                "Measure longer, on an idle machine, with locked clocks"
            )
        if self.is_enqueue_bound:
            assert self.enqueue is not None
            remedy = "Use a larger batch" if self.settings.cuda_graph else "Pass cuda_graph=True or use a larger batch"
            found.append(
                f"bound by enqueueing: starting a run takes {self.enqueue.median:.3f} ms of the host, computing it "
                f"{self.compute.median:.3f} ms. {remedy}"
            )
        for copy, what in ((self.h2d, "copying inputs to the GPU"), (self.d2h, "copying outputs back")):
            if copy is not None and copy.median >= self.compute.median:
                found.append(
                    f"bound by copies: {what} takes {copy.median:.3f} ms, computing {self.compute.median:.3f} ms. "
                    "Keep the data on the GPU (copies=False)"
                )
        if self.gpu is not None and self.gpu.slowdowns:
            found.append(f"the GPU slowed down: {', '.join(self.gpu.slowdowns)}. Let it cool or lock lower clocks")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        derived = {
            "items_per_second": self.items_per_second,
            "enqueue_bound": self.is_enqueue_bound,
            "warnings": list(self.warnings),
        }
        return {"unit": "ms", **asdict(self), **derived}

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON.

        Raises:
            QATError: If the file cannot be written; an older one stays whole.
        """
        write_text(path, self.to_json() + "\n")

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        lines = [f"{self.target} on {self.device}{batch}: {self.runs} runs in {self.walltime:.2f} s ({self.settings})"]
        lines.append(f"{'ms':<10}{'min':>9}{'mean':>9}{'median':>9}{'p90':>9}{'p95':>9}{'p99':>9}{'max':>9}{'CV %':>7}")
        rows = {"H2D": self.h2d, "compute": self.compute, "D2H": self.d2h, "latency": self.latency, "enqueue": self.enqueue}
        for name, row in rows.items():
            if row is not None:
                times = (row.minimum, row.mean, row.median, row.p90, row.p95, row.p99, row.maximum)
                lines.append(f"{name:<10}" + "".join(f"{t:>9.3f}" for t in times) + f"{row.variation:>7.1f}")
        items = "" if self.items_per_second is None else f", {self.items_per_second:.1f} items/s"
        how = ", synchronised once" if self.synchronised_once else ""
        lines.append(f"throughput {self.throughput:.1f} runs/s{items}{how}")
        if self.gpu is not None:
            lines.append(_gpu_line(self.gpu))
        elif self.gpu_missing:
            lines.append(self.gpu_missing)
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True)
class NoSynchronisation:
    """The same runs timed wrongly and rightly.

    Attributes:
        wrong: Milliseconds per run by the host's clock if nobody waits for the GPU: the time of the enqueue calls.
        right: Milliseconds per run when the GPU is waited for before the clock is read.
        asynchronous: Whether the target returns before it is done at all; on a CPU both figures are the same thing.
    """

    wrong: float
    right: float
    asynchronous: bool

    def __str__(self) -> str:
        if not self.asynchronous:
            return f"{self.right:.3f} ms per run; the call computes on the CPU, there is nothing to synchronise"
        return (
            f"without synchronising {self.wrong:.3f} ms per run, which is how long the host takes to enqueue; "
            f"synchronised {self.right:.3f} ms, {self.right / self.wrong if self.wrong else float('inf'):.1f} times as much"
        )


def _gpu_line(gpu: GpuLoad) -> str:
    quantities = {
        "load": (gpu.utilization, "%"),
        "SM clock": (gpu.sm_clock, "MHz"),
        "memory clock": (gpu.memory_clock, "MHz"),
        "temperature": (gpu.temperature, "°C"),
        "power": (gpu.power, "W"),
    }
    known = [f"{name} {spread.mean:.0f} {unit}" for name, (spread, unit) in quantities.items() if spread is not None]
    return f"{gpu.name}: {', '.join(known) or 'reports nothing'} (means of {gpu.samples} samples)"
