"""Symmetric fake quantization: the formulas, and their gradients.

Forward: ONNX QuantizeLinear followed by DequantizeLinear (opset 13 and later) with ``zero_point = 0``,

    ``q = clamp(round_half_even(x / scale), qmin, qmax)``,  ``x_hat = q * scale``,

always in float32, whatever the dtype of ``x`` or the autocast state.
Backward: straight-through with a clip mask; the scale gradient is that of LSQ (Esser et al., arXiv 1902.08153, section 2.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import FORMATS as FORMATS
from .formats import INT4 as INT4
from .formats import INT8 as INT8
from .formats import SCALE_MIN as SCALE_MIN
from .formats import Format as Format
from .formats import check_scale as check_shapes


def amax_to_scale(amax: Tensor, fmt: Format = INT8) -> Tensor:
    """``abs(amax) / qmax`` in float32, at least ``SCALE_MIN``.

    Args:
        amax: Any shape. Zero (a dead tensor or channel) gives ``SCALE_MIN``. A step of training may carry a learned one beyond
            zero: its sign has no meaning.
        fmt: Number format.

    Returns:
        Same shape, float32, positive. Differentiable; zero gradient where the floor applies.

    Example:
        >>> amax_to_scale(torch.tensor([127.0, 254.0]))
        tensor([1., 2.])
    """
    # A tensor divisor: dividing by a Python number may become a multiplication by its reciprocal on CUDA, one ulp off.
    wide = amax.to(torch.float32)
    if torch.compiler.is_compiling():
        return _traced_scale(wide, fmt)
    return (wide.abs() / torch.full_like(wide, fmt.qmax)).clamp(min=SCALE_MIN)


class _LearnedScale(torch.autograd.Function):
    """:func:`amax_to_scale` of a range that is trained, see :func:`learned_scale`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(amax: Tensor, fmt: Format, traced: bool) -> Tensor:
        return _traced_scale(amax, fmt) if traced else amax_to_scale(amax, fmt)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        amax, ctx.fmt, _ = inputs
        ctx.save_for_backward(amax)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (amax,) = ctx.saved_tensors
        moves = (amax.abs() >= ctx.fmt.qmax * SCALE_MIN) | (grad < 0)
        # The larger the magnitude, the larger the scale, on either side of zero.
        outwards = torch.where(amax < 0, -grad, grad)
        return torch.where(moves, outwards * ctx.fmt.qmax, 0), None, None


def learned_scale(amax: Tensor, fmt: Format = INT8) -> Tensor:
    """:func:`amax_to_scale` with the gradient that moves the scale as gradient descent on the scale itself would.

    The parameter is ``amax = qmax * scale``: the derivative ``1 / qmax`` would make a step of the scale ``qmax ** 2`` times
    smaller than that of LSQ, which trains the scale, at the same learning rate. So the gradient is multiplied by ``qmax``
    instead. Below the floor a range can only grow.

    Args:
        amax: Any shape, float32.
        fmt: Number format.

    Returns:
        Same shape, float32, positive.

    Example:
        >>> amax = torch.tensor(254.0, requires_grad=True)
        >>> learned_scale(amax).backward()
        >>> amax.grad
        tensor(127.)
    """
    scale: Tensor = _LearnedScale.apply(amax, fmt, torch.compiler.is_compiling())
    return scale


def broadcast_scale(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``scale`` in the shape that broadcasts along ``axis`` of ``x``."""
    if axis is None:
        return scale.reshape(())  # one element in another shape must not add dimensions to x
    return scale.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, fmt: Format = INT8) -> Tensor:
    """The codes of ``x``, held in float32 so that a NaN stays a NaN.

    ONNX QuantizeLinear, opset 13, ``zero_point = 0``.

    Args:
        x: Any shape, float32, float16 or bfloat16.
        scale: Positive, float32. Scalar, or shape ``(x.shape[axis],)``.
        axis: Channel dimension of a per-channel ``scale``.
        fmt: Number format; codes lie in ``[fmt.qmin, fmt.qmax]``.

    Returns:
        Same shape, float32. Ties go to even, infinities to the ends of the range.

    Example:
        >>> quantize(torch.tensor([0.25, 0.75, -99.0]), torch.tensor(0.5))
        tensor([   0.,    2., -128.])
    """
    if torch.compiler.is_compiling():
        return _codes_traced(x, scale, axis, fmt)
    wide, step = x.to(torch.float32), broadcast_scale(scale, x, axis)
    # Divide, do not multiply by 1 / scale: ONNX divides, and the two differ at ties.
    return (wide / step).round_().clamp_(fmt.qmin, fmt.qmax)


def _codes_traced(x: Tensor, scale: Tensor, axis: int | None, fmt: Format) -> Tensor:
    """:func:`quantize` for compilers, which fuse what eager mode does in place."""
    step = broadcast_scale(scale, x, axis)
    return quotient(x.to(torch.float32), step, step.reciprocal()).round().clamp(fmt.qmin, fmt.qmax)


def quotient(x: Tensor, scale: Tensor, about: Tensor) -> Tensor:
    """The correctly rounded ``x / scale`` without a division for each element; for compilers.

    Those for GPUs divide float32 approximately (``div.full.f32``: 2 units in the last place), which moves codes near ties.
    Here ``x`` is multiplied by the reciprocal in float64, and the product rounded. A quotient of two float32 is at least
    ``2 ** -49`` of itself away from where two float32 meet, in the middle between them, and the product at most ``2 ** -51``
    from the quotient, so both are rounded to the same.

    Args:
        x: float32, any shape.
        scale: float32, ``2 ** -24`` to ``2 ** 121``, which are those of the ranges there can be. Broadcasts against ``x``.
        about: Its reciprocal, float32, a few units in the last place off. Shape of ``scale``.

    Returns:
        Shape of ``x``, float32.
    """
    wide, about = scale.to(torch.float64), about.to(torch.float64)
    # Exact: a product of two float32 fits into a float64. What the sum of this series leaves out is 2 ** -60.
    rest = 1.0 - wide * about
    return (x.to(torch.float64) * (about + about * (rest + rest * rest))).to(torch.float32)


def _clipped_traced(value: Tensor, x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """``value`` where ``x / scale`` rounds into the range, else 0; for compilers.

    The quotient rounds out of the range from the middle between the upper tie and the float32 below it on, and below the middle
    between the lower tie and the float32 beyond it: ``x`` is compared with these multiples of ``scale``. A comparison is all
    there is, so that compilers recompute it rather than keep its result for the backward pass.
    """
    above, below = fmt.qmax + 0.5, 0.5 - fmt.qmin
    inside = (x < _limit(scale, above - _half_unit(above - 0.5))) & (x > -_limit(scale, below + _half_unit(below)))
    return torch.where(inside, value, 0)


def _limit(scale: Tensor, times: float) -> Tensor:
    """The least float32 that is not below ``times * scale``, a product that fits into a float64."""
    exact = scale.to(torch.float64) * times
    nearest = exact.to(torch.float32)
    # 0.75 to 1.5 units in the last place are rounded to one.
    return torch.where(nearest.to(torch.float64) < exact, nearest + nearest * (0.75 * 2.0**-23), nearest)


def _half_unit(value: float) -> float:
    """Half a unit in the last place of ``value`` as float32."""
    return 2.0 ** (math.frexp(value)[1] - 25)


def _clipped(value: Tensor, ratio: Tensor, fmt: Format) -> Tensor:
    """``value`` where the correctly rounded quotient ``ratio`` rounds into the range, else 0.

    ``qmin`` is even, so the tie below it rounds into the range, and ``qmax`` is odd, so that above it rounds out of it. The
    gradient of ``hardtanh`` tests ``low < ratio < high`` in one vectorised pass; comparisons and ``where`` take five times as
    long on a CPU.
    """
    below, above = fmt.qmin - 0.5, fmt.qmax + 0.5
    # No float32 lies between the tie and this.
    low = below - abs(below) * 2.0**-23
    wide = torch.promote_types(value.dtype, torch.float32)
    return torch.ops.aten.hardtanh_backward(value.to(wide), ratio.to(wide), low, above).to(value.dtype)


class _FakeQuantize(torch.autograd.Function):
    """Saves ``x`` and ``scale`` only; the backward pass recomputes the codes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, axis: int | None, fmt: Format, factor: float) -> Tensor:
        value = quantize(x, scale, axis=axis, fmt=fmt).mul_(broadcast_scale(scale, x, axis))
        # Not ``to`` where it would return the tensor itself: torch 2.11 loses the gradient of such a result, too.
        return value if x.dtype == torch.float32 else value.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, scale, ctx.axis, ctx.fmt, ctx.factor = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale = ctx.saved_tensors
        ratio = x.to(torch.float32) / broadcast_scale(scale, x, ctx.axis)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[1]:
            # Inside the range round(v) - v, outside the end of the range.
            slope = ratio.round().clamp(ctx.fmt.qmin, ctx.fmt.qmax) - _clipped(ratio, ratio, ctx.fmt)
            grad_scale = _total(grad, slope, x, scale, ctx.axis) * ctx.factor
        if ctx.needs_input_grad[0]:
            # A NaN is outside of every range, but not in the comparisons of hardtanh's gradient.
            ratio.nan_to_num_(math.inf, math.inf, -math.inf)
            grad_x = _clipped(grad, ratio, ctx.fmt)
        return grad_x, grad_scale, None, None, None


class _FakeQuantizeTraced(torch.autograd.Function):
    """The same by operations that compilers fuse and do not round differently."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, axis: int | None, fmt: Format, factor: float) -> Tensor:
        value = _codes_traced(x, scale, axis, fmt) * broadcast_scale(scale, x, axis)
        return value if x.dtype == torch.float32 else value.to(x.dtype)

    setup_context = _FakeQuantize.setup_context

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale = ctx.saved_tensors
        wide, step = x.to(torch.float32), broadcast_scale(scale, x, ctx.axis)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[1]:
            ratio = quotient(wide, step, step.reciprocal())
            slope = ratio.round().clamp(ctx.fmt.qmin, ctx.fmt.qmax) - _clipped_traced(ratio, wide, step, ctx.fmt)
            if ctx.axis is None and x.ndim > 1:
                # By channel first, as normalizations sum their gradients: compilers make one kernel of both.
                by_channel = 1 if x.ndim > 3 else x.ndim - 1
                product = grad.to(torch.float32) * slope
                total = product.sum([d for d in range(x.ndim) if d != by_channel]).sum().reshape(scale.shape)
            else:
                total = _total(grad, slope, x, scale, ctx.axis)
            grad_scale = total * ctx.factor
        if ctx.needs_input_grad[0]:
            grad_x = _clipped_traced(grad, wide, step, ctx.fmt)
        return grad_x, grad_scale, None, None, None


class _FakeQuantizeWeightTraced(torch.autograd.Function):
    """By the range that is the weight's own, outside of which nothing lies: the gradient passes as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, axis: int | None, fmt: Format) -> Tensor:
        return _FakeQuantizeTraced.forward(weight, scale, axis, fmt, 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None, None, None


def _total(grad: Tensor, slope: Tensor, x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """``grad * slope``, summed over the elements that share a scale."""
    product = grad.to(torch.float32) * slope
    dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    # torch takes no dimensions for all of them.
    return (product.sum(dims) if dims else product).reshape(scale.shape)


# One operator for what traces Python code, and would follow every line of an autograd function for each of its calls: that was
# most of the time to compile a model. What makes code from the trace sees through it.
torch.library.define("qat::traced_fake_quantize", "(Tensor x, Tensor range, int? axis, str fmt, bool is_scale) -> Tensor")
torch.library.define("qat::traced_fake_quantize_weight", "(Tensor weight, int? axis, str fmt) -> Tensor")


@torch.library.impl("qat::traced_fake_quantize", "CompositeImplicitAutograd")
def _(x: Tensor, range: Tensor, axis: int | None, fmt: str, is_scale: bool) -> Tensor:
    format_ = FORMATS[fmt]
    scale = range
    if not is_scale:
        scale = _LearnedScale.apply(range, format_, True) if range.requires_grad else _traced_scale(range, format_)
    return _FakeQuantizeTraced.apply(x, scale, axis, format_, lsq_factor(x, scale, format_))


@torch.library.impl("qat::traced_fake_quantize_weight", "CompositeImplicitAutograd")
def _(weight: Tensor, axis: int | None, fmt: str) -> Tensor:
    format_ = FORMATS[fmt]
    scale = _traced_scale(largest_magnitude(weight.detach(), axis), format_)
    return _FakeQuantizeWeightTraced.apply(weight, scale, axis, format_)


def _traced_scale(amax: Tensor, fmt: Format) -> Tensor:
    """:func:`amax_to_scale` for compilers: those for GPUs divide float32 approximately, but not float64.

    A product with the reciprocal is as good (:func:`quotient`).
    """
    return (amax.to(torch.float64).abs() * (1.0 / fmt.qmax)).to(torch.float32).clamp(min=SCALE_MIN)


def traced_fake_quantize(x: Tensor, amax: Tensor, axis: int | None, fmt: Format) -> Tensor:
    """:func:`fake_quantize` by a range, for code that is being compiled."""
    check_scale(x, amax, axis)
    y: Tensor = torch.ops.qat.traced_fake_quantize(x, amax, axis, fmt.name, False)
    return y


def traced_fake_quantize_weight(weight: Tensor, axis: int | None, fmt: Format) -> Tensor:
    """The same by the range that is the weight's own."""
    y: Tensor = torch.ops.qat.traced_fake_quantize_weight(weight, axis, fmt.name)
    return y


def largest_magnitude(x: Tensor, axis: int | None) -> Tensor:
    """Of each channel, or of all of ``x``; float32."""
    dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    if not dims:  # torch takes that for all of them
        return x.abs().to(torch.float32)
    # Two reductions read less than one of abs() writes.
    return torch.maximum(x.amax(dims), -x.amin(dims)).to(torch.float32)


def check_scale(x: Tensor, scale: Tensor, axis: int | None) -> None:
    """Raise :class:`QATError` unless ``scale`` fits ``x`` along ``axis``."""
    check_shapes(tuple(x.shape), tuple(scale.shape), axis)


def lsq_factor(x: Tensor, scale: Tensor, fmt: Format) -> float:
    """What the gradient of ``scale`` is multiplied by (LSQ, section 2.2); 1 if it needs none."""
    # torch.jit.trace compares a graph with one made without gradients, and the factor is a constant in it.
    if not scale.requires_grad and not torch.jit.is_tracing():
        return 1.0
    return 1.0 / math.sqrt(max(x.numel() // max(scale.numel(), 1), 1) * fmt.qmax)


def fake_quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, fmt: Format = INT8) -> Tensor:
    """Round ``x`` to the grid ``scale * [qmin, qmax]``, with gradients.

    Args:
        x: Any shape, float32, float16 or bfloat16.
        scale: Positive, float32. Scalar, or shape ``(x.shape[axis],)``.
        axis: Channel dimension of a per-channel ``scale``.
        fmt: Number format.

    Returns:
        Same shape and dtype as ``x``. Ties round to even, NaN stays NaN.
        Gradient of ``x``: 1 where ``qmin <= round(x / scale) <= qmax``, else 0.
        Gradient of ``scale``, if it requires one: ``round(v) - v`` inside and the clipped code outside, with
        ``v = x / scale``, times ``1 / sqrt(N * qmax)`` where ``N`` counts the elements that share one scale
        (LSQ, equations 3 and section 2.2).

    Raises:
        QATError: If ``scale`` does not fit ``axis``.

    Example:
        >>> fake_quantize(torch.tensor([0.26, -99.0]), torch.tensor(0.5))
        tensor([  0.5000, -64.0000])
    """
    check_scale(x, scale, axis)
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.qat.traced_fake_quantize(x, scale, axis, fmt.name, True)
        return traced
    return _FakeQuantize.apply(x, scale, axis, fmt, lsq_factor(x, scale, fmt))


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def fake_quantize_node(x: Tensor, scale: Tensor, axis: int | None, fmt: str) -> Tensor:
    """:func:`fake_quantize` as one opaque operator, which an exporter finds again in a traced graph."""
    return _FakeQuantize.forward(x, scale, axis, FORMATS[fmt], 1.0)


@fake_quantize_node.register_fake
def _(x: Tensor, scale: Tensor, axis: int | None, fmt: str) -> Tensor:
    return torch.empty_like(x)
