"""Ranges of tensors: of weights by their values, and of many histograms on one device at a time.

The methods themselves are in :mod:`qat.core.amax`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.amax import METHODS as METHODS
from ..core.amax import amax_by_entropy as amax_by_entropy
from ..core.amax import amax_by_max as amax_by_max
from ..core.amax import amax_by_mse as amax_by_mse
from ..core.amax import amax_by_percentile as amax_by_percentile
from ..core.amax import check_method as check_method
from ..core.amax import divergences as divergences
from ..core.amax import find_amax as find_amax
from ..core.amax import mse_errors as mse_errors
from ..core.amax import quality as quality
from ..core.amax import search
from ..core.formats import INT8, Format
from ..core.kernels import fake_quantize
from ..core.numerics import amax_to_scale, largest_magnitude
from ..errors import QATError
from .histogram import Histogram

WEIGHT_METHODS = ("max", "mse")


def weight_amax_by_mse(weight: Tensor, axis: int | None = None, *, fmt: Format = INT8) -> Tensor:
    """The range of least squared error between a weight and its fake-quantized values, in percent of its largest magnitude.

    For few bits: the largest of many weights lies far out, and then most weights share two or three codes.

    Args:
        weight: Floating, not empty.
        axis: Channel dimension; ``None`` for one range.
        fmt: Number format.

    Returns:
        float32, a scalar or one range a channel, between 20 and 100 % of the largest magnitude. Of equal ones the largest.
        NaN and infinity of a channel are its range.

    Example:
        >>> from qat.core.numerics import INT4
        >>> weight = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([1.6])])
        >>> weight_amax_by_mse(weight, fmt=INT4)
        tensor(1.3600)
    """
    x = weight.detach().to(torch.float32)
    largest = largest_magnitude(x, axis)
    others = [dim for dim in range(x.ndim) if axis is None or dim != axis % x.ndim]
    best, least = largest, torch.full_like(largest, torch.inf)
    for percent in range(100, 19, -1):
        amax = largest * (percent / 100)
        error = (fake_quantize(x, amax_to_scale(amax, fmt), axis=axis, fmt=fmt) - x).square_().sum(others)
        best = torch.where(error < least, amax, best)
        least = torch.minimum(error, least)
    return best


def find_ranges(
    histograms: Sequence[Histogram], method: str = "mse", *, percentile: float = 99.99, fmt: Format = INT8
) -> list[Tensor]:
    """The ranges of several tensors, as by :func:`find_amax`; on a device other than the CPU in a few calls.

    Raises:
        QATError: As :func:`find_amax`.
    """
    check_method(method, percentile)
    found: dict[int, Tensor] = {}
    for device in {histogram.counts.device for histogram in histograms}:
        there = [i for i, histogram in enumerate(histograms) if histogram.counts.device == device]
        # On a CPU one at a time, whose intermediate results stay in the cache; elsewhere 0.5 GB of them at a time.
        size = 1 if device.type == "cpu" else 32
        for start in range(0, len(there), size):
            part = there[start : start + size]
            found.update(zip(part, _find([histograms[i] for i in part], method, percentile, fmt), strict=True))
    return [found[i] for i in range(len(histograms))]


def _find(histograms: Sequence[Histogram], method: str, percentile: float, fmt: Format) -> Sequence[Tensor]:
    """The ranges of histograms on one device."""
    longest = max(len(histogram.used) for histogram in histograms)
    counts = torch.stack([histogram.counts[:longest] for histogram in histograms])
    sizes = torch.tensor([(histogram.width, histogram.amax) for histogram in histograms], dtype=torch.float64)
    width, amax = sizes.to(counts.device).unbind(1)
    found: Tensor = search(counts, width, amax, method, percentile=percentile, fmt=fmt)
    return found.unbind()


def check_weight_method(method: str) -> None:
    """Raise :class:`QATError` for an unknown method."""
    if method not in WEIGHT_METHODS:
        raise QATError(f"weight_method={method!r}: choose one of {', '.join(WEIGHT_METHODS)}")
