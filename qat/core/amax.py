"""Ranges from histograms: the calibration methods, for arrays of NumPy and tensors of PyTorch alike.

Each function takes the counts of ``abs(x)``, int64, shape ``(..., n)``, in bins ``[j * width, (j + 1) * width)``, and the
largest magnitude ``amax``; width and amax are floats, or float64 of shape ``(...)``. It returns the ranges, float32, shape
``(...)``, as an array or a tensor as the counts are, on their device, at most ``amax``. Bins above that of ``amax`` are empty
and no candidates, so that several histograms fit into one array. All arithmetic is in float64, and nothing waits for a device.

This module does not import PyTorch: it calls the functions of the library that the counts come from, by the names that both
have. Sums of counts are exact in any order, so squared errors are the same on every device; divergences are up to rounding.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

from ..errors import QATError
from .formats import INT8, Format

# An array of NumPy or a tensor of PyTorch; which of them, callers know.
Array = Any

METHODS = ("max", "percentile", "mse", "entropy")
# Of an empty histogram, or one of zeros, for which another value is taken afterwards. PyTorch never warns.
_QUIET = np.errstate(divide="ignore", invalid="ignore")


class Counted(Protocol):
    """A histogram of magnitudes: :class:`qat.core.bins.Bins`, or :class:`qat.calibration.Histogram` on a device."""

    @property
    def used(self) -> Array:
        """The counts up to the bin that holds ``amax``."""

    @property
    def width(self) -> float:
        """Width of a bin."""

    @property
    def amax(self) -> float:
        """The largest magnitude."""


def find_amax(histogram: Counted, method: str = "mse", *, percentile: float = 99.99, fmt: Format = INT8) -> Array:
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
    check_method(method, percentile)
    counts = histogram.used[None]
    return search(counts, histogram.width, histogram.amax, method, percentile=percentile, fmt=fmt)[0]


def search(
    counts: Array, width: float | Array, amax: float | Array, method: str, *, percentile: float = 99.99, fmt: Format = INT8
) -> Array:
    """The ranges of one or more histograms by one of ``METHODS``."""
    if method == "percentile":
        return amax_by_percentile(counts, width, amax, percentile=percentile)
    if method == "mse":
        return amax_by_mse(counts, width, amax, fmt=fmt)
    if method == "entropy":
        return amax_by_entropy(counts, width, amax, fmt=fmt)
    return amax_by_max(counts, width, amax)


def amax_by_max(counts: Array, width: float | Array, amax: float | Array) -> Array:
    """The largest magnitude: nothing is clipped."""
    xp = _library(counts)
    return xp.asarray(_like(amax, counts), dtype=xp.float32) + xp.zeros_like(counts[..., 0], dtype=xp.float32)


def amax_by_percentile(counts: Array, width: float | Array, amax: float | Array, *, percentile: float = 99.99) -> Array:
    """The magnitude below which ``percentile`` percent of the values lie.

    Args:
        counts: Shape ``(..., n)``, int64.
        width: Width of a bin.
        amax: Largest magnitude.
        percentile: Above 0, at most 100. Interpolated linearly within a bin.

    Example:
        >>> import numpy as np
        >>> float(amax_by_percentile(np.array([50, 0, 50]), 1.0, 3.0, percentile=75))
        2.5
    """
    xp = _library(counts)
    cumulative = xp.cumsum(counts, -1)
    target = _wide(cumulative[..., -1:]) * (percentile / 100)
    # The first bin with which the target is reached.
    index = xp.sum(_wide(cumulative) < target, -1, keepdims=True)
    index = xp.clip(index, None, counts.shape[-1] - 1)
    here = _numbers(0, counts.shape[-1], counts) == index
    at, until = (xp.sum(xp.where(here, values, 0), -1, keepdims=True) for values in (counts, cumulative))
    fraction = (target - _wide(until - at)) / _wide(xp.clip(at, 1, None))
    return _capped((index + fraction)[..., 0], counts, width, amax)


def amax_by_mse(counts: Array, width: float | Array, amax: float | Array, *, fmt: Format = INT8) -> Array:
    """The range of least squared error between the bin centres and their fake-quantized values, weighted by the counts.

    Candidates are the right edges of the bins from the 129th on (for INT8). Of equal candidates the largest wins.

    With centres ``x_j``, counts ``c_j`` and scale ``s``, the error is
    ``sum_j c_j x_j^2 - 2 s sum_q q M1_q + s^2 sum_q q^2 M0_q``, where ``M0_q`` and ``M1_q`` are the sums of ``c_j`` and
    ``c_j x_j`` over the bins with code ``q``: differences of cumulative sums, so that the cost of a candidate is the number of
    codes, not the number of bins.
    """
    xp, first, used = _library(counts), fmt.qmax + 2, _used(counts, width, amax)
    largest = amax_by_max(counts, width, amax)
    if counts.shape[-1] < first:
        return largest
    errors = _without(mse_errors(counts, first, fmt=fmt), first, used)
    found = _capped(first + _last_minimum(errors), counts, width, amax)
    return xp.where((used >= first) & xp.any(counts, -1), found, largest)


@_QUIET
def mse_errors(counts: Array, first: int, *, fmt: Format = INT8) -> Array:
    """Squared error of each candidate of :func:`amax_by_mse`, as a share of the signal's energy.

    Args:
        counts: Shape ``(..., n)``, ``n >= first``.
        first: Number of bins of the first candidate, positive.
        fmt: Number format.

    Returns:
        Shape ``(..., n - first + 1)``, float64; element ``k`` is for the range of ``first + k`` bins.
    """
    xp, count = _library(counts), _wide(counts)
    n = count.shape[-1]
    centre = _numbers(0, n, counts) + 0.5
    scale = _numbers(first, n + 1, counts) / fmt.qmax
    code = _numbers(1, fmt.qmax + 2, counts)
    # Code q begins at the first bin whose centre is not below (q - 1/2) * scale; at a tie both codes are equally far.
    begin = (code - 0.5) * scale[:, None]
    begin -= 0.5
    begin = _integers(xp.clip(xp.ceil(begin, out=begin), None, n, out=begin))
    begin[:, -1] = n  # the largest code takes all that is clipped
    m0, m1 = _sums_between(count, begin), _sums_between(count * centre, begin)
    energy = xp.sum(count * xp.square(centre), -1, keepdims=True)
    error = energy - 2 * scale * (m1 @ code[:-1]) + xp.square(scale) * (m0 @ xp.square(code[:-1]))
    return error / energy


def amax_by_entropy(
    counts: Array,
    width: float | Array,
    amax: float | Array,
    *,
    fmt: Format = INT8,
    clipped: float = 0.001,
    error_factor: float = 10.0,
) -> Array:
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
    xp, levels, used = _library(counts), fmt.qmax + 1, _used(counts, width, amax)
    largest = amax_by_max(counts, width, amax)
    if counts.shape[-1] < levels:
        return largest
    errors = _without(mse_errors(counts, levels, fmt=fmt), levels, used)
    inside = xp.cumsum(counts, -1)
    beyond = (inside[..., -1:] - inside[..., levels - 1 :]) > clipped * _wide(inside[..., -1:])
    destroyed = beyond & (errors > error_factor * xp.amin(errors, -1, keepdims=True) + 1e-12)
    candidates = _without(xp.where(destroyed, xp.inf, divergences(counts, levels)), levels, used)
    found = _capped(levels + _last_minimum(candidates), counts, width, amax)
    return xp.where((used >= levels) & xp.any(counts[..., 1:], -1), found, largest)


@_QUIET
def divergences(counts: Array, levels: int = 128) -> Array:
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
    xp = _library(counts)
    count = xp.concatenate([counts[..., 1:2], counts[..., 1:]], -1)
    n = count.shape[-1]
    total = _wide(xp.sum(count, -1, keepdims=True))
    p = _wide(count) / total

    kept = _numbers(levels, n + 1, counts)
    # Bin j of i lies in level floor(j * levels / i): level l begins at ceil(l * i / levels). Levels are a power of two: exact.
    begin = _numbers(0, levels + 1, counts) / levels * kept[:, None]
    begin = _integers(xp.ceil(begin, out=begin))
    # Sums of counts, unlike sums of shares, are exact: a level without mass has exactly none.
    mass = _sums_between(_wide(count), begin)
    mass /= total[..., None]
    members = _sums_between(_wide(count > 0), begin)
    average = mass / xp.clip(members, 1, None, out=members)
    average = xp.clip(average, sys.float_info.min, None, out=average)
    log_average = xp.log(average, out=average)

    inside = xp.cumsum(count, -1)[..., levels - 1 :]
    last, outliers = p[..., levels - 1 :], (total - inside) / total
    clipped = last + outliers
    reference = _from_zero(xp.cumsum(_x_log_x(p), -1))[..., levels - 1 : n] + _x_log_x(clipped)
    approximation = xp.sum(mass * log_average, -1) + outliers * log_average[..., -1]
    divergence = reference - approximation + xp.log(inside / total)
    return xp.where((outliers > 0) & (last == 0), xp.inf, divergence)


@_QUIET
def quality(histogram: Counted, amax: float, *, fmt: Format = INT8) -> tuple[float, float]:
    """Estimate what a range does to the data, from the bin centres.

    Args:
        histogram: Not empty.
        amax: The range, positive.
        fmt: Number format.

    Returns:
        The share of values above ``amax``, and the signal-to-quantization-noise ratio in dB.
    """
    count = _wide(histogram.used)
    xp = _library(count)
    centre = (_numbers(0, len(count), count) + 0.5) * histogram.width
    scale = amax / fmt.qmax
    noise = xp.sum(count * xp.square(xp.clip(xp.round(centre / scale), None, fmt.qmax) * scale - centre))
    above = xp.clip((centre + histogram.width / 2 - amax) / histogram.width, 0, 1)
    if amax >= histogram.amax:
        above = xp.zeros_like(above)
    sqnr = 10 * xp.log10(xp.sum(count * xp.square(centre)) / noise)
    return float(xp.sum(count * above) / xp.sum(count)), float(sqnr)


def check_method(method: str, percentile: float) -> None:
    """Raise :class:`QATError` for an unknown method or an impossible percentile."""
    if method not in METHODS:
        raise QATError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise QATError(f"percentile={percentile!r}: must lie above 0 and be at most 100")


def _library(x: Array) -> Any:
    """The functions for ``x``: the package of its class, NumPy or PyTorch. Whoever holds a tensor has imported that."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def _wide(x: Array) -> Array:
    xp = _library(x)
    return xp.asarray(x, dtype=xp.float64)


def _integers(x: Array) -> Array:
    xp = _library(x)
    return xp.asarray(x, dtype=xp.int32)


def _like(value: float | Array, counts: Array) -> Array:
    """``value`` in float64, where the counts are."""
    xp = _library(counts)
    return xp.asarray(value, dtype=xp.float64, **_place(counts))


def _numbers(start: int, stop: int, like: Array) -> Array:
    """``start, start + 1, …, stop - 1`` in float64, in the library and on the device of ``like``."""
    xp = _library(like)
    return xp.arange(start, stop, dtype=xp.float64, **_place(like))


def _place(x: Array) -> dict[str, Any]:
    """The device of ``x`` as an argument; before version 2, NumPy had none."""
    return {"device": x.device} if hasattr(x, "device") else {}


def _x_log_x(x: Array) -> Array:
    """``x * log(x)``, zero at zero."""
    xp = _library(x)
    return x * xp.log(xp.where(x == 0, 1.0, x))


def _from_zero(cumulative: Array) -> Array:
    """Prepend the zero that a cumulative sum starts from."""
    xp = _library(cumulative)
    return xp.concatenate([xp.zeros_like(cumulative[..., :1]), cumulative], -1)


def _sums_between(values: Array, begin: Array) -> Array:
    """Sums of ``values`` over the intervals between neighbours in each row of ``begin``.

    Args:
        values: Shape ``(..., n)``.
        begin: Shape ``(rows, intervals + 1)``, int32, at most ``n``.

    Returns:
        Shape ``(..., rows, intervals)``.
    """
    sums, index = _from_zero(_library(values).cumsum(values, -1)), begin.reshape(-1)
    # Several times as fast as indexing; here alone the two libraries have different names.
    at = sums.index_select(-1, index) if hasattr(sums, "index_select") else sums.take(index, axis=-1)
    at = at.reshape(*at.shape[:-1], *begin.shape)
    return at[..., 1:] - at[..., :-1]


def _used(counts: Array, width: float | Array, amax: float | Array) -> Array:
    """Number of bins up to that of ``amax``."""
    xp = _library(counts)
    return xp.clip(xp.floor(_like(amax, counts) / _like(width, counts)) + 1, None, counts.shape[-1])


def _without(errors: Array, first: int, used: Array) -> Array:
    """``errors`` of candidates of ``first``, ``first + 1``, … bins, infinite for those of more than ``used``."""
    xp = _library(errors)
    return xp.where(_numbers(first, first + errors.shape[-1], errors) > used[..., None], xp.inf, errors)


def _last_minimum(values: Array) -> Array:
    """Index of the last minimum along the last dimension; 0 where there are NaN.

    Values of order one that differ by 1e-12 differ by rounding only: they count as equal.
    """
    xp = _library(values)
    least = values <= xp.amin(values, -1, keepdims=True) + 1e-12
    return xp.amax(xp.where(least, _numbers(0, values.shape[-1], values), 0.0), -1)


def _capped(edge: Array, counts: Array, width: float | Array, amax: float | Array) -> Array:
    """The upper end of ``edge`` bins, at most ``amax``."""
    xp = _library(counts)
    return xp.asarray(xp.minimum(_wide(edge) * _like(width, counts), _like(amax, counts)), dtype=xp.float32)
