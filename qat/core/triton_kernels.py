"""The formulas of :mod:`qat.core.numerics` as Triton kernels. Imported where there is a CUDA tensor only: needs triton.

All kernels run over the elements in the order in which they lie in memory, whatever the layout of the tensor: the channel of
the element at offset ``i`` is ``i // period % channels``, ``period`` being the stride of the channel dimension.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _code(x, scale, QMIN: tl.constexpr, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``round(x / scale)``, half to even, right within the range and beyond it outside; zeros have the signs of torch.round."""
    code = _to_integer(_quotient(x, scale, QMIN, QMAX))
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return ((code.to(tl.int32, bitcast=True) & 2147483647) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _quotient(x, scale, QMIN: tl.constexpr, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x / scale``, correctly rounded within the range, and beyond it outside.

    Without a division for each element: by IEEE's rules that is a subroutine where ``x`` is zero, as half of what leaves a ReLU
    is. A product with the reciprocal is right up to two units in the last place, a first remainder makes it right up to one,
    and from there on the second gives the correctly rounded quotient (Markstein, IBM J. Res. Dev. 34(1), 1990).
    """
    inverse = tl.div_rn(tl.zeros(scale.shape, tl.float32) + 1.0, scale)
    # Infinities have no remainder.
    low = tl.maximum(scale * (QMIN - 1.0), tl.full(scale.shape, -3.4028234663852886e38, tl.float32))
    high = tl.minimum(scale * (QMAX + 1.0), tl.full(scale.shape, 3.4028234663852886e38, tl.float32))
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
    about = x * inverse
    about = tl.fma(tl.fma(-about, scale, x), inverse, about)
    return tl.fma(tl.fma(-about, scale, x), inverse, about)


@triton.jit
def _clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of NaN, NaN."""
    at_least = tl.maximum(x, tl.full(x.shape, LOW, tl.float32), propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(at_least, tl.full(x.shape, HIGH, tl.float32), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_integer(x):  # type: ignore[no-untyped-def]
    """``x`` rounded half to even, for small ``x``: at 1.5 * 2**23 the unit in the last place of a float32 is 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale(range_ptr, SCALE_MIN: tl.constexpr, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``amax_to_scale`` of ranges, or the scales that were given, where ``SCALE_MIN`` is 0."""
    scale = tl.load(range_ptr)
    if SCALE_MIN > 0:
        scale = tl.div_rn(tl.abs(scale), tl.zeros(scale.shape, tl.float32) + QMAX)
        scale = tl.maximum(scale, tl.zeros(scale.shape, tl.float32) + SCALE_MIN, propagate_nan=tl.PropagateNan.ALL)
    return scale


@triton.jit
def _words(block, size, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block, as rows of 32: its start, the offsets of its elements from there, and which there are."""
    start = block.to(tl.int64) * (WORDS * 32)
    # From the start on in 32 bits: arithmetic in 64 takes twice as long.
    at = tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return start, at, at < tl.minimum(size - start, WORDS * 32).to(tl.int32)


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr, range_ptr, y_ptr, mask_ptr, size, period, channels,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, PER_CHANNEL: tl.constexpr, MASK: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """``y = clamp(round(x / scale)) * scale``; one bit an element into the words of ``mask``: whether it was in the range."""
    _quantize_block(
        tl.program_id(0), x_ptr, range_ptr, y_ptr, mask_ptr, size, period, channels,
        QMIN, QMAX, SCALE_MIN, PER_CHANNEL, MASK, WORDS,
    )  # fmt: skip


@triton.jit
def _quantize_block(  # type: ignore[no-untyped-def]
    block, x_ptr, range_ptr, y_ptr, mask_ptr, size, period, channels,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, PER_CHANNEL: tl.constexpr, MASK: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    start, at, valid = _words(block, size, WORDS)
    x = tl.load(x_ptr + start + at, valid, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        # The channels of what lies beyond the end exist, too.
        scale = _scale(range_ptr + ((start + at) // period) % channels, SCALE_MIN, QMAX)
    else:
        # One element in a block of its own, since div_rn takes blocks.
        scale = _scale(range_ptr + tl.arange(0, 1)[:, None], SCALE_MIN, QMAX)
    code = _code(x, scale, QMIN, QMAX)
    clamped = _clamp(code, QMIN * 1.0, QMAX * 1.0)
    tl.store(y_ptr + start + at, (clamped * scale).to(y_ptr.dtype.element_ty), valid)
    if MASK:
        # Of NaN, false.
        words = start // 32 + tl.arange(0, WORDS)
        tl.store(mask_ptr + words, _pack(code == clamped), words * 32 < size)


@triton.jit
def _quantized(x_ptr, range_ptr, at, valid, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of ``x`` fake-quantized with one range, rounded to its type; and which elements were in the range."""
    x = tl.load(x_ptr + at, valid, other=0.0)
    scale = _scale(range_ptr + tl.arange(0, 1)[:, None], SCALE_MIN, QMAX)
    code = _code(x.to(tl.float32), scale, QMIN, QMAX)
    clamped = _clamp(code, QMIN * 1.0, QMAX * 1.0)
    return (clamped * scale).to(x.dtype).to(tl.float32), code == clamped


@triton.jit
def _pack(inside):  # type: ignore[no-untyped-def]
    """The words of a mask."""
    return tl.sum(inside.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    a_ptr, a_range_ptr, b_ptr, b_range_ptr, y_ptr, a_mask_ptr, b_mask_ptr, size,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``y = q(a) + q(b)``, or ``q(a) + b`` without ``B``. To be launched without fused multiply-add: ``q`` is rounded first."""
    start, at, valid = _words(tl.program_id(0), size, WORDS)
    a, a_inside = _quantized(a_ptr + start, a_range_ptr, at, valid, QMIN, QMAX, SCALE_MIN)
    words = start // 32 + tl.arange(0, WORDS)
    if B:
        b, b_inside = _quantized(b_ptr + start, b_range_ptr, at, valid, QMIN, QMAX, SCALE_MIN)
        if MASK:
            tl.store(b_mask_ptr + words, _pack(b_inside), words * 32 < size)
    else:
        b = tl.load(b_ptr + start + at, valid, other=0.0).to(tl.float32)
    if MASK:
        tl.store(a_mask_ptr + words, _pack(a_inside), words * 32 < size)
    tl.store(y_ptr + start + at, (a + b).to(y_ptr.dtype.element_ty), valid)


@triton.jit
def add_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, a_mask_ptr, b_mask_ptr, a_out_ptr, b_out_ptr, size, WORDS: tl.constexpr
):
    """The gradient by both masks: one read, two writes."""
    start, at, valid = _words(tl.program_id(0), size, WORDS)
    words = start // 32 + tl.arange(0, WORDS)
    grad = tl.load(grad_ptr + start + at, valid, other=0.0)
    a_bits = tl.load(a_mask_ptr + words, words * 32 < size, other=0)[:, None] >> tl.arange(0, 32)[None, :]
    b_bits = tl.load(b_mask_ptr + words, words * 32 < size, other=0)[:, None] >> tl.arange(0, 32)[None, :]
    tl.store(a_out_ptr + start + at, tl.where((a_bits & 1) != 0, grad, 0.0).to(a_out_ptr.dtype.element_ty), valid)
    tl.store(b_out_ptr + start + at, tl.where((b_bits & 1) != 0, grad, 0.0).to(b_out_ptr.dtype.element_ty), valid)


@triton.jit
def clip_kernel(grad_ptr, mask_ptr, out_ptr, size, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``grad`` where the bit of ``mask`` is set, else 0."""
    start, at, valid = _words(tl.program_id(0), size, WORDS)
    words = start // 32 + tl.arange(0, WORDS)
    bits = tl.load(mask_ptr + words, words * 32 < size, other=0)[:, None] >> tl.arange(0, 32)[None, :]
    grad = tl.load(grad_ptr + start + at, valid, other=0.0)
    tl.store(out_ptr + start + at, tl.where((bits & 1) != 0, grad, 0.0).to(out_ptr.dtype.element_ty), valid)


@triton.jit
def learned_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, range_ptr, out_ptr, sums_ptr, size,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of ``x``, and of one scale: the sum of a block each, which ``range_gradient_kernel`` adds up in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = _scale(range_ptr + tl.arange(0, 1), SCALE_MIN, QMAX)
    products = _learned_block(grad_ptr, x_ptr, out_ptr, at, at < size, scale, QMIN, QMAX)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(products, 0))


@triton.jit
def _learned_block(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, out_ptr, at, valid, scale, QMIN: tl.constexpr, QMAX: tl.constexpr
):
    """Store the gradient of a block of ``x``; what its elements add to that of the scale (LSQ, equation 3)."""
    x = tl.load(x_ptr + at, valid, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, valid, other=0.0)
    ratio = _quotient(x, scale, QMIN, QMAX)
    code = _to_integer(ratio)
    clamped = _clamp(code, QMIN * 1.0, QMAX * 1.0)
    inside = code == clamped
    tl.store(out_ptr + at, tl.where(inside, grad, 0.0).to(out_ptr.dtype.element_ty), valid)
    slope = clamped - tl.where(inside, ratio, 0.0)
    return tl.where(valid, grad.to(tl.float32) * slope, 0.0)


@triton.jit
def range_gradient_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, range_ptr, out_ptr, count, size, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of a range of ``size`` elements from its ``count`` sums, by one program, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, at < count, other=0.0)
    one = tl.arange(0, 1)
    tl.store(
        out_ptr + one, _range_gradient(tl.sum(total, 0) + tl.zeros((1,), tl.float32), range_ptr + one, size, QMAX, SCALE_MIN)
    )


@triton.jit
def _range_gradient(total, range_ptr, size, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """By LSQ's factor, section 2.2; of a range, where ``SCALE_MIN`` is not 0, as ``numerics.learned_scale`` has it."""
    # In float32: a product of integers might not fit.
    total = total / tl.sqrt((tl.zeros(total.shape, tl.float32) + size) * QMAX)
    if SCALE_MIN > 0:
        amax = tl.load(range_ptr)
        moves = (tl.abs(amax) >= QMAX * SCALE_MIN) | (total < 0)
        total = tl.where(moves, tl.where(amax < 0, -total, total) * QMAX, 0.0)
    return total


@triton.jit
def learned_rows_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, range_ptr, out_ptr, range_out_ptr, size,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one channel a program, and of its range."""
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    scale = _scale(range_ptr + one, SCALE_MIN, QMAX)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        products += _learned_block(grad_ptr, x_ptr, out_ptr, row * size + at, at < size, scale, QMIN, QMAX)
    total = tl.sum(products, 0) + tl.zeros((1,), tl.float32)
    tl.store(range_out_ptr + one, _range_gradient(total, range_ptr + one, size, QMAX, SCALE_MIN))


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, range_ptr, y_ptr, size, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr
):
    """One channel a program, quantized with its range."""
    row = tl.program_id(0).to(tl.int64)
    _round_row(row, x_ptr, y_ptr, size, _scale(range_ptr + row + tl.arange(0, 1), SCALE_MIN, QMAX), QMIN, QMAX, BLOCK)


@triton.jit
def weight_kernel(  # type: ignore[no-untyped-def]
    w_ptr, y_ptr, size, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr
):
    """One output channel a program: its largest magnitude, and the channel quantized with the scale that follows from it."""
    _quantize_row(tl.program_id(0), w_ptr, y_ptr, size, QMIN, QMAX, SCALE_MIN, BLOCK)


@triton.jit
def _quantize_row(  # type: ignore[no-untyped-def]
    index, w_ptr, y_ptr, size, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr
):
    row = index.to(tl.int64) * size
    amax = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row + at, at < size, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(w), propagate_nan=tl.PropagateNan.ALL)
    # Divided in a block, since that is what div_rn takes.
    top = tl.reduce(amax, 0, _maximum) + tl.zeros((1,), tl.float32)
    least = tl.zeros((1,), tl.float32) + SCALE_MIN
    scale = tl.maximum(tl.div_rn(top, tl.zeros((1,), tl.float32) + QMAX), least, propagate_nan=tl.PropagateNan.ALL)
    _round_row(index.to(tl.int64), w_ptr, y_ptr, size, scale, QMIN, QMAX, BLOCK)


@triton.jit
def _round_row(row, w_ptr, y_ptr, size, scale, QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row * size + at, at < size, other=0.0).to(tl.float32)
        code = _code(w, scale, QMIN, QMAX)
        clamped = _clamp(code, QMIN * 1.0, QMAX * 1.0)
        tl.store(y_ptr + row * size + at, (clamped * scale).to(y_ptr.dtype.element_ty), at < size)


@triton.jit
def layer_kernel(  # type: ignore[no-untyped-def]
    x_ptr, range_ptr, y_ptr, mask_ptr, w_ptr, v_ptr, size, rows, row_size,
    QMIN: tl.constexpr, QMAX: tl.constexpr, W_QMIN: tl.constexpr, W_QMAX: tl.constexpr, SCALE_MIN: tl.constexpr,
    MASK: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both operands of a layer: :func:`weight_kernel` by the first ``rows`` programs, :func:`quantize_kernel` by the others."""
    program = tl.program_id(0)
    if program < rows:
        _quantize_row(program, w_ptr, v_ptr, row_size, W_QMIN, W_QMAX, SCALE_MIN, BLOCK)
    else:
        _quantize_block(
            program - rows, x_ptr, range_ptr, y_ptr, mask_ptr, size, 1, 1, QMIN, QMAX, SCALE_MIN, False, MASK, WORDS
        )


@triton.jit
def _maximum(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
