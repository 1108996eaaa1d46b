"""How long each layer of an engine takes, by TensorRT's own profiler."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..errors import QATError
from .engine import Engine


def layer_times(engine: Engine, inputs: Any, *, runs: int = 50, warm_up: int = 10) -> dict[str, float]:
    """Measure every layer of an engine; for :func:`qat.tensorrt.inspect` (``times=``).

    The layers run one by one, so their sum exceeds the engine's latency.

    Args:
        engine: On a machine with its GPU.
        inputs: As in :meth:`qat.tensorrt.Engine.run`.
        runs: Measured runs.
        warm_up: Runs before those.

    Returns:
        Median time in ms by layer name, in the order in which the layers run.

    Raises:
        QATError: If ``runs`` is not positive, an input does not fit, there is no GPU, or TensorRT reports no layer.
    """
    if runs < 1:
        raise QATError(f"runs={runs}: measure at least one")
    trt: Any = engine.runtime.module
    found: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):  # the base class exists only once a runtime is imported
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            found.setdefault(layer_name, []).append(ms)

    context = engine.context()
    stream = engine.cuda.create_stream()
    try:
        context.set_inputs(inputs)
        context.upload(stream)
        for _ in range(warm_up):
            context.enqueue(stream)
        engine.cuda.synchronize(stream)
        context.report_to(Profiler())
        for _ in range(runs):
            context.enqueue(stream)
            engine.cuda.synchronize(stream)
    finally:
        context.close()
        engine.cuda.destroy_stream(stream)
    if not found:
        raise QATError(f"{engine.runtime.title} reported no layer; build the engine with qat.tensorrt.build, which keeps names")
    return {name: median(times) for name, times in found.items()}
