"""Quantized convolution and linear layers: the float layer plus an input and a weight quantizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.config import SiteConfig
from ..core.quantizer import Quantizer, State, WeightQuantizer
from . import recompute
from .derive import Derived

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVS_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEARS = (nn.Linear,)
QUANTIZABLE = CONVS + CONVS_TRANSPOSED + LINEARS

# The functions through which such a layer meets its weight, whatever its own forward does around them.
WEIGHTED_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    [F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear]
)


class QuantLayer(Derived):
    """Mixin of all quantized convolution and linear layers."""

    input_quantizer: Quantizer
    weight_quantizer: WeightQuantizer
    weight: Tensor

    def add_quantizers(self, input_quantizer: Quantizer, weight_quantizer: WeightQuantizer) -> None:
        """Attach the two sites of the layer."""
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer

    def remove_quantizers(self) -> None:
        """Inverse of :meth:`add_quantizers`."""
        del self.input_quantizer
        del self.weight_quantizer

    def _recomputes(self, x: Tensor) -> bool:
        """Whether the backward pass quantizes ``x`` again instead of keeping the quantized one."""
        return self.input_quantizer.state is State.QUANTIZING and recompute.pays(x)

    def refresh_weight_ranges(self) -> None:
        """Record the current weight's range where it follows the weight."""
        if self.weight_quantizer.state is State.QUANTIZING:
            self.weight_quantizer.refresh(self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Parents are saved before their children: a range that follows the weight is up to date in every checkpoint.
        self.refresh_weight_ranges()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @classmethod
    def rebuild_args(cls) -> tuple[Any, ...]:
        return quant_class, cls.float_class


class _QuantizeOperands(TorchFunctionMode):
    """Quantizes both operands of a layer's weighted function, where it calls it."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in WEIGHTED_FUNCTIONS:
            x, weight, *rest = (*args, *(kwargs.pop(name) for name in ("input", "weight")[len(args) :]))
            if weight.shape == self.layer.weight.shape:
                x, weight = self.layer.input_quantizer(x), self.layer.weight_quantizer(weight)
            args = (x, weight, *rest)
        return func(*args, **kwargs)


class InterceptedLayer(QuantLayer):
    """A layer with a ``forward`` of its own: padding, weight standardization and the like stay as they are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _QuantizeOperands(self):
            return super().forward(*args, **kwargs)

    def refresh_weight_ranges(self) -> None:
        """Nothing: what reaches the quantizer may be a function of ``weight`` that only ``forward`` knows."""


class _QuantConv(QuantLayer):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        # Other paddings are operations of their own, between quantizer and convolution; so is adding a batch dimension.
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and input.ndim == weight.ndim
        if not plain or not self._recomputes(input):
            return super()._conv_forward(self.input_quantizer(input), self.weight_quantizer(weight), bias)  # type: ignore[misc]
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        return recompute.layer(input, weight, bias, geometry, self.input_quantizer, self.weight_quantizer)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` with quantized input and weight."""

    float_class = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight."""

    float_class = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d`` with quantized input and weight."""

    float_class = nn.Conv3d


class QuantLinear(QuantLayer, nn.Linear):
    """``nn.Linear`` with quantized input and weight."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if not self._recomputes(input):
            return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)
        return recompute.layer(input, self.weight, self.bias, None, self.input_quantizer, self.weight_quantizer)


_DIRECT = {cls.float_class: cls for cls in (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)}


@functools.cache
def quant_class(float_class: Any) -> type[QuantLayer]:
    """The quantized class that derives from ``float_class``, made on demand for subclasses of torch's layers."""
    if float_class in _DIRECT:
        return _DIRECT[float_class]
    bases: tuple[type, ...] = (InterceptedLayer, float_class)
    for base in _DIRECT:
        if not issubclass(float_class, base) or float_class.forward is not base.forward:
            continue
        if base is nn.Linear:
            bases = (QuantLinear, float_class)
        elif float_class._conv_forward is getattr(base, "_conv_forward", None):
            bases = (_QuantConv, float_class)
    members = {"float_class": float_class, "__module__": __name__}
    return type(f"Quant{float_class.__name__}", bases, members)


def make_weight_quantizer(weight: Tensor, site: SiteConfig, *, per_channel: bool = True) -> WeightQuantizer:
    """The weight site for ``weight`` of shape ``(C_out, ...)``."""
    channel = per_channel and site.weight_granularity == "channel"
    return WeightQuantizer(
        site.weight_format,
        axis=0 if channel else None,
        channels=weight.shape[0],
        follow=site.weight_range == "follow",
        learned=site.learn_scales,
        device=weight.device,
    )


def is_quantizable(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution or linear layer."""
    return isinstance(module, QUANTIZABLE)


def is_conv_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is a transposed convolution."""
    return isinstance(module, CONVS_TRANSPOSED)


__all__ = [
    "CONVS",
    "CONVS_TRANSPOSED",
    "LINEARS",
    "QUANTIZABLE",
    "WEIGHTED_FUNCTIONS",
    "InterceptedLayer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLayer",
    "QuantLinear",
    "is_conv_transposed",
    "is_quantizable",
    "make_weight_quantizer",
    "quant_class",
]
