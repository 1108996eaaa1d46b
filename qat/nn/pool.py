"""Average pooling, or another module, with a quantized input: ``DQ -> pool -> Q`` stays INT8 in TensorRT."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..core.quantizer import Quantizer
from .derive import Derived

AVERAGE_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)


class QuantPool(Derived):
    """Mixin of average pooling, and of whatever else has a site at its input alone."""

    input_quantizer: Quantizer

    def add_quantizers(self, input_quantizer: Quantizer) -> None:
        """Attach the site of the layer."""
        self.input_quantizer = input_quantizer

    def remove_quantizers(self) -> None:
        """Inverse of :meth:`add_quantizers`."""
        del self.input_quantizer

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.input_quantizer(input), *args, **kwargs)

    @classmethod
    def rebuild_args(cls) -> tuple[Any, ...]:
        return quant_pool_class, cls.float_class


@functools.cache
def quant_pool_class(float_class: type) -> type[QuantPool]:
    """The class with a quantized input that derives from ``float_class``."""
    return type(f"Quant{float_class.__name__}", (QuantPool, float_class), {"float_class": float_class, "__module__": __name__})
