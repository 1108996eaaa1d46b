"""Counting the magnitudes of tensors as Triton kernels. Imported where there is a CUDA tensor only: needs triton."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# tl.histogram counts by atomics in shared memory from 3.8 on. Before, it takes a number of instructions in proportion to the
# number of bins for each value, and spills registers.
FAST_HISTOGRAM = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


@triton.jit
def _magnitude_bits(x_ptr, at, size):  # type: ignore[no-untyped-def]
    """Bits of ``abs(x)`` as float32, ordered like magnitudes: infinity above all numbers, then NaN. 0 beyond ``size``."""
    return tl.load(x_ptr + at, at < size, other=0.0).to(tl.float32).to(tl.int32, bitcast=True) & 2147483647


@triton.jit
def _level(bits, MIN_EXPONENT: tl.constexpr, LOG2_BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exponent, less ``MIN_EXPONENT``, of the narrowest bins that hold a magnitude, given its bits."""
    # 126 and not 127: the bins end above the magnitude. Zero and subnormal numbers have the least stored exponent.
    return tl.maximum((bits >> 23) - (126 + LOG2_BINS + MIN_EXPONENT), 0)


@triton.jit
def _bins(bits, level, MIN_EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``floor(magnitude / width)``; 0 for infinity and NaN, which end in an error and have no bin."""
    # 2 ** -exponent, put together from its bits. Subnormal magnitudes fall into the first bin, flushed to zero or not.
    factor = ((127 - MIN_EXPONENT - level) << 23).to(tl.float32, bitcast=True)
    bits = tl.where(bits < 2139095040, bits, 0)
    return (bits.to(tl.float32, bitcast=True) * factor).to(tl.int32)


@triton.jit
def _raise_to(words_ptr, bits):  # type: ignore[no-untyped-def]
    # The word only rises, so that an old value costs an atomic operation at worst; most programs need none.
    if bits > tl.load(words_ptr):
        tl.atomic_max(words_ptr, bits, sem="relaxed")


@triton.jit
def _add_counts(levels_ptr, level, counts, total, LOG2_BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add ``counts`` of all bins but the first, and to that what is left of ``total``, to the row of ``level``."""
    bins = tl.arange(0, 1 << LOG2_BINS)
    counts = tl.where(bins == 0, total - tl.sum(counts, 0), counts)
    tl.atomic_add(levels_ptr + level * (1 << LOG2_BINS) + bins, counts, counts != 0, sem="relaxed")


@triton.jit
def tally_kernel(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, levels_ptr, size, MIN_EXPONENT: tl.constexpr, LOG2_BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count ``floor(abs(x) / width)`` at the width that each program's own magnitudes need, one row of counts a width."""
    first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    # Of all that came before: then hardly any program meets a second width.
    level = _level(tl.load(words_ptr), MIN_EXPONENT, LOG2_BINS)
    largest, total = 0, 0
    counts = tl.zeros((1 << LOG2_BINS,), tl.int32)
    for start in range(first, size, step):
        bits = _magnitude_bits(x_ptr, start + tl.arange(0, BLOCK), size)
        largest = tl.maximum(largest, tl.max(bits, 0))
        wanted = _level(largest, MIN_EXPONENT, LOG2_BINS)
        if wanted > level:
            _add_counts(levels_ptr, level, counts, total, LOG2_BINS)
            counts = tl.zeros((1 << LOG2_BINS,), tl.int32)
            level, total = wanted, 0
        bins = _bins(bits, level, MIN_EXPONENT)
        # Half of what leaves a ReLU are zeros: too many for one address.
        counts += tl.histogram(bins, 1 << LOG2_BINS, bins != 0)
        total += tl.minimum(size - start, BLOCK).to(tl.int32)
    _add_counts(levels_ptr, level, counts, total, LOG2_BINS)
    _raise_to(words_ptr, largest)


@triton.jit
def fold_kernel(words_ptr, levels_ptr, counts_ptr, LOG2_BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of :func:`tally_kernel` a program: move it to the bins in use, which are as wide or wider."""
    bins = tl.arange(0, 1 << LOG2_BINS)
    at = levels_ptr + tl.program_id(0) * (1 << LOG2_BINS) + bins
    counts = tl.load(at)
    if tl.max(counts, 0) > 0:
        shift = tl.minimum(tl.load(words_ptr + 1) - tl.program_id(0), LOG2_BINS)
        tl.atomic_add(counts_ptr + (bins >> shift), counts.to(tl.int64), counts != 0, sem="relaxed")
        tl.store(at, tl.zeros_like(counts))


@triton.jit
def largest_kernel(x_ptr, words_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raise the first word to the bits of the largest magnitude."""
    first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, size, step):
        largest = tl.maximum(largest, _magnitude_bits(x_ptr, start + tl.arange(0, BLOCK), size))
    _raise_to(words_ptr, tl.max(largest, 0))


@triton.jit
def widen_kernel(words_ptr, counts_ptr, MIN_EXPONENT: tl.constexpr, LOG2_BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One set of counts a program: widen its bins until the largest magnitude falls into one."""
    BINS: tl.constexpr = 1 << LOG2_BINS
    row = tl.program_id(0)
    level = tl.load(words_ptr + 1 + row)
    wanted = _level(tl.load(words_ptr), MIN_EXPONENT, LOG2_BINS)
    if wanted > level:
        at = counts_ptr + row * BINS + tl.arange(0, BINS)
        counts = tl.load(at)
        for _ in range(tl.minimum(wanted - level, LOG2_BINS)):
            pairs = tl.sum(tl.reshape(counts, (BINS // 2, 2)), 1)
            counts = tl.reshape(tl.permute(tl.join(pairs, tl.zeros_like(pairs)), (1, 0)), (BINS,))
        # All threads must have read before one writes.
        tl.debug_barrier()
        tl.store(at, counts)
        tl.store(words_ptr + 1 + row, wanted)


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, counts_ptr, size,
    SETS: tl.constexpr, MIN_EXPONENT: tl.constexpr, LOG2_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count ``floor(abs(x) / width)`` by an atomic addition for each value that is not in the first bin."""
    row = tl.program_id(0) % SETS
    counts_ptr += row * (1 << LOG2_BINS)
    level = tl.load(words_ptr + 1 + row)
    first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    in_first_bin = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, size, step):
        at = start + tl.arange(0, BLOCK)
        bins = _bins(_magnitude_bits(x_ptr, at, size), level, MIN_EXPONENT)
        # Half of what leaves a ReLU are zeros: too many for one address.
        in_first_bin += ((bins == 0) & (at < size)).to(tl.int32)
        tl.atomic_add(counts_ptr + bins, tl.full((BLOCK,), 1, tl.int64), bins != 0, sem="relaxed")
    tl.atomic_add(counts_ptr, tl.sum(in_first_bin, 0).to(tl.int64), sem="relaxed")
