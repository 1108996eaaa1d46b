"""Quantized layers. Each derives from its float class; ``qat.prepare`` exchanges classes in place."""

from .add import Add, QuantAdd
from .attention import QuantAttention
from .layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantLayer, QuantLinear
from .mul import QuantMul
from .pool import QuantPool

__all__ = [
    "Add",
    "QuantAdd",
    "QuantAttention",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLayer",
    "QuantLinear",
    "QuantMul",
    "QuantPool",
]
