"""Fake quantization by the fastest implementation there is: Triton kernels for eager CUDA, else :mod:`qat.core.numerics`.

The results are the same, bit by bit; the sums in the gradient of a scale are formed in another order. Per element of 2 bytes
the kernels read 2 and write 2 forward (and one bit), and read 2 (and that bit) and write 2 backward; the input is not saved
unless the scale is learned.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import numerics
from .launching import launch
from .numerics import INT8, SCALE_MIN, Format, check_scale

_BLOCK = 4096
# Bits in a word of a mask, and words of a block.
_WORD = 32
_WORDS = _BLOCK // _WORD
_SMALLEST_BLOCK = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake_quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, fmt: Format = INT8) -> Tensor:
    """:func:`qat.core.numerics.fake_quantize`, with the same arguments, result and errors."""
    if not runs_triton(x, scale) or not _learns(x, scale, axis):
        return numerics.fake_quantize(x, scale, axis=axis, fmt=fmt)
    check_scale(x, scale, axis)
    return _run(x, scale, axis, fmt, 0.0)


def fake_quantize_range(
    x: Tensor, amax: Tensor, *, axis: int | None = None, fmt: Format = INT8, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`fake_quantize` with the scale of the range ``amax``; a kernel computes it, too.

    Args:
        x: As there.
        amax: float32, its sign has no meaning. Scalar, or shape ``(x.shape[axis],)``. If it is trained, with the gradient of
            :func:`~qat.core.numerics.learned_scale`.
        axis: Channel dimension of a per-channel range.
        fmt: Number format.
        dtype: Of the result, if not that of ``x``. Without a gradient then.
    """
    if torch.compiler.is_compiling():
        y = numerics.traced_fake_quantize(x, amax, axis, fmt)
        return y if dtype is None else y.to(dtype)
    if not runs_triton(x, amax) or not _learns(x, amax, axis):
        scale = numerics.learned_scale(amax, fmt) if amax.requires_grad else numerics.amax_to_scale(amax, fmt)
        y = fake_quantize(x, scale, axis=axis, fmt=fmt)
        return y if dtype is None else y.to(dtype)
    check_scale(x, amax, axis)
    if dtype is not None:
        return _forward(x, amax, axis, fmt, SCALE_MIN, dtype, with_mask=False)[0]
    return _run(x, amax, axis, fmt, SCALE_MIN)


def _learns(x: Tensor, range_: Tensor, axis: int | None) -> bool:
    """Whether there is a kernel for the gradient of the range, if it needs one."""
    if axis is None or not range_.requires_grad or not torch.is_grad_enabled():
        return True
    return has_rows(x) and axis % x.ndim == 0


@functools.cache
def _triton() -> Any:
    """The module of the kernels; ``None`` without Triton."""
    return importlib.import_module(".triton_kernels", __package__) if importlib.util.find_spec("triton") is not None else None


def runs_triton(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: floating, not empty, on one CUDA device, eager, and Triton is installed."""
    x = tensors[0]
    if not x.is_cuda or torch.compiler.is_compiling() or is_transformed():
        return False
    device = x.device
    for other in tensors[1:]:
        if other.device != device:
            return False
    return x.dtype in _DTYPES and x.numel() > 0 and _triton() is not None


def is_transformed() -> bool:
    """Whether torch.func transforms are at work (vmap, grad): the composite lets them see every operator."""
    # What torch.autograd.Function.apply asks as well; torch has no public name for it.
    return bool(torch._C._are_functorch_transforms_active())


def fake_quantize_weight(weight: Tensor, scale: Callable[[], Tensor], *, axis: int | None = None, fmt: Format = INT8) -> Tensor:
    """:func:`fake_quantize` of a weight whose range is its own largest magnitude, found and applied in one launch.

    No finite weight then lies outside of its range, so the gradient passes as it is.

    Args:
        weight: float32, float16 or bfloat16.
        scale: Computes the scale of ``weight`` along ``axis``, where there is no kernel for it.
        axis: Channel dimension; the kernel takes dimension 0 of weights whose channels lie one after the other in memory.
        fmt: Number format.

    Returns:
        Same shape and dtype as ``weight``.
    """
    if not quantizes_rows(weight, axis):
        return fake_quantize(weight, scale(), axis=axis, fmt=fmt)
    return _FakeQuantizeWeight.apply(weight, fmt)


def quantizes_rows(weight: Tensor, axis: int | None) -> bool:
    """Whether a kernel finds and applies the ranges of ``weight`` along ``axis``."""
    return axis == 0 and runs_triton(weight) and has_rows(weight)


def has_rows(x: Tensor) -> bool:
    """Whether the elements of each index of dimension 0 lie together in memory, without gaps."""
    if x.ndim < 2 or x.numel() == 0:
        return False
    if is_dense(x):
        return True
    if x.shape[0] > 1 and x.stride(0) != x.numel() // x.shape[0]:
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _run(x: Tensor, range_: Tensor, axis: int | None, fmt: Format, scale_min: float) -> Tensor:
    """Quantize with a range, or with a scale where ``scale_min`` is 0."""
    if torch.is_grad_enabled() and (x.requires_grad or range_.requires_grad):
        return _FakeQuantize.apply(x, range_, axis, fmt, scale_min)
    return _forward(x, range_, axis, fmt, scale_min, x.dtype, with_mask=False)[0]


def fake_quantize_add(a: Tensor, a_amax: Tensor, b: Tensor, b_amax: Tensor | None, *, fmt: Format = INT8) -> Tensor | None:
    """``fake_quantize_range(a, a_amax) + fake_quantize_range(b, b_amax)`` in one pass, which saves three reads and two writes.

    Args:
        a: Summand.
        a_amax: Its range, scalar.
        b: The other summand; of the same shape, dtype and layout.
        b_amax: Its range; ``None`` for a summand that stays as it is.
        fmt: Number format of both.

    Returns:
        The sum; ``None`` where there is no kernel for these tensors.
    """
    ranges = (a_amax,) if b_amax is None else (a_amax, b_amax)
    if not runs_triton(a, b, *ranges) or a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return None
    if not is_dense(a) or any(amax.requires_grad or amax.numel() != 1 for amax in ranges):
        return None
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        sum_: Tensor = _FakeQuantizeAdd.apply(a, b, a_amax, b_amax, fmt)
        return sum_
    return _add(a, b, a_amax, b_amax, fmt, with_masks=False)[0]


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie in memory without gaps or overlaps, in one of torch's usual orders."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _add(
    a: Tensor, b: Tensor, a_amax: Tensor, b_amax: Tensor | None, fmt: Format, *, with_masks: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y, size = torch.empty_like(a), a.numel()
    a_mask = _empty_mask(a) if with_masks else None
    b_mask = _empty_mask(a) if with_masks and b_amax is not None else None
    masks = y if a_mask is None else a_mask, y if b_mask is None else b_mask
    launch(
        _triton().add_kernel,
        _blocks(size),
        (a, a_amax, b, a_amax if b_amax is None else b_amax, y, *masks),
        (size,),
        (fmt.qmin, fmt.qmax, SCALE_MIN, b_amax is not None, with_masks, _WORDS),
    )
    return y, a_mask, b_mask


def forward(x: Tensor, amax: Tensor, fmt: Format, dtype: torch.dtype, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """For autograd functions: :func:`fake_quantize_range` of one range, in ``dtype``, and what :func:`clip` needs."""
    return _forward(x, amax, None, fmt, SCALE_MIN, dtype, with_mask=with_mask)


def clip(grad: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` in :func:`forward`, from that of its result, which it may overwrite."""
    if grad.stride() != x.stride():
        grad = _dense(grad, torch.empty_like(x, dtype=grad.dtype))
    _clip(grad, mask, grad)
    return grad


def forward_rows(weight: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """What :func:`fake_quantize_weight` gives, in ``dtype``, for a weight that :func:`quantizes_rows`."""
    y = torch.empty_like(weight, dtype=dtype)
    rows, size, block = _rows(weight)
    launch(_triton().weight_kernel, rows, (weight, y), (size,), (fmt.qmin, fmt.qmax, SCALE_MIN, block))
    return y


def forward_both(
    x: Tensor, amax: Tensor, fmt: Format, weight: Tensor, weight_fmt: Format, dtype: torch.dtype, *, with_mask: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`forward` of ``x`` and :func:`forward_rows` of ``weight``, in one launch."""
    x, y, mask = _in_and_out(x, dtype, with_mask=with_mask)
    v, size = torch.empty_like(weight, dtype=dtype), x.numel()
    rows, row_size, block = _rows(weight)
    launch(
        _triton().layer_kernel,
        rows + _blocks(size),
        (x, amax, y, y if mask is None else mask, weight, v),
        (size, rows, row_size),
        (fmt.qmin, fmt.qmax, weight_fmt.qmin, weight_fmt.qmax, SCALE_MIN, with_mask, _WORDS, block),
    )
    return y, mask, v


def _rows(weight: Tensor) -> tuple[int, int, int]:
    """How many channels a weight has, their size, and how many elements of one a program takes at once."""
    rows = weight.shape[0]
    size = weight.numel() // rows
    return rows, size, min(max(1 << (size - 1).bit_length(), _SMALLEST_BLOCK), _BLOCK)


def _clip(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    size = grad.numel()
    launch(_triton().clip_kernel, _blocks(size), (grad, mask, out), (size,), (_WORDS,))


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """``x``, or a copy, with its elements in memory as those of ``like``, which has no gaps."""
    if x.stride() == like.stride():
        return x
    same = all(a == b for a, b, size in zip(x.stride(), like.stride(), x.shape, strict=True) if size > 1)
    return x if same else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _forward(
    x: Tensor, range_: Tensor, axis: int | None, fmt: Format, scale_min: float, dtype: torch.dtype, *, with_mask: bool
) -> tuple[Tensor, Tensor | None]:
    if not with_mask and axis is not None and axis % x.ndim == 0 and has_rows(x):
        y = torch.empty_like(x, dtype=dtype)
        rows, size, block = _rows(x)
        constants = fmt.qmin, fmt.qmax, scale_min, block
        launch(_triton().rows_kernel, rows, (x, range_.contiguous(), y), (size,), constants)
        return y, None
    x, y, mask = _in_and_out(x, dtype, with_mask=with_mask)
    size = x.numel()
    if axis is None:
        period = channels = 1
    else:
        range_, period, channels = range_.contiguous(), y.stride(axis), y.shape[axis]
    launch(
        _triton().quantize_kernel,
        _blocks(size),
        (x, range_, y, y if mask is None else mask),
        (size, period, channels),
        (fmt.qmin, fmt.qmax, scale_min, axis is not None, with_mask, _WORDS),
    )
    return y, mask


def _in_and_out(x: Tensor, dtype: torch.dtype, *, with_mask: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x`` without gaps, and memory for its quantized values in the same order and for its mask."""
    # Where x has gaps or overlaps, a result of that layout has none.
    y = torch.empty_like(x, dtype=dtype)
    if not is_dense(x):
        x = _dense(x, y)
    return x, y, _empty_mask(x) if with_mask else None


def _empty_mask(x: Tensor) -> Tensor:
    """Memory for one bit an element of ``x``."""
    return x.new_empty(-(-x.numel() // _WORD), dtype=torch.int32)


class _FakeQuantizeAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_amax: Tensor, b_amax: Tensor | None, fmt: Format) -> Tensor:
        y, a_mask, b_mask = _add(a, b, a_amax, b_amax, fmt, with_masks=True)
        ctx.set_materialize_grads(False)
        ctx.layout = y.shape, y.stride()
        ctx.save_for_backward(a_mask, b_mask)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None
        a_mask, b_mask = ctx.saved_tensors
        a_grad = torch.empty_strided(*ctx.layout, dtype=grad.dtype, device=grad.device)
        dense = _dense(grad, a_grad)
        if b_mask is None:
            _clip(dense, a_mask, a_grad)
            return a_grad, grad, None, None, None
        b_grad, size = torch.empty_like(a_grad), grad.numel()
        launch(_triton().add_backward_kernel, _blocks(size), (dense, a_mask, b_mask, a_grad, b_grad), (size,), (_WORDS,))
        return a_grad, b_grad, None, None, None


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, fmt: Format) -> Tensor:
        return forward_rows(weight, fmt, weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FakeQuantize(torch.autograd.Function):
    """One kernel forward and one backward. ``range_`` is a scale where ``scale_min`` is 0.

    Forward and its context are one method, since apart they cost 70 microseconds a call: torch binds the arguments anew.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: Tensor, axis: int | None, fmt: Format, scale_min: float) -> Tensor:
        learned = ctx.needs_input_grad[1]
        y, mask = _forward(x, range_, axis, fmt, scale_min, x.dtype, with_mask=not learned)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.plan = (y.shape, y.stride()), (axis, fmt, scale_min)
        if learned:
            ctx.save_for_backward(x, range_)
        else:
            ctx.save_for_backward(mask)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None
        out = torch.empty_strided(*ctx.layout, dtype=grad.dtype, device=grad.device)
        grad = _dense(grad, out)
        if len(ctx.saved_tensors) == 1:
            _clip(grad, ctx.saved_tensors[0], out)
            return out, None, None, None, None
        x, range_ = ctx.saved_tensors
        return out, _learned_backward(grad, _dense(x, out), range_, out, *ctx.plan), None, None, None


def _learned_backward(
    grad: Tensor, x: Tensor, range_: Tensor, out: Tensor, axis: int | None, fmt: Format, scale_min: float
) -> Tensor:
    """Write the gradient of ``x`` to ``out``; that of the range."""
    tensors = grad, x, range_.contiguous()
    found = torch.empty_like(tensors[2])
    constants = fmt.qmin, fmt.qmax, scale_min
    if axis is not None:
        rows, size, block = _rows(x)
        launch(_triton().learned_rows_kernel, rows, (*tensors, out, found), (size,), (*constants, block))
        return found.view(range_.shape)
    size = grad.numel()
    count = _blocks(size)
    sums = torch.empty(count, dtype=torch.float32, device=x.device)
    launch(_triton().learned_kernel, count, (*tensors, out, sums), (size,), (*constants, _BLOCK))
    launch(_triton().range_gradient_kernel, 1, (sums, range_, found), (count, size), (fmt.qmax, scale_min, _BLOCK))
    return found.view(range_.shape)
