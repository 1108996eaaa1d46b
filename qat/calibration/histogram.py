"""Histograms of magnitudes that merge without error.

Bins are half-open, ``[j * width, (j + 1) * width)``, and every width is a power of two. Dividing by a power of two is exact
and ``floor(floor(x / w) / 2) == floor(x / 2w)``, so doubling the width by adding up pairs of bins gives what counting at that
width would have given. The content therefore depends on the set of values alone: not on the order of the batches, nor on how
they were spread over the ranks of a distributed run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import QATError

BINS = 4096
# Widths below 2 ** -100 would need factors near the end of float32. Ranges that small end at the smallest scale anyway.
MIN_EXPONENT = -100
# Values counted at a time. On a CPU the intermediate results then stay in the cache, and torch starts no threads, whose
# barriers would cost more than the work; on other devices launches cost more than memory traffic.
_CHUNK_CPU, _CHUNK = 2**15, 2**24


def width_exponent(amax: float) -> int:
    """The smallest ``k`` with ``amax < BINS * 2 ** k``, at least ``MIN_EXPONENT``.

    Example:
        >>> width_exponent(4095.0), width_exponent(4096.0)
        (0, 1)
    """
    if amax == 0:
        return MIN_EXPONENT
    return max(math.frexp(amax)[1] - BINS.bit_length() + 1, MIN_EXPONENT)


def largest_magnitude(x: Tensor) -> float:
    """``max(abs(x))``; NaN if ``x`` holds one. ``x`` is not empty."""
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high).to(torch.float32))


def coarsen(counts: Tensor, shift: int) -> Tensor:
    """``counts`` of shape ``(BINS,)`` for bins ``2 ** shift`` times as wide.

    Example:
        >>> coarsen(torch.ones(BINS, dtype=torch.int64), 11)[:3]
        tensor([2048, 2048,    0])
    """
    if shift == 0:
        return counts
    merged = counts.reshape(-1, 2 ** min(shift, BINS.bit_length() - 1)).sum(dim=1)
    return torch.nn.functional.pad(merged, (0, BINS - len(merged)))


class Histogram:
    """Counts of ``abs(x)`` in at most ``BINS`` bins: between half of them and all are in use.

    Args:
        name: What error messages call the data.
        device: Where the counts live.

    Attributes:
        counts: Shape ``(BINS,)``, int64.
        exponent: The bin width is ``2 ** exponent``.
        amax: The largest magnitude, exactly.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.tensor([0.0, -1.5, 3.0]))
        >>> histogram.width, histogram.amax, histogram.total
        (0.0009765625, 3.0, 3)
    """

    def __init__(self, name: str = "histogram", *, device: torch.device | None = None) -> None:
        self.name = name
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.exponent = MIN_EXPONENT
        self.amax = 0.0

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """Number of values. Reads the counts: synchronises on CUDA."""
        return int(self.counts.sum())

    @property
    def used(self) -> Tensor:
        """The counts up to the bin that holds ``amax``."""
        return self.counts[: int(self.amax / self.width) + 1]

    def cover(self, amax: float) -> None:
        """Widen the bins, if need be, until ``amax`` falls into one."""
        self.amax = max(self.amax, amax)
        exponent = width_exponent(self.amax)
        self.counts = coarsen(self.counts, exponent - self.exponent)
        self.exponent = exponent

    def add(self, x: Tensor) -> None:
        """Count the values of ``x``.

        Args:
            x: Any shape and floating dtype; counted as float32. An empty tensor changes nothing.

        Raises:
            QATError: If ``x`` holds a NaN or an infinity. Nothing is counted then.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        amax = largest_magnitude(x)
        if not math.isfinite(amax):
            raise QATError(
                f"{self.name}: NaN or Inf seen. Check what the model is fed and its weights; a model in float16 may overflow"
            )
        self.cover(amax)
        # The order of values does not matter: reading them as they lie in memory saves a copy (channels_last).
        flat = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
        counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
        for chunk in flat.split(_CHUNK_CPU if x.device.type == "cpu" else _CHUNK):
            # Not torch.histc: its counts are float32, and on CUDA its rounding may move a value to the next bin.
            bins = chunk.to(torch.float32).abs().mul_(math.ldexp(1.0, -self.exponent)).to(torch.int32)
            counts += torch.bincount(bins, minlength=BINS)
        # Out of place: data(model) may run in inference mode, whose tensors cannot be changed outside of it.
        self.counts = self.counts + counts.to(self.counts.device)

    def merge(self, other: Histogram) -> None:
        """Add the content of ``other``, which is left as it is."""
        self.cover(other.amax)
        self.counts = self.counts + coarsen(other.counts, self.exponent - other.exponent).to(self.counts.device)
