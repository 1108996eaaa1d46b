"""Convolutions and linear layers that do not save their quantized input for the backward pass.

What they save is the tensor that was quantized, which mostly lives anyway, since the activation before it saved its result. The
backward pass quantizes it again, to the same bits: one more read and write of every input.

Where there are kernels, one autograd function quantizes both operands and computes the layer: in eager mode, what the host does
for each function costs as much as the GPU's work on a layer of a small batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..kernels import fake_quantize_range
from ..numerics import Format
from ..quantizer import Quantizer, WeightQuantizer


class Geometry(NamedTuple):
    """Of a convolution, as in ``torch.nn.functional.conv2d``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Plan(NamedTuple):
    """What a layer does besides its operands.

    Attributes:
        x: The tensor before quantization.
        amax: Its range.
        fmt: Its format.
        weight_fmt: Format of the weight; ``None`` if it is quantized already.
        geometry: Of a convolution; ``None`` for a linear layer.
        dtype: In which it is computed.
    """

    x: Tensor
    amax: Tensor
    fmt: Format
    weight_fmt: Format | None
    geometry: Geometry | None
    dtype: torch.dtype


def pays(x: Tensor) -> bool:
    """Whether a layer on ``x`` should recompute: where memory is scarce, and nobody else decides about it."""
    return x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not kernels.is_transformed()


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None,
    input_quantizer: Quantizer,
    weight_quantizer: WeightQuantizer,
) -> Tensor:
    """The layer on the quantized operands.

    Args:
        x: Input, not yet quantized; ``input_quantizer`` is quantizing.
        weight: Likewise.
        bias: Bias, or ``None``.
        geometry: Of a convolution; ``None`` for a linear layer.
        input_quantizer: Site of ``x``.
        weight_quantizer: Site of ``weight``.
    """
    # A tensor with several readers is quantized once, for all of them.
    alone = input_quantizer.quantizes_alone() and kernels.runs_triton(x, input_quantizer.amax)
    y = None if alone else input_quantizer(x)
    inside = (
        weight_quantizer.quantizes_alone() and weight_quantizer.follow and kernels.quantizes_rows(weight, weight_quantizer.axis)
    )
    if not inside:
        weight = weight_quantizer(weight)
    dtype = torch.result_type(x, weight)
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    plan = _Plan(x, input_quantizer.amax, input_quantizer.fmt, weight_quantizer.fmt if inside else None, geometry, dtype)
    return _Layer.apply(x if y is None else None, y, weight, bias, plan)


class _Layer(torch.autograd.Function):
    """Gets the input either as it is (``x``) or quantized (``y``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, y: Tensor | None, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        mask = None
        if x is not None:
            y, mask = kernels.forward(x, plan.amax, plan.fmt, plan.dtype, with_mask=ctx.needs_input_grad[0])
        else:
            assert y is not None
            y = y.to(plan.dtype)
        ctx.weight_dtype = weight.dtype
        weight = weight.to(plan.dtype) if plan.weight_fmt is None else kernels.forward_rows(weight, plan.weight_fmt, plan.dtype)
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        ctx.fmt, ctx.geometry, ctx.dtype, ctx.quantizes = plan.fmt, plan.geometry, plan.dtype, x is not None
        ctx.save_for_backward(plan.x, plan.amax, weight, mask)
        bias = None if bias is None else bias.to(plan.dtype)
        if plan.geometry is None:
            return F.linear(y, weight, bias)
        stride, padding, dilation, groups = plan.geometry
        return torch.convolution(y, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, amax, weight, mask = ctx.saved_tensors
        need_x, need_y, need_weight, need_bias = ctx.needs_input_grad[:4]
        # The gradient of the input alone needs the input's shape only.
        y = fake_quantize_range(x, amax, fmt=ctx.fmt, dtype=ctx.dtype) if need_weight else x
        wanted = (need_x or need_y, need_weight, need_bias)
        if ctx.geometry is None:
            grad_y, grad_weight, grad_bias = _linear_backward(grad, y, weight, wanted)
        else:
            stride, padding, dilation, groups = ctx.geometry
            sizes = None if ctx.bias is None else ctx.bias[0]
            grad_y, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
                grad, y.to(ctx.dtype), weight, sizes, stride, padding, dilation, False, (0,) * len(stride), groups, wanted
            )
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias[1])
        if not ctx.quantizes:
            return None, grad_y, grad_weight, grad_bias, None
        if grad_y is not None:
            grad_y = kernels.clip(grad_y, mask, x).to(x.dtype)
        return grad_y, None, grad_weight, grad_bias, None


def _linear_backward(
    grad: Tensor, y: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if wanted[0] else None,
        rows.t() @ y.reshape(-1, y.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )
