"""Ranges from histograms: the calibration methods.

Each function takes the counts of ``abs(x)``, int64, shape ``(..., n)``, in bins ``[j * width, (j + 1) * width)``, and the
largest magnitude ``amax``; width and amax are floats, or float64 of shape ``(...)``. It returns the ranges, float32, shape
``(...)``, on the device of the counts, at most ``amax``. Bins above that of ``amax`` are empty and no candidates, so that
several histograms fit into one tensor. All arithmetic is in float64, and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.kernels import fake_quantize
from ..core.numerics import INT8, Format, amax_to_scale, largest_magnitude
from ..errors import QATError
from .histogram import Histogram

METHODS = ("max", "percentile", "mse", "entropy")
WEIGHT_METHODS = ("max", "mse")


def amax_by_max(counts: Tensor, width: float | Tensor, amax: float | Tensor) -> Tensor:
    """The largest magnitude: nothing is clipped."""
    return _like(amax, counts).to(torch.float32)


def amax_by_percentile(counts: Tensor, width: float | Tensor, amax: float | Tensor, *, percentile: float = 99.99) -> Tensor:
    """The magnitude below which ``percentile`` percent of the values lie.

    Args:
        counts: Shape ``(..., n)``, int64.
        width: Width of a bin.
        amax: Largest magnitude.
        percentile: Above 0, at most 100. Interpolated linearly within a bin.

    Example:
        >>> amax_by_percentile(torch.tensor([50, 0, 50]), 1.0, 3.0, percentile=75)
        tensor(2.5000)
    """
    cumulative = counts.cumsum(-1)
    target = cumulative[..., -1:].to(torch.float64) * (percentile / 100)
    index = torch.searchsorted(cumulative.to(torch.float64), target).clamp(max=counts.shape[-1] - 1)
    at = counts.gather(-1, index)
    fraction = (target - (cumulative.gather(-1, index) - at)) / at.clamp(min=1).to(torch.float64)
    return _capped((index + fraction).squeeze(-1), counts, width, amax)


def amax_by_mse(counts: Tensor, width: float | Tensor, amax: float | Tensor, *, fmt: Format = INT8) -> Tensor:
    """The range of least squared error between the bin centres and their fake-quantized values, weighted by the counts.

    Candidates are the right edges of the bins from the 129th on (for INT8). Of equal candidates the largest wins.

    With centres ``x_j``, counts ``c_j`` and scale ``s``, the error is
    ``sum_j c_j x_j^2 - 2 s sum_q q M1_q + s^2 sum_q q^2 M0_q``, where ``M0_q`` and ``M1_q`` are the sums of ``c_j`` and
    ``c_j x_j`` over the bins with code ``q``: differences of cumulative sums, so that the cost of a candidate is the number of
    codes, not the number of bins.
    """
    first, used = fmt.qmax + 2, _used(counts, width, amax)
    if counts.shape[-1] < first:
        return amax_by_max(counts, width, amax)
    errors = _without(mse_errors(counts, first, fmt=fmt), first, used)
    found = _capped(first + _last_minimum(errors), counts, width, amax)
    return torch.where((used >= first) & counts.any(-1), found, amax_by_max(counts, width, amax))


def mse_errors(counts: Tensor, first: int, *, fmt: Format = INT8) -> Tensor:
    """Squared error of each candidate of :func:`amax_by_mse`, as a share of the signal's energy.

    Args:
        counts: Shape ``(..., n)``, ``n >= first``.
        first: Number of bins of the first candidate, positive.
        fmt: Number format.

    Returns:
        Shape ``(..., n - first + 1)``, float64; element ``k`` is for the range of ``first + k`` bins.
    """
    count = counts.to(torch.float64)
    n, device = count.shape[-1], count.device
    centre = torch.arange(n, dtype=torch.float64, device=device) + 0.5
    scale = torch.arange(first, n + 1, dtype=torch.float64, device=device) / fmt.qmax
    code = torch.arange(1, fmt.qmax + 2, dtype=torch.float64, device=device)
    # Code q begins at the first bin whose centre is not below (q - 1/2) * scale; at a tie both codes are equally far.
    begin = ((code - 0.5) * scale[:, None]).sub_(0.5).ceil_().clamp_(max=n).to(torch.int32)
    begin[:, -1] = n  # the largest code takes all that is clipped
    m0, m1 = _sums_between(count, begin), _sums_between(count * centre, begin)
    energy = (count * centre.square()).sum(-1, keepdim=True)
    error = energy - 2 * scale * (m1 @ code[:-1]) + scale.square() * (m0 @ code[:-1].square())
    return error / energy


def amax_by_entropy(
    counts: Tensor,
    width: float | Tensor,
    amax: float | Tensor,
    *,
    fmt: Format = INT8,
    clipped: float = 0.001,
    error_factor: float = 10.0,
) -> Tensor:
    """The range of least Kullback-Leibler divergence between the clipped and the quantized distribution.

    The algorithm of TensorRT's entropy calibrator as NVIDIA published it (S. Migacz, GTC 2017, talk S7310) in the form of
    pytorch-quantization 2.2: the first bin takes the count of the second; a candidate keeps the first ``i`` bins, ``i`` from
    128 to ``n``; its reference is those bins with all outliers added to the last one, its approximation the same bins,
    without outliers, averaged over the non-empty bins of each of 128 levels. The last minimum wins.

    Unlike there, a candidate does not count that clips more than the share ``clipped`` of the values and has more than
    ``error_factor`` times the least squared error. The divergence compares shares of values, not values: where many of them
    are equal, as the pixels of a black background, it is least for a range that ends at that value and clips all that lies
    above. Gates of squeeze-and-excitation, around 0.5 with few values below, were clipped to those few. The defaults were
    chosen by measurement (benchmarks/RESULTS.md); with them the ranges of Gaussian, exponential, standard log-normal and
    Student-t values, and those that cut off rare outliers, are the published algorithm's. So are all with ``clipped=1``.

    Fewer bins than levels leave no candidate: the result is ``amax``.
    """
    levels, used = fmt.qmax + 1, _used(counts, width, amax)
    if counts.shape[-1] < levels:
        return amax_by_max(counts, width, amax)
    errors = _without(mse_errors(counts, levels, fmt=fmt), levels, used)
    inside = counts.cumsum(-1)
    beyond = (inside[..., -1:] - inside[..., levels - 1 :]) > clipped * inside[..., -1:].to(torch.float64)
    destroyed = beyond & (errors > error_factor * errors.amin(-1, keepdim=True) + 1e-12)
    candidates = _without(torch.where(destroyed, torch.inf, divergences(counts, levels)), levels, used)
    found = _capped(levels + _last_minimum(candidates), counts, width, amax)
    return torch.where((used >= levels) & counts[..., 1:].any(-1), found, amax_by_max(counts, width, amax))


def divergences(counts: Tensor, levels: int = 128) -> Tensor:
    """Kullback-Leibler divergence of each candidate of :func:`amax_by_entropy`.

    The divergence is a sum over bins of terms that depend on a bin's own count or on its level only. Both parts are
    differences of cumulative sums, so that a candidate costs as much as there are levels, whatever the number of bins.

    Args:
        counts: Shape ``(..., n)``, ``n >= levels``.
        levels: Number of magnitudes.

    Returns:
        Shape ``(..., n - levels + 1)``, float64, nats; element ``k`` keeps ``levels + k`` bins. Infinite where outliers fall
        onto an empty bin, NaN if all bins from the second on are empty.
    """
    count = torch.cat([counts[..., 1:2], counts[..., 1:]], dim=-1)
    n, device = count.shape[-1], count.device
    total = count.sum(-1, keepdim=True).to(torch.float64)
    p = count.to(torch.float64) / total

    kept = torch.arange(levels, n + 1, device=device)
    # Bin j of i lies in level floor(j * levels / i): level l begins at ceil(l * i / levels). Levels are a power of two: exact.
    share = torch.arange(levels + 1, dtype=torch.float64, device=device) / levels
    begin = (share * kept[:, None]).ceil_().to(torch.int32)
    # Sums of counts, unlike sums of shares, are exact: a level without mass has exactly none.
    mass = _sums_between(count.to(torch.float64), begin).div_(total[..., None])
    average = mass / _sums_between((count > 0).to(torch.float64), begin).clamp_(min=1)
    log_average = average.clamp_(min=torch.finfo(torch.float64).tiny).log_()

    inside = count.cumsum(-1)[..., levels - 1 :]
    last, outliers = p[..., levels - 1 :], (total - inside) / total
    clipped = last + outliers
    reference = _from_zero(torch.xlogy(p, p).cumsum(-1))[..., levels - 1 : n] + torch.xlogy(clipped, clipped)
    approximation = (mass * log_average).sum(dim=-1) + outliers * log_average[..., -1]
    divergence = reference - approximation + (inside / total).log()
    return torch.where((outliers > 0) & (last == 0), torch.inf, divergence)


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


def find_amax(histogram: Histogram, method: str = "mse", *, percentile: float = 99.99, fmt: Format = INT8) -> Tensor:
    """The range of one tensor.

    Args:
        histogram: Not empty.
        method: One of ``METHODS``.
        percentile: For ``method="percentile"``.
        fmt: Number format.

    Returns:
        Scalar, float32, on the device of the counts, between 0 and ``histogram.amax``.

    Raises:
        QATError: For another method, or a percentile outside ``(0, 100]``.
    """
    return find_ranges([histogram], method, percentile=percentile, fmt=fmt)[0]


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
    if method == "percentile":
        return amax_by_percentile(counts, width, amax, percentile=percentile).unbind()
    if method == "mse":
        return amax_by_mse(counts, width, amax, fmt=fmt).unbind()
    if method == "entropy":
        return amax_by_entropy(counts, width, amax, fmt=fmt).unbind()
    return amax_by_max(counts, width, amax).unbind()


def quality(histogram: Histogram, amax: float, *, fmt: Format = INT8) -> tuple[float, float]:
    """What a range does to the data, estimated from the bin centres.

    Args:
        histogram: Not empty.
        amax: The range, positive.
        fmt: Number format.

    Returns:
        The share of values above ``amax``, and the signal-to-quantization-noise ratio in dB.
    """
    count = histogram.used.to(torch.float64)
    centre = (torch.arange(len(count), dtype=torch.float64, device=count.device) + 0.5) * histogram.width
    scale = amax / fmt.qmax
    noise = (count * ((centre / scale).round().clamp(max=fmt.qmax) * scale - centre).square()).sum()
    above = ((centre + histogram.width / 2 - amax) / histogram.width).clamp(0, 1)
    if amax >= histogram.amax:
        above = torch.zeros_like(above)
    sqnr = 10 * torch.log10((count * centre.square()).sum() / noise)
    return float((count * above).sum() / count.sum()), float(sqnr)


def check_method(method: str, percentile: float) -> None:
    """Raise :class:`QATError` for an unknown method or an impossible percentile."""
    if method not in METHODS:
        raise QATError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise QATError(f"percentile={percentile!r}: must lie above 0 and be at most 100")


def check_weight_method(method: str) -> None:
    """Raise :class:`QATError` for an unknown method."""
    if method not in WEIGHT_METHODS:
        raise QATError(f"weight_method={method!r}: choose one of {', '.join(WEIGHT_METHODS)}")


def _from_zero(cumulative: Tensor) -> Tensor:
    """Prepend the zero that a cumulative sum starts from."""
    return torch.nn.functional.pad(cumulative, (1, 0))


def _sums_between(values: Tensor, begin: Tensor) -> Tensor:
    """Sums of ``values`` over the intervals between neighbours in each row of ``begin``.

    Args:
        values: Shape ``(..., n)``.
        begin: Shape ``(rows, intervals + 1)``, int32, at most ``n``.

    Returns:
        Shape ``(..., rows, intervals)``.
    """
    # index_select: several times as fast as indexing.
    at = _from_zero(values.cumsum(-1)).index_select(-1, begin.reshape(-1)).unflatten(-1, begin.shape)
    return at[..., 1:] - at[..., :-1]


def _used(counts: Tensor, width: float | Tensor, amax: float | Tensor) -> Tensor:
    """Number of bins up to that of ``amax``."""
    return (_like(amax, counts) / _like(width, counts)).floor().add(1).clamp(max=counts.shape[-1])


def _without(errors: Tensor, first: int, used: Tensor) -> Tensor:
    """``errors`` of candidates of ``first``, ``first + 1``, … bins, infinite for those of more than ``used``."""
    bins = torch.arange(first, first + errors.shape[-1], device=errors.device)
    return torch.where(bins > used[..., None], torch.inf, errors)


def _last_minimum(values: Tensor) -> Tensor:
    """Index of the last minimum along the last dimension; 0 where there are NaN.

    Values of order one that differ by 1e-12 differ by rounding only: they count as equal.
    """
    least = values <= values.amin(-1, keepdim=True) + 1e-12
    return torch.where(least, torch.arange(values.shape[-1], device=values.device), 0).amax(-1)


def _capped(edge: Tensor, counts: Tensor, width: float | Tensor, amax: float | Tensor) -> Tensor:
    """The upper end of ``edge`` bins, at most ``amax``."""
    return torch.minimum(edge.to(torch.float64) * _like(width, counts), _like(amax, counts)).to(torch.float32)


def _like(value: float | Tensor, counts: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=counts.device)
