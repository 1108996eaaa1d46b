"""What modules and functions are called in the drawing of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn.add import Add, QuantAdd
from ..nn.attention import QuantAttention
from ..nn.layers import CONVS, CONVS_TRANSPOSED, LINEARS, QuantLayer
from ..nn.mul import QuantMul
from ..nn.pool import QuantPool

# Which input of a module a quantizer of this name reads.
INPUTS = {
    "input_quantizer": 0,
    "a_quantizer": 0,
    "b_quantizer": 1,
    "query_quantizer": 0,
    "key_quantizer": 1,
    "value_quantizer": 2,
}
_MODULES = {
    "AdaptiveAvgPool": "Average pooling",
    "AvgPool": "Average pooling",
    "AdaptiveMaxPool": "Max pooling",
    "MaxPool": "Max pooling",
    "BatchNorm": "Batch norm",
    "LayerNorm": "Layer norm",
    "GroupNorm": "Group norm",
    "MultiheadAttention": "Attention",
}
_FUNCTIONS = {
    "adaptive_avg_pool2d": "Average pooling",
    "avg_pool2d": "Average pooling",
    "mean": "Mean",
    "adaptive_max_pool2d": "Max pooling",
    "max_pool2d": "Max pooling",
    "boolean_dispatch": "Max pooling",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "hardtanh": "Hardtanh",
    "leaky_relu": "Leaky ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "hardswish": "Hardswish",
    "hardsigmoid": "Hardsigmoid",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "softmax": "Softmax",
    "layer_norm": "Layer norm",
    "batch_norm": "Batch norm",
    "interpolate": "Interpolation",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "linear": "Linear",
    "multi_head_attention_forward": "Attention",
    "transformer_encoder_layer_fwd": "Transformer layer",
}
# How operators reach PyTorch, as they are or in place.
_JOINS = {
    "add": "Add",
    "radd": "Add",
    "iadd": "Add",
    "mul": "Multiply",
    "rmul": "Multiply",
    "imul": "Multiply",
    "sub": "Subtract",
}
_JOINS |= {"cat": "Concat", "concat": "Concat", "stack": "Stack", "matmul": "Matrix product", "bmm": "Matrix product"}
_JOINS |= {"scaled_dot_product_attention": "Attention"}


def is_quantized_module(module: nn.Module) -> bool:
    """Whether the sites of ``module`` belong to what it computes, rather than being called in its ``forward`` by chance."""
    return isinstance(module, QuantLayer | QuantAttention | QuantPool | QuantAdd | QuantMul)


def does_nothing(module: nn.Module) -> bool:
    """Whether ``module`` passes its input on in evaluation mode."""
    dropout = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
    # Of torchvision and timm, which draw for a whole sample at a time.
    return not isinstance(module, QuantPool) and (dropout or type(module).__name__ in ("StochasticDepth", "DropPath"))


def describe(module: nn.Module) -> tuple[str, bool]:
    """What ``module`` is called, and whether it is of a kind that can have sites.

    Example:
        >>> describe(nn.Conv2d(8, 8, 3, stride=2, groups=8))
        ('Depthwise 3×3, /2', True)
    """
    cls = getattr(type(module), "float_class", type(module))
    if isinstance(module, CONVS + CONVS_TRANSPOSED):
        return _conv(module), True
    if isinstance(module, LINEARS):
        return "Linear", True
    if isinstance(module, Add | QuantAdd):
        return "Add", True
    if isinstance(module, QuantMul):
        return "Multiply", True
    name = next((text for start, text in _MODULES.items() if cls.__name__.startswith(start)), cls.__name__)
    return name, isinstance(module, nn.MultiheadAttention | QuantPool)


def _conv(module: Any) -> str:
    name = "Conv" if module.groups == 1 else "Depthwise" if module.groups == module.in_channels else "Grouped conv"
    text = ("Transposed " if isinstance(module, CONVS_TRANSPOSED) else "") + name + " " + "×".join(map(str, module.kernel_size))
    strides = set(module.stride)
    if strides != {1}:
        text += ", /" + (str(strides.pop()) if len(strides) == 1 else "×".join(map(str, module.stride)))
    return text


def function_label(func: Callable[..., Any], *, joins: bool) -> str | None:
    """What a function is called; ``None`` for one that is not drawn, such as a reshape.

    Args:
        func: As PyTorch hands it to a ``TorchFunctionMode``.
        joins: Whether it reads tensors of several origins.
    """
    name = getattr(func, "__name__", type(func).__name__).strip("_")
    return _FUNCTIONS.get(name) or (_JOINS.get(name, name) if joins else None)
