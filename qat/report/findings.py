"""All that a report tells of a model, measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from .. import analysis
from ..analysis import Changes, ClipRates, LayerErrors, Ranges, Sensitivity
from ..analysis.layers import each_batch
from ..core.quantizer import quantizers
from ..errors import QATError
from ..support.inputs import tensors
from .blocks import Structure, structure
from .flow import record_calls
from .weights import WeightRange, weight_ranges

Value = TypeVar("Value")


@dataclass(frozen=True)
class Findings:
    """What :func:`look_at` found.

    Attributes:
        errors: Of the layers' outputs.
        sensitivity: Of the model's output to each layer.
        ranges: Of the activation sites.
        clipped: Share of clipped codes of all sites.
        weights: Of the weight sites.
        changes: What training changed; ``None`` without an earlier state.
        structure: The network as blocks.
        samples: How many samples were looked at, as far as the first tensor of a batch tells.
        seconds: How long each part took.
    """

    errors: LayerErrors
    sensitivity: Sensitivity
    ranges: Ranges
    clipped: ClipRates
    weights: tuple[WeightRange, ...]
    changes: Changes | None
    structure: Structure
    samples: int
    seconds: dict[str, float]


def look_at(
    model: nn.Module, batches: Iterable[Any], *, exact: bool = False, baseline_state: Mapping[str, Tensor] | None = None
) -> Findings:
    """Run all analyses; the model is afterwards what it was.

    Args:
        model: Prepared and calibrated.
        batches: As for ``qat.calibrate``; all are held in memory.
        exact: Measure the sensitivity of each layer instead of estimating it.
        baseline_state: State dict of an earlier state of the model, which may have been wrapped by DistributedDataParallel.

    Raises:
        QATError: If no site quantizes or no quantized layer runs, or the batches are empty. Of batches that do not
            fit, the model's own error.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def timed(name: str, value: Value) -> Value:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()
        return value

    batches = list(each_batch(batches))
    errors = timed("errors of the layers", analysis.layer_errors(model, batches))
    if not errors.layers:
        raise QATError("model: no quantized layer runs on these batches. Pass batches that reach one")
    sensitivity = timed("sensitivity", analysis.sensitivity(model, batches) if exact else _estimated(model, batches))
    ranges = timed("ranges", analysis.ranges(model, batches))
    clipped = timed("clip rates", analysis.clip_rates(model, batches))
    weights = timed("weights", weight_ranges(model, batches[0]))
    blocks = timed("structure", structure(model, record_calls(model, batches[0])))
    changes = None
    if baseline_state is not None:
        changes = timed("comparison", _changes(model, baseline_state))
    samples = sum(len(found[0]) for batch in batches if (found := tensors(batch)) and found[0].ndim)
    return Findings(errors, sensitivity, ranges, clipped, weights, changes, blocks, samples, seconds)


def _estimated(model: nn.Module, batches: Iterable[Any]) -> Sensitivity:
    try:
        return analysis.estimate_sensitivity(model, batches)
    except RuntimeError as error:
        # The forward pass has run before: a tensor that the backward pass needs was changed in place, or memory is short.
        reason = str(error).splitlines()[0]
        raise QATError(f"model: no gradients to estimate the sensitivity from: {reason} Pass exact=True (--exact)") from error


def _changes(model: nn.Module, before: Mapping[str, Tensor]) -> Changes:
    """What changed since, each range once: a state dict holds that of a shared quantizer under every path."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    after, prefix = inner.state_dict(), "module."
    # DistributedDataParallel puts it before every key. A model may have a child of that name, too.
    if all(key.startswith(prefix) for key in before) and not all(key.startswith(prefix) for key in after):
        before = {key.removeprefix(prefix): value for key, value in before.items()}
    changes = analysis.compare(before, after)
    paths = {path for path, _ in quantizers(inner)}
    return replace(changes, ranges=tuple(moved for moved in changes.ranges if moved.path in paths))
