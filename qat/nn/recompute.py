"""Convolutions and linear layers that do not save their quantized input for the backward pass.

What they save is the tensor that was quantized, which mostly lives anyway, since the activation before it saved its result. The
backward pass quantizes it again, to the same bits: one more read and write of every input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import fake_quantize_range, is_transformed
from ..numerics import Format


class Source(NamedTuple):
    """What the quantized input of a layer was computed from.

    Attributes:
        x: The tensor before quantization.
        amax: Its range, float32, shape ``()``.
        fmt: Number format.
    """

    x: Tensor
    amax: Tensor
    fmt: Format


class Geometry(NamedTuple):
    """Of a convolution, as in ``torch.nn.functional.conv2d``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def pays(x: Tensor) -> bool:
    """Whether a layer on ``x`` should recompute: where memory is scarce, and nobody else decides about it."""
    return x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()


def convolution(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, source: Source) -> Tensor:
    """``conv(y, weight, bias)``, where ``y`` is what quantizing ``source`` gives."""
    y, weight, bias = _cast(y, weight, bias)
    x, amax, fmt = source
    return _Convolution.apply(y, weight, bias, x.detach(), amax.detach(), fmt, geometry)


def linear(y: Tensor, weight: Tensor, bias: Tensor | None, source: Source) -> Tensor:
    """``linear(y, weight, bias)``, where ``y`` is what quantizing ``source`` gives."""
    y, weight, bias = _cast(y, weight, bias)
    x, amax, fmt = source
    return _Linear.apply(y, weight, bias, x.detach(), amax.detach(), fmt)


def _cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The types in which autocast computes the layer; it does not look into autograd functions for their saved tensors."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _again(x: Tensor, amax: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    return fake_quantize_range(x, amax, fmt=fmt).to(dtype)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, amax: Tensor, fmt: Format, geometry: Geometry
    ) -> Tensor:
        ctx.fmt, ctx.geometry, ctx.dtype = fmt, geometry, y.dtype
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(weight, x, amax)
        stride, padding, dilation, groups = geometry
        return torch.convolution(y, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, x, amax = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        mask = ctx.needs_input_grad[:3]
        # The gradient of the input alone needs its shape only.
        y = _again(x, amax, ctx.fmt, ctx.dtype) if mask[1] else x.to(ctx.dtype)
        grads = torch.ops.aten.convolution_backward.default(
            grad, y, weight, ctx.bias_sizes, stride, padding, dilation, False, (0,) * len(stride), groups, mask
        )
        return *grads, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, amax: Tensor, fmt: Format) -> Tensor:
        ctx.fmt, ctx.dtype = fmt, y.dtype
        ctx.save_for_backward(weight, x, amax)
        return F.linear(y, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, x, amax = ctx.saved_tensors
        need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = None
        if need_weight:
            y = _again(x, amax, ctx.fmt, ctx.dtype)
            grad_weight = rows.t() @ y.reshape(-1, y.shape[-1])
        return grad @ weight if need_y else None, grad_weight, rows.sum(0) if need_bias else None, None, None, None
