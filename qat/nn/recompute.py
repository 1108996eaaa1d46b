"""Convolutions and linear layers that do not save their quantized input for the backward pass.

What they save is the tensor that was quantized, which mostly lives anyway, since the activation before it saved its result. The
backward pass quantizes it again, to the same bits: one more read and write of every input that is not small.

Where there are kernels, one autograd function quantizes both operands and computes the layer: in eager mode, what the host does
for each function costs as much as the GPU's work on a layer of a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import kernels
from ..core.kernels import fake_quantize_range
from ..core.numerics import Format
from ..core.quantizer import Quantizer, WeightQuantizer
from ..errors import QATError

# Stride, padding, dilation and groups of a convolution, as in ``torch.nn.functional.conv2d``; ``None`` for a linear layer.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None


# Bytes up to which the quantized input is kept after all: a step of ResNet-50 at batch 128 takes 6.3 instead of 5.9 GiB then.
_KEPT = 2**25


def pays(x: Tensor) -> bool:
    """Whether a layer on ``x`` should recompute: where memory is scarce, and nobody else decides about it."""
    return x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not kernels.is_transformed()


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
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
    amax = input_quantizer.amax
    has_kernels = kernels.runs_triton(x, amax, weight)
    # A tensor with several readers is quantized once, for all of them.
    alone = has_kernels and input_quantizer.quantizes_alone()
    y = None if alone else input_quantizer(x)
    weight_fmt = None
    if has_kernels and weight_quantizer.follow and weight_quantizer.axis == 0 and weight_quantizer.quantizes_alone():
        weight_fmt = weight_quantizer.fmt if kernels.has_rows(weight) else None
    if weight_fmt is None:
        weight = weight_quantizer(weight)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = x.dtype if x.dtype == weight.dtype else torch.result_type(x, weight)
    # In one argument, since each costs time.
    plan = x, amax, input_quantizer.fmt, weight_fmt, geometry, dtype, has_kernels
    result: Tensor = _Layer.apply(x if alone else None, y, weight, bias, plan)
    return result


class _Layer(torch.autograd.Function):
    """Gets the input either as it is (``x``) or quantized (``y``); what it saves is ``source``, the input as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        y: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        plan: tuple[Tensor, Tensor, Format, Format | None, Geometry, torch.dtype, bool],
    ) -> Tensor:
        source, amax, fmt, weight_fmt, geometry, dtype, has_kernels = plan
        mask, weight_dtype, need_mask = None, weight.dtype, ctx.needs_input_grad[0]
        if x is not None and weight_fmt is not None:
            y, mask, weight = kernels.forward_both(x, amax, fmt, weight, weight_fmt, dtype, with_mask=need_mask)
        else:
            if x is not None:
                y, mask = kernels.forward(x, amax, fmt, dtype, with_mask=need_mask)
            else:
                assert y is not None
                y = y.to(dtype)
            weight = weight.to(dtype) if weight_fmt is None else kernels.forward_rows(weight, weight_fmt, dtype)
        # To quantize a small tensor again takes the host longer than the GPU.
        keeps = ctx.needs_input_grad[2] and source.numel() * y.element_size() <= _KEPT
        like = None if bias is None else (list(bias.shape), bias.dtype)
        ctx.plan = fmt, geometry, dtype, has_kernels, keeps, source.dtype, weight_dtype, like
        ctx.save_for_backward(y if keeps else source, amax, weight, mask)
        if bias is not None:
            bias = bias.to(dtype)
        if geometry is None:
            return F.linear(y, weight, bias)
        stride, padding, dilation, groups = geometry
        return torch.convolution(y, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # torch's decorator for this wraps every call in Python.
        if torch.is_grad_enabled():
            raise QATError("a fake-quantized layer has no second derivative on CUDA. Leave out create_graph=True")
        x, amax, weight, mask = ctx.saved_tensors
        need_x, need_y, need_weight, need_bias = ctx.needs_input_grad[:4]
        fmt, geometry, dtype, has_kernels, keeps, x_dtype, weight_dtype, bias_like = ctx.plan
        y = x
        if need_weight and not keeps and has_kernels:
            y, _ = kernels.forward(x, amax, fmt, dtype, with_mask=False)
        elif need_weight and not keeps:
            y = fake_quantize_range(x, amax, fmt=fmt, dtype=dtype)
        # Otherwise the gradient of the input alone needs the input's shape only.
        wanted = (need_x or need_y, need_weight, need_bias)
        if geometry is None:
            grad_y, grad_weight, grad_bias = _linear_backward(grad, y, weight, wanted)
        else:
            stride, padding, dilation, groups = geometry
            sizes = None if bias_like is None else bias_like[0]
            grad_y, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
                grad, y.to(dtype), weight, sizes, stride, padding, dilation, False, (0,) * len(stride), groups, wanted
            )
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_like[1])
        if mask is None:
            return None, grad_y, grad_weight, grad_bias, None
        if grad_y is not None:
            grad_y = kernels.clip(grad_y, mask, x).to(x_dtype)
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
