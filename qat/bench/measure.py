"""The measuring loop: warm-up, then runs timed by CUDA events on a GPU and by the host's clock on a CPU."""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..errors import QATError
from ..support.version import __version__
from .cuda import Event, Stream
from .gpu import GpuMonitor
from .result import Latency, NoSynchronisation, Settings
from .statistics import Summary
from .target import Target
from .targets import open_target

Clock = Callable[[], int]


@dataclass
class _Trace:
    """Milliseconds of each run."""

    compute: list[float] = field(default_factory=list)
    enqueue: list[float] = field(default_factory=list)
    h2d: list[float] = field(default_factory=list)
    d2h: list[float] = field(default_factory=list)
    walltime: float = 0.0


def latency(
    target: Any,
    inputs: Any = None,
    *,
    batch: int | None = None,
    warm_up: float = 0.2,
    duration: float = 3.0,
    min_runs: int = 10,
    copies: bool = False,
    throughput: bool = False,
    cuda_graph: bool = False,
    spin_wait: bool = True,
    in_flight: int = 2,
    monitor: bool = True,
    clock: Clock = time.perf_counter_ns,
) -> Latency:
    """Measure how long one run of ``target`` takes.

    On a GPU each run lies between two CUDA events and is waited for before its time is read, while the next one is already
    enqueued (``in_flight=2``, as in ``trtexec``): so the GPU never idles between runs unless the host is slower than it.

    Args:
        target: A PyTorch module, the result of :func:`qat.bench.cuda_graph`, an ONNX Runtime session, a
            :class:`qat.tensorrt.Engine`, the path of an ``.onnx`` file (run by ONNX Runtime on the CPU) or of a plan
            (``.engine``, ``.plan``, ``.trt``), or a :class:`qat.bench.Target`.
        inputs: What the target is run with. A module needs an example: a tuple holds positional arguments, a dict keyword
            arguments. Sessions and engines take arrays by name, in order, or the one array; without any, random ones are
            made.
        batch: Size of open first dimensions of random inputs, and items per run; by default taken from the inputs.
        warm_up: Seconds of runs before measuring.
        duration: Seconds to measure at least.
        min_runs: Runs to measure at least.
        copies: Copy inputs from pinned host memory before, and outputs to it after each run, on the same stream. GPU only.
        throughput: Measure the throughput in a second pass of the same duration that synchronises once, at its end.
        cuda_graph: Capture the run once and replay it. GPU only.
        spin_wait: Wait for the GPU by polling rather than sleeping.
        in_flight: Runs enqueued before the oldest is waited for; 1 lets the GPU go idle after each run.
        monitor: Sample load and clocks of the GPU meanwhile.
        clock: Nanoseconds of the host.

    Returns:
        The figures.

    Raises:
        QATError: If an argument, the target or its inputs do not fit, or GPU memory does not suffice.

    Example:
        >>> from qat.bench import Target
        >>> result = latency(Target("sum", lambda: sum(range(1000))), duration=0.01, warm_up=0)
        >>> result.runs >= 10 and result.compute.minimum <= result.compute.median <= result.compute.p99
        True
    """
    _check(warm_up, duration, min_runs, in_flight)
    with open_target(target, inputs, batch=batch, copies=copies, cuda_graph=cuda_graph, spin_wait=spin_wait) as opened:
        settings = Settings(copies, spin_wait, opened.cuda_graph, False, in_flight, warm_up, duration, min_runs)
        _warm_up(opened, warm_up, clock)
        watch, missing = _monitor(opened, monitor)
        with _no_garbage_collection(), watch or nullcontext():
            trace = _trace(opened, settings, clock)
            rate = len(trace.compute) / trace.walltime
            if throughput:
                rate = _throughput(opened, max(min_runs, math.ceil(duration * rate)), clock)
        total = [sum(parts) for parts in zip(*(p for p in (trace.h2d, trace.compute, trace.d2h) if p), strict=True)]
        load = None if watch is None else watch.load()
        return Latency(
            target=opened.label,
            device=opened.device if load is None else load.name,
            batch=opened.batch,
            runs=len(trace.compute),
            compute=Summary.of(trace.compute),
            latency=Summary.of(total),
            enqueue=Summary.of(trace.enqueue) if trace.enqueue else None,
            h2d=Summary.of(trace.h2d) if trace.h2d else None,
            d2h=Summary.of(trace.d2h) if trace.d2h else None,
            walltime=trace.walltime,
            throughput=rate,
            synchronised_once=throughput,
            settings=settings,
            versions={
                "qat": __version__,
                "python": platform.python_version(),
                **opened.versions,
                **({} if load is None else {"driver": load.driver}),
            },
            gpu=load,
            gpu_missing=missing,
            notes=opened.notes,
        )


def demonstrate_no_sync(
    target: Any,
    inputs: Any = None,
    *,
    batch: int | None = None,
    runs: int = 20,
    warm_up: float = 0.2,
    cuda_graph: bool = False,
    clock: Clock = time.perf_counter_ns,
) -> NoSynchronisation:
    """Time the same runs without and with waiting for the GPU, to show what the common mistake costs.

    Args:
        target: As in :func:`latency`.
        inputs: As in :func:`latency`.
        batch: As in :func:`latency`.
        runs: How many; few, because a full launch queue makes the host wait after all.
        warm_up: Seconds of runs before measuring.
        cuda_graph: As in :func:`latency`.
        clock: Nanoseconds of the host.

    Returns:
        Both figures.

    Raises:
        QATError: As :func:`latency`.
    """
    _check(warm_up, 0.0, runs, 1)
    with open_target(target, inputs, batch=batch, copies=False, cuda_graph=cuda_graph, spin_wait=True) as opened:
        _warm_up(opened, warm_up, clock)
        with _no_garbage_collection():
            start = clock()
            for _ in range(runs):
                opened.enqueue()
            enqueued = clock()
            opened.synchronize()
            done = clock()
    return NoSynchronisation((enqueued - start) / runs / 1e6, (done - start) / runs / 1e6, opened.stream is not None)


def _check(warm_up: float, duration: float, min_runs: int, in_flight: int) -> None:
    for name, seconds in (("warm_up", warm_up), ("duration", duration)):
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise QATError(f"{name}={seconds}: seconds, at least 0")
    for name, count in (("min_runs", min_runs), ("in_flight", in_flight)):
        if count < 1:
            raise QATError(f"{name}={count}: at least 1")


def _monitor(target: Target, wanted: bool) -> tuple[GpuMonitor | None, str | None]:
    if target.stream is None or not wanted:
        return None, None
    try:
        return GpuMonitor(target.stream.device), None
    except QATError as error:
        return None, str(error)


def _warm_up(target: Target, seconds: float, clock: Clock) -> None:
    """Run for some time, at least once: clocks rise, caches fill, lazy initialisation ends."""
    start = clock()
    while True:
        target.copy_in()
        target.enqueue()
        target.copy_out()
        target.synchronize()
        if clock() - start >= seconds * 1e9:
            return


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep collection of cycles out of the measurement, as ``timeit`` does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _trace(target: Target, settings: Settings, clock: Clock) -> _Trace:
    if target.stream is None:
        return _host_trace(target, settings, clock)
    return _device_trace(target, target.stream, settings, clock)


def _host_trace(target: Target, settings: Settings, clock: Clock) -> _Trace:
    trace = _Trace()
    first = end = clock()
    while len(trace.compute) < settings.min_runs or end - first < settings.duration * 1e9:
        start = clock()
        target.enqueue()
        end = clock()
        trace.compute.append((end - start) / 1e6)
    trace.walltime = max(end - first, 1) / 1e9
    return trace


class _Slot:
    """The events of one run in flight; with copies four, otherwise two."""

    def __init__(self, target: Target, stream: Stream, copies: bool) -> None:
        self._target = target
        self._copies = copies
        self.compute_start, self.compute_end = stream.event(), stream.event()
        self.start: Event = stream.event() if copies else self.compute_start
        self.end: Event = stream.event() if copies else self.compute_end
        self.enqueue_ns = 0

    def enqueue(self, clock: Clock) -> None:
        target = self._target
        if self._copies:
            self.start.record()
            target.copy_in()
        self.compute_start.record()
        before = clock()
        target.enqueue()
        self.enqueue_ns = clock() - before
        self.compute_end.record()
        if self._copies:
            target.copy_out()
            self.end.record()

    def finish(self, trace: _Trace) -> None:
        """Wait for the run and note its times."""
        self.end.synchronize()
        trace.compute.append(self.compute_end.since(self.compute_start))
        trace.enqueue.append(self.enqueue_ns / 1e6)
        if self._copies:
            trace.h2d.append(self.compute_start.since(self.start))
            trace.d2h.append(self.end.since(self.compute_end))


def _device_trace(target: Target, stream: Stream, settings: Settings, clock: Clock) -> _Trace:
    trace = _Trace()
    idle = deque(_Slot(target, stream, settings.copies) for _ in range(settings.in_flight))
    pending: deque[_Slot] = deque()
    origin = stream.event()
    first = clock()
    origin.record()
    while True:
        slot = idle.popleft()
        slot.enqueue(clock)
        pending.append(slot)
        if not idle:
            pending[0].finish(trace)
            idle.append(pending.popleft())
        if len(trace.compute) + len(pending) >= settings.min_runs and clock() - first >= settings.duration * 1e9:
            break
    while pending:
        pending.popleft().finish(trace)
    trace.walltime = slot.end.since(origin) / 1e3
    return trace


def _throughput(target: Target, runs: int, clock: Clock) -> float:
    """Runs per second with one synchronisation at the end."""
    if target.stream is None:
        start = clock()
        for _ in range(runs):
            target.enqueue()
        return runs * 1e9 / max(clock() - start, 1)
    begin, end = target.stream.event(), target.stream.event()
    begin.record()
    for _ in range(runs):
        target.copy_in()
        target.enqueue()
        target.copy_out()
    end.record()
    end.synchronize()
    return runs * 1e3 / end.since(begin)
