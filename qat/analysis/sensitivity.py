"""What each quantized layer does to the model's output."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import QATError
from ..support.inputs import output_tensors
from .layers import Bench, analysing, each_batch
from .metrics import Mean, Metric, relative_error
from .replay import Recording
from .results import TITLES, Sensitivity, ranked


def sensitivity(model: nn.Module, batches: Iterable[Any], *, metric: Metric | None = None, switch: str = "on") -> Sensitivity:
    """Switch the layers one by one and measure the model's output.

    Every value is that of a complete evaluation with one layer switched, to the bit. Only what the layer's change reaches is
    computed, the rest is taken from one recorded run (see :mod:`qat.analysis.replay`): about half an evaluation a layer.
    Holds all intermediate results of one batch, more than a training step does; if memory is short, pass smaller batches.

    Args:
        model: Prepared and calibrated. Sites that are off stay off. Afterwards it is what it was.
        batches: As for ``qat.calibrate``; read once.
        metric: ``metric(outputs, reference, batch)`` of the present and the float outputs and the batch as it came from
            ``batches``, as one number or one a sample; lower is better. :func:`relative_error` by default.
        switch: ``"on"``: the layer alone quantizes; ``"off"``: it alone computes in float.

    Returns:
        The layers, the most sensitive first. The sites of a layer (input and weight, both inputs of an Add) are switched
        together.

    Raises:
        QATError: If no site quantizes, an argument is invalid, or the batches are empty. Of batches that do not fit, the
            model's own error.

    Example:
        >>> import qat, torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [torch.randn(32, 4)]
        >>> _ = qat.prepare(model), qat.calibrate(model, data, progress=False)
        >>> result = sensitivity(model, data, switch="off")
        >>> all(layer.change < 0 for layer in result.layers)
        True
    """
    if switch not in TITLES:
        raise QATError(f"switch={switch!r}: choose 'on' or 'off'")
    metric = metric or relative_error
    with analysing(model) as bench:
        base = Mean()
        values = {path: Mean() for path in bench.layers}
        everything = frozenset(bench.layers)
        start: frozenset[str] = frozenset() if switch == "on" else everything
        for batch in each_batch(batches):
            reference = None if switch == "on" else bench.run(batch, ())
            _switch_each(bench, batch, start, reference, metric, base, values)
        kinds = {path: layer.kind for path, layer in bench.layers.items()}
    return ranked({path: mean.value for path, mean in values.items()}, kinds, switch, base.value, metric, exact=True)


def _switch_each(
    bench: Bench, batch: Any, start: frozenset[str], reference: Any, metric: Metric, base: Mean, values: dict[str, Mean]
) -> None:
    """Add the metric of one batch to ``base`` and, with each layer switched, to ``values``."""
    recording = Recording()
    try:
        with recording.record():
            out = bench.run(batch, start)
        # A copy: the model may write what a switched layer changes into a tensor of the recorded run.
        reference = copy.deepcopy(out) if reference is None else reference
        base.add(metric(out, reference, batch))
        for path, mean in values.items():
            with recording.replay():
                switched = bench.run(batch, start ^ {path})
            recording.read(output_tensors(switched))
            mean.add(metric(switched, reference, batch))
    finally:
        recording.close()
