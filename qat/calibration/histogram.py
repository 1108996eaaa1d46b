"""Count the magnitudes of tensors on their device, in the bins of :mod:`qat.core.bins`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import kernels
from ..core.bins import BINS as BINS
from ..core.bins import MIN_EXPONENT as MIN_EXPONENT
from ..core.bins import Bins
from ..core.bins import coarsen as coarsen
from ..core.bins import width_exponent as width_exponent
from ..errors import QATError

# Values counted at a time. On a CPU the intermediate results then stay in the cache, and torch starts no threads, whose
# barriers would cost more than the work; on other devices launches cost more than memory traffic.
_CHUNK_CPU, _CHUNK = 2**15, 2**24

# Of exponents of widths on a device, from MIN_EXPONENT to those of the largest magnitudes, infinity and NaN.
_LOG2_BINS = BINS.bit_length() - 1
_LEVELS = 256 - (126 + _LOG2_BINS + MIN_EXPONENT)
# Values that a kernel looks at together, and most that 32 bits can count.
_TALLIED, _MOST = 2**14, 2**31 - 2**14
_CONSTANTS = MIN_EXPONENT, _LOG2_BINS, _TALLIED


def largest_magnitude(x: Tensor) -> float:
    """``max(abs(x))``; NaN if ``x`` holds one. ``x`` is not empty."""
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high).to(torch.float32))


def in_memory(x: Tensor) -> Tensor:
    """The values of ``x`` in one dimension, in the order in which they lie in memory, which saves a copy (channels_last)."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)


def float_of_bits(bits: int) -> float:
    """The float32 that an int32 holds.

    Example:
        >>> float_of_bits(0x40490FDB)
        3.1415927410125732
    """
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


class _DeviceCounts:
    """Counts on a CUDA device of tensors that the host never looks at: nothing is copied to it, nothing waits.

    One kernel reads a tensor once, and counts at whatever width it finds fitting, in one row of counts a width; rows are moved
    to the width of all when the host wants to know, or before a count could exceed 32 bits. They take 3.4 MiB. With versions of
    Triton that are slow at histograms three kernels read a tensor twice, first for its largest magnitude, without rows.
    All start values are zero, since any other would be copied from the host.

    Args:
        device: Where the tensors are.

    Attributes:
        words: int32, shape ``(1 + sets,)``: the bits of the largest magnitude as a float32, which are ordered like the
            magnitudes (NaN above infinity above all numbers); and the exponent of the bins of each set, less ``MIN_EXPONENT``.
        counts: int64, shape ``(sets, BINS)``; their sum counts.
    """

    def __init__(self, device: torch.device) -> None:
        from ..core import triton_kernels

        self._kernels = triton_kernels
        fast = triton_kernels.FAST_HISTOGRAM
        # Without histograms of blocks, each value is an atomic operation, and those on the same address wait for each other.
        sets = 1 if fast else 16
        self.device = device
        self.words = torch.zeros(1 + sets, dtype=torch.int32, device=device)
        self.counts = torch.zeros(sets, BINS, dtype=torch.int64, device=device)
        self._rows = torch.zeros(_LEVELS, BINS, dtype=torch.int32, device=device) if fast else None
        self._in_rows = 0

    def add(self, x: Tensor) -> None:
        """Count the values of ``x``: without gaps in memory, not empty, on the device."""
        n = x.numel()
        if self._rows is None:
            self._add_one_by_one(x, n)
            return
        if n > _MOST:
            for part in in_memory(x).split(_MOST):
                self.add(part)
            return
        if self._in_rows + n > _MOST:
            self.fold()
        self._in_rows += n
        # Not more programs than run at a time: each has to add what it found to the rows.
        programs, tensors = min(-(-n // _TALLIED), 256), (x, self.words, self._rows)
        kernels.launch(self._kernels.tally_kernel, programs, tensors, (n,), _CONSTANTS, num_warps=32)

    def fold(self) -> None:
        """Bring ``counts`` and ``words`` up to date."""
        if not self._in_rows or self._rows is None:
            return
        self._widen()
        kernels.launch(
            self._kernels.fold_kernel, _LEVELS, (self.words, self._rows, self.counts), (), (_LOG2_BINS,), num_warps=8
        )
        self._in_rows = 0

    def _widen(self) -> None:
        constants = MIN_EXPONENT, _LOG2_BINS
        kernels.launch(self._kernels.widen_kernel, len(self.counts), (self.words, self.counts), (), constants, num_warps=8)

    def _add_one_by_one(self, x: Tensor, n: int) -> None:
        # Enough programs for the largest devices; each has to merge what it found with the others.
        sets, block = len(self.counts), 4096
        programs, constants = min(-(-n // block), 2048), (sets, MIN_EXPONENT, _LOG2_BINS, block)
        kernels.launch(self._kernels.largest_kernel, programs, (x, self.words), (n,), (block,), num_warps=8)
        self._widen()
        kernels.launch(self._kernels.count_kernel, programs, (x, self.words, self.counts), (n,), constants, num_warps=8)


class Histogram:
    """Counts of ``abs(x)`` in at most ``BINS`` bins: between half of them and all are in use.

    What is added on CUDA is counted there without the host's knowledge. The first look at an attribute afterwards fetches the
    largest magnitude, which waits for the device.

    Args:
        name: What error messages call the data.
        device: Where the counts live.

    Attributes:
        counts: Shape ``(BINS,)``, int64.
        exponent: The bin width is ``2 ** exponent``.
        amax: The largest magnitude, exactly.

    Raises:
        QATError: On the look at an attribute, if a NaN or an infinity was added on CUDA.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.tensor([0.0, -1.5, 3.0]))
        >>> histogram.width, histogram.amax, histogram.total
        (0.0009765625, 3.0, 3)
    """

    def __init__(self, name: str = "histogram", *, device: torch.device | None = None) -> None:
        self.name = name
        self._counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._exponent = MIN_EXPONENT
        self._amax = 0.0
        self._pending: _DeviceCounts | None = None

    @property
    def counts(self) -> Tensor:
        self.settle()
        return self._counts

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self.settle()
        self._counts = counts

    @property
    def exponent(self) -> int:
        self.settle()
        return self._exponent

    @property
    def amax(self) -> float:
        self.settle()
        return self._amax

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

    def bins(self) -> Bins:
        """The content, without PyTorch: the counts are copied from the device."""
        return Bins(self.counts.cpu().numpy().copy(), self.exponent, self.amax)

    def cover(self, amax: float) -> None:
        """Widen the bins, if need be, until ``amax`` falls into one."""
        self.settle()
        # All in the first bin, whatever its width.
        only_zeros = self._amax == 0
        self._amax = max(self._amax, amax)
        exponent = width_exponent(self._amax)
        if not only_zeros:
            self._counts = coarsen(self._counts, exponent - self._exponent)
        self._exponent = exponent

    def add(self, x: Tensor) -> None:
        """Count the values of ``x``.

        Args:
            x: Any shape and floating dtype; counted as float32. An empty tensor changes nothing.

        Raises:
            QATError: If ``x`` holds a NaN or an infinity. Nothing is counted then. On CUDA it is raised later: by
                :meth:`settle`, or by the look at an attribute.
        """
        if x.numel() == 0:
            return
        if kernels.runs_triton(x):
            if self._pending is not None and self._pending.device != x.device:
                self.settle()
            if self._pending is None:
                self._pending = _DeviceCounts(x.device)
            self._pending.add(x if kernels.is_dense(x) else in_memory(x.detach()))
            return
        x = x.detach()
        amax = largest_magnitude(x)
        if not math.isfinite(amax):
            raise self._refusal()
        self.cover(amax)
        counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
        for chunk in in_memory(x).split(_CHUNK_CPU if x.device.type == "cpu" else _CHUNK):
            # Not torch.histc: its counts are float32, and on CUDA its rounding may move a value to the next bin.
            bins = chunk.to(torch.float32).abs().mul_(math.ldexp(1.0, -self._exponent)).to(torch.int32)
            counts += torch.bincount(bins, minlength=BINS)
        self._add_counts(counts)

    def merge(self, other: Histogram) -> None:
        """Add the content of ``other``, which is left as it is."""
        self.cover(other.amax)
        self._add_counts(coarsen(other.counts, self.exponent - other.exponent))

    def status(self) -> Tensor | None:
        """What :meth:`settle` has to know: int32, shape ``(2,)``, on the device; ``None`` if there is nothing to settle."""
        if self._pending is None:
            return None
        self._pending.fold()
        return self._pending.words[:2]

    def settle(self, status: Sequence[int] | None = None) -> None:
        """Take over what was counted on a device.

        Args:
            status: The values of :meth:`status`, fetched together with those of other histograms; ``None`` fetches them.

        Raises:
            QATError: If a NaN or an infinity was among the values. What was counted on the device is not taken over then.
        """
        if self._pending is None:
            return
        if status is None:
            self._pending.fold()
            status = self._pending.words[:2].tolist()
        bits, level = status
        amax = float_of_bits(bits)
        if not math.isfinite(amax):
            raise self._refusal()
        counts, self._pending = self._pending.counts.sum(dim=0), None
        self.cover(amax)
        self._add_counts(coarsen(counts, self._exponent - (level + MIN_EXPONENT)))

    def _add_counts(self, counts: Tensor) -> None:
        # Out of place: data(model) may run in inference mode, whose tensors cannot be changed outside of it.
        self._counts = self._counts + counts.to(self._counts.device)

    def _refusal(self) -> QATError:
        return QATError(
            f"{self.name}: NaN or Inf seen. Check what the model is fed and its weights; a model in float16 may overflow"
        )
