"""Fake quantization by the fastest implementation there is: Triton kernels for eager CUDA, else :mod:`qat.numerics`.

The results are the same, bit by bit; the sums in the gradient of a scale are formed in another order. Per element of 2 bytes
the kernels read 2 and write 2 forward (and one bit), and read 2 (and that bit) and write 2 backward; the input is not saved
unless the scale is learned.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import numerics
from .numerics import INT8, SCALE_MIN, Format, check_scale, lsq_factor

_BLOCK = 4096
_SMALLEST_BLOCK = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake_quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, fmt: Format = INT8) -> Tensor:
    """:func:`qat.numerics.fake_quantize`, with the same arguments, result and errors."""
    if not _is_for_triton(x, scale):
        return numerics.fake_quantize(x, scale, axis=axis, fmt=fmt)
    if scale.requires_grad and axis is not None:
        # Learned ranges of weights: too few elements to be worth kernels of their own.
        return numerics.fake_quantize(x, scale, axis=axis, fmt=fmt)
    check_scale(x, scale, axis)
    return _FakeQuantize.apply(x, scale, axis, fmt, lsq_factor(x, scale, fmt))[0]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether there are kernels for ``x``: floating, not empty, on CUDA, eager, and Triton is installed."""
    return x.is_cuda and not torch.compiler.is_compiling() and x.dtype in _DTYPES and x.numel() > 0 and _has_triton()


def _is_for_triton(x: Tensor, scale: Tensor) -> bool:
    return scale.device == x.device and runs_triton(x)


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
    if axis != 0 or not _has_rows(weight) or not _is_for_triton(weight, weight):
        return fake_quantize(weight, scale(), axis=axis, fmt=fmt)
    return _FakeQuantizeWeight.apply(weight, fmt)


def _has_rows(x: Tensor) -> bool:
    """Whether the elements of each index of dimension 0 lie together in memory, without gaps."""
    if x.ndim < 2 or x.numel() == 0 or (x.shape[0] > 1 and x.stride(0) != x.numel() // x.shape[0]):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """``x``, or a copy, with its elements in memory as those of ``like``, which has no gaps."""
    same = all(a == b for a, b, size in zip(x.stride(), like.stride(), x.shape, strict=True) if size > 1)
    return x if same else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _grid(size: int) -> tuple[int]:
    return (-(-size // _BLOCK),)


def _forward(x: Tensor, scale: Tensor, axis: int | None, fmt: Format, with_mask: bool) -> tuple[Tensor, Tensor]:
    from .triton_kernels import WORD, quantize_kernel

    # Where x has gaps or overlaps, a result of that layout has none.
    y = torch.empty_like(x)
    x = _dense(x, y)
    mask = torch.empty(-(-x.numel() // WORD) if with_mask else 0, dtype=torch.int32, device=x.device)
    period, channels = (1, 1) if axis is None else (y.stride(axis), y.shape[axis])
    with torch.cuda.device_of(x):
        quantize_kernel[_grid(x.numel())](
            x, scale.contiguous(), y, mask, x.numel(), period, channels, fmt.qmin, fmt.qmax, axis is not None, with_mask, _BLOCK
        )
    return y, mask


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, fmt: Format) -> Tensor:
        from .triton_kernels import weight_kernel

        y = torch.empty_like(weight)
        size = weight.numel() // weight.shape[0]
        block = min(max(1 << (size - 1).bit_length(), _SMALLEST_BLOCK), _BLOCK)
        with torch.cuda.device_of(weight):
            weight_kernel[(weight.shape[0],)](weight, y, size, SCALE_MIN, fmt.qmin, fmt.qmax, block)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], weight: Tensor, fmt: Format) -> tuple[Tensor, int]:
        """By the composite, as above."""

        def composite(weight: Tensor) -> Tensor:
            amax = weight.detach().abs().amax(list(range(1, weight.ndim)))
            return numerics.fake_quantize(weight, numerics.amax_to_scale(amax, fmt), axis=0, fmt=fmt)

        return torch.vmap(composite, in_dims[:1])(weight), 0


class _FakeQuantize(torch.autograd.Function):
    """Returns the words of the mask besides the result, since what is saved must come in or go out."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, axis: int | None, fmt: Format, factor: float) -> tuple[Tensor, Tensor]:
        return _forward(x, scale, axis, fmt, with_mask=x.requires_grad and not scale.requires_grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, scale, ctx.axis, ctx.fmt, ctx.factor = inputs
        y, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.learned = scale.requires_grad
        ctx.layout = torch.empty_like(y, device="meta")
        ctx.save_for_backward(*((x, scale) if ctx.learned else (mask,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None
        out = torch.empty_like(ctx.layout, dtype=grad.dtype, device=grad.device)
        grad = _dense(grad, out)
        from .triton_kernels import clip_kernel, learned_kernel

        with torch.cuda.device_of(grad):
            if not ctx.learned:
                (mask,) = ctx.saved_tensors
                clip_kernel[_grid(grad.numel())](grad, mask, out, grad.numel(), _BLOCK)
                return out, None, None, None, None
            x, scale = ctx.saved_tensors
            sums = torch.empty(_grid(x.numel()), dtype=torch.float32, device=x.device)
            learned_kernel[_grid(x.numel())](
                grad, _dense(x, out), scale, out, sums, x.numel(), ctx.fmt.qmin, ctx.fmt.qmax, _BLOCK
            )
        return out, sums.sum().reshape(scale.shape) * ctx.factor, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, scale: Tensor, axis: Any, fmt: Format, factor: float) -> Any:
        """By the composite, which vmap batches operator by operator."""

        def composite(x: Tensor, scale: Tensor) -> Tensor:
            return numerics.fake_quantize(x, scale, axis=axis, fmt=fmt)

        y = torch.vmap(composite, in_dims[:2])(x, scale)
        return (y, y.new_empty(0)), (0, None)
