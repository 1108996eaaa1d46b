"""Convolutions and linear layers that do not save their quantized input for the backward pass.

What they save is the tensor that was quantized, which mostly lives anyway, since the activation before it saved its result. The
backward pass quantizes it again, to the same bits: one more read and write of every input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import fake_quantize
from ..numerics import Format


class Source(NamedTuple):
    """What the quantized input of a layer was computed from.

    Attributes:
        x: The tensor before quantization.
        scale: Its scale, float32, shape ``()``.
        fmt: Number format.
    """

    x: Tensor
    scale: Tensor
    fmt: Format


class Geometry(NamedTuple):
    """Of a convolution, as in ``torch.nn.functional.conv2d``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def pays(x: Tensor) -> bool:
    """Whether a layer on ``x`` should recompute: where memory is scarce, and a compiler does not decide about it."""
    return x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def convolution(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, source: Source) -> Tensor:
    """``conv(y, weight, bias)``, where ``y`` is what quantizing ``source`` gives."""
    y, weight, bias = _cast(y, weight, bias)
    x, scale, fmt = source
    return _Convolution.apply(y, weight, bias, x.detach(), scale.detach(), fmt, geometry)


def linear(y: Tensor, weight: Tensor, bias: Tensor | None, source: Source) -> Tensor:
    """``linear(y, weight, bias)``, where ``y`` is what quantizing ``source`` gives."""
    y, weight, bias = _cast(y, weight, bias)
    x, scale, fmt = source
    return _Linear.apply(y, weight, bias, x.detach(), scale.detach(), fmt)


def _cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The types in which autocast computes the layer; it does not look into autograd functions for their saved tensors."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _again(x: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return fake_quantize(x, scale, fmt=fmt).to(dtype)


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, scale: Tensor, fmt: Format, geometry: Geometry
    ) -> Tensor:
        stride, padding, dilation, groups = geometry
        none = (0,) * len(stride)
        return torch.convolution(y, weight, bias, stride, padding, dilation, False, none, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, weight, bias, x, scale, ctx.fmt, ctx.geometry = inputs
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.dtype = y.dtype
        ctx.save_for_backward(weight, x, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, x, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        mask = list(ctx.needs_input_grad[:3])
        # The gradient of the input alone needs its shape only.
        y = _again(x, scale, ctx.fmt, ctx.dtype) if mask[1] else x.to(ctx.dtype)
        grads = torch.ops.aten.convolution_backward(
            grad, y, weight, ctx.bias_sizes, stride, padding, dilation, False, (0,) * len(stride), groups, mask
        )
        return *grads, None, None, None, None


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
        return F.linear(y, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, weight, _, x, scale, ctx.fmt = inputs
        ctx.dtype = y.dtype
        ctx.save_for_backward(weight, x, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, x, scale = ctx.saved_tensors
        need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = None
        if need_weight:
            y = _again(x, scale, ctx.fmt, ctx.dtype)
            grad_weight = rows.t() @ y.reshape(-1, y.shape[-1])
        return grad @ weight if need_y else None, grad_weight, rows.sum(0) if need_bias else None, None, None, None
