"""The weights that reach their sites, as histograms with the chosen ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.layers import running
from ..analysis.metrics import Distance
from ..core.numerics import broadcast_scale, quantize
from ..core.quantizer import Quantizer, State, WeightQuantizer, watching

BINS = 80


@dataclass(frozen=True)
class WeightRange:
    """A weight and the range of its site.

    Attributes:
        path: Of the quantizer.
        shape: Of the weight.
        smallest: The smallest range of a channel.
        largest: The largest one; the same for one scale a tensor.
        sqnr: ``10 log10(sum(w ** 2) / sum((q - w) ** 2))`` in dB of the weight and its quantized values; infinite if equal.
        limit: The largest magnitude.
        counts: How many values are in each of ``BINS`` bins of equal width from ``-limit`` to ``limit``.
    """

    path: str
    shape: tuple[int, ...]
    smallest: float
    largest: float
    sqnr: float
    limit: float
    counts: tuple[int, ...]


def weight_ranges(model: nn.Module, batch: Any) -> tuple[WeightRange, ...]:
    """Look at what reaches each quantizing weight site while ``model`` runs on one batch; it is afterwards what it was."""
    found: dict[str, WeightRange] = {}

    def look(path: str, site: Quantizer, weight: Tensor) -> None:
        if isinstance(site, WeightQuantizer) and site.state is State.QUANTIZING and path not in found and weight.numel():
            found[path] = _look(path, site, weight.float())

    with running(model) as (inner, run), watching(inner, look):
        run(batch)
    return tuple(found.values())


def _look(path: str, site: WeightQuantizer, weight: Tensor) -> WeightRange:
    scale = site.range_scale(weight)
    distance = Distance()
    codes = quantize(weight, scale, axis=site.axis, fmt=site.fmt)
    distance.add(weight, codes * broadcast_scale(scale, weight, site.axis))
    amax = scale * site.fmt.qmax
    limit = float(weight.abs().max())
    # Bins of no width hold nothing: all weights are zero, or next to it.
    width = 2 * limit / BINS if limit > 1e-30 else math.inf
    bins = (weight.flatten() / width + BINS / 2).floor().clamp(0, BINS - 1).to(torch.int64)
    counts = tuple(torch.bincount(bins, minlength=BINS).tolist())
    return WeightRange(path, tuple(weight.shape), float(amax.min()), float(amax.max()), distance.sqnr, limit, counts)
