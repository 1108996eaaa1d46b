"""Histograms of magnitudes that merge without error, without PyTorch.

Bins are half-open, ``[j * width, (j + 1) * width)``, and every width is a power of two. Dividing by a power of two is exact
and ``floor(floor(x / w) / 2) == floor(x / 2w)``, so doubling the width by adding up pairs of bins gives what counting at that
width would have given. The content therefore depends on the set of values alone: not on the order of the batches, nor on how
they were spread over the ranks of a distributed run.

:class:`qat.calibration.Histogram` counts tensors, on their device, in the same bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import QATError

BINS = 4096
# Widths below 2 ** -100 would need factors near the end of float32. Ranges that small end at the smallest scale anyway.
MIN_EXPONENT = -100


def width_exponent(amax: float) -> int:
    """The smallest ``k`` with ``amax < BINS * 2 ** k``, at least ``MIN_EXPONENT``.

    Example:
        >>> width_exponent(4095.0), width_exponent(4096.0)
        (0, 1)
    """
    if amax == 0:
        return MIN_EXPONENT
    return max(math.frexp(amax)[1] - BINS.bit_length() + 1, MIN_EXPONENT)


def coarsen(counts: Any, shift: int) -> Any:
    """``counts`` of shape ``(BINS,)``, an array or a tensor, for bins ``2 ** shift`` times as wide.

    Example:
        >>> coarsen(np.ones(BINS, dtype=np.int64), 11)[:3].tolist()
        [2048, 2048, 0]
    """
    if shift == 0:
        return counts
    merged = counts.reshape(-1, 2 ** min(shift, BINS.bit_length() - 1)).sum(1)
    # Not allocated by name: that is what arrays and tensors do differently.
    coarse = counts * 0
    coarse[: len(merged)] = merged
    return coarse


@dataclass(frozen=True)
class Bins:
    """Counts of ``abs(x)`` in at most ``BINS`` bins: between half of them and all are in use.

    Attributes:
        counts: Shape ``(BINS,)``, int64.
        exponent: The bin width is ``2 ** exponent``.
        amax: The largest magnitude, exactly.

    Example:
        >>> bins = Bins.count([0.0, -1.5]).merged(Bins.count([3.0]))
        >>> bins.width, bins.amax, bins.total
        (0.0009765625, 3.0, 3)
    """

    counts: NDArray[np.int64]
    exponent: int
    amax: float

    @classmethod
    def count(cls, values: ArrayLike) -> Bins:
        """Count values, as float32.

        Raises:
            QATError: If there is a NaN or an infinity.
        """
        x = np.abs(np.asarray(values, np.float32)).reshape(-1)
        amax = float(x.max(initial=0.0))
        if not math.isfinite(amax):
            raise QATError("NaN or Inf seen. Check what the model is fed and its weights; a model in float16 may overflow")
        exponent = width_exponent(amax)
        places = (x * np.float32(math.ldexp(1.0, -exponent))).astype(np.int64)
        return cls(np.bincount(places, minlength=BINS), exponent, amax)

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def used(self) -> NDArray[np.int64]:
        """The counts up to the bin that holds ``amax``."""
        return self.counts[: int(self.amax / self.width) + 1]

    def merged(self, other: Bins) -> Bins:
        """The counts of the values of both."""
        exponent = max(self.exponent, other.exponent)
        counts = sum(coarsen(bins.counts, exponent - bins.exponent) for bins in (self, other))
        return Bins(counts, exponent, max(self.amax, other.amax))
