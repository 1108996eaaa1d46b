"""A Q/DQ graph as the rules look at it: edges, constants, types, and what INT8 values pass through unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..errors import QATError
from .reading import outline, values

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "Gemm", "MatMul")
# Q and DQ commute with these: codes go through them as well as values do (on TensorRT-RTX, each of them was tried). Casts
# stand around Q/DQ pairs in FP16 graphs.
MOVES = frozenset(
    (
        *("Cast", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"),
        *("Transpose", "Unsqueeze", "DepthToSpace", "SpaceToDepth", "MaxPool", "GlobalMaxPool", "Pad"),
    )
)
# Fused behind a convolution.
ACTIVATIONS = frozenset(
    (
        *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Swish"),
        "Tanh",
    )
)


class View:
    """A graph with its edges. The model is not changed.

    Args:
        model: The model.
        folder: Where its external data lies; ``None`` if unknown.

    Raises:
        QATError: If the graph is invalid.
    """

    def __init__(self, model: ModelProto, folder: str | None = None) -> None:
        small = outline(model, folder)
        if model.functions:
            small = onnx.inliner.inline_local_functions(small)
        self.nodes = list(small.graph.node)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self._folder = folder
        self._values: dict[str, np.ndarray | None] = {}
        self._types = _infer(small)

    def qdq(self) -> Iterator[NodeProto]:
        """Q and DQ nodes, in graph order."""
        return (node for node in self.nodes if node.op_type in (Q, DQ))

    def constant(self, node: NodeProto, index: int) -> TensorProto | None:
        """The stored tensor that ``node`` reads as input ``index``."""
        return self.constants.get(node.input[index]) if index < len(node.input) else None

    def value(self, node: NodeProto, index: int) -> np.ndarray | None:
        """The values of :meth:`constant`; ``None`` if it is none, or large."""
        tensor = self.constant(node, index)
        if tensor is None:
            return None
        if tensor.name not in self._values:
            self._values[tensor.name] = values(tensor, self._folder)
        return self._values[tensor.name] if tensor.name else values(tensor, self._folder)

    def element_type(self, name: str) -> int:
        """ONNX's number of the element type; 0 if it is unknown."""
        if name in self.constants:
            return self.constants[name].data_type
        kind = self._types.get(name)
        return kind.tensor_type.elem_type if kind is not None else 0

    def shape(self, name: str) -> list[int] | None:
        """Dimensions, -1 for an open one; ``None`` if the rank is unknown."""
        if name in self.constants:
            return list(self.constants[name].dims)
        kind = self._types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]

    def base(self, name: str) -> str:
        """The tensor that ``name`` is a moved copy of."""
        while (node := self.producer.get(name)) is not None and node.op_type in MOVES and name not in self.constants:
            name = node.input[0]
        return name

    def is_constant(self, name: str) -> bool:
        """Whether ``name`` is a stored tensor, perhaps moved."""
        return self.base(name) in self.constants

    def is_weight(self, node: NodeProto) -> bool:
        """Whether a Q or DQ node works on a constant."""
        return self.weight(node) is not None

    def weight(self, node: NodeProto) -> str | None:
        """The tensor with the shape of the weight that a Q or DQ node works on; ``None`` if that is an activation."""
        name = node.input[0]
        if node.op_type == DQ:
            producer = self.producer.get(self.base(name))
            name = producer.input[0] if producer is not None and producer.op_type == Q else name
        return name if self.is_constant(name) else None

    def is_constant_behind(self, name: str) -> bool:
        """Whether a dequantized operand is a weight."""
        return any(self.is_weight(dequantize) for dequantize in self.dequantizers(name))

    def quantizer(self, dequantize: NodeProto) -> NodeProto | None:
        """The Q of a DQ, perhaps behind operators that move codes."""
        node = self.producer.get(self.base(dequantize.input[0]))
        return node if node is not None and node.op_type == Q else None

    def scale_key(self, node: NodeProto) -> bytes | str:
        """Equal for equal scales."""
        scale = self.value(node, 1)
        return node.input[1] if scale is None else np.asarray(scale, np.float64).tobytes()

    def dequantizers(self, name: str) -> list[NodeProto]:
        """The DQ nodes of one scale that ``name`` comes from; empty if TensorRT cannot take it as INT8."""
        return self._trace(name)[0]

    def obstacle(self, name: str) -> NodeProto | None:
        """The operator between a DQ and ``name`` that INT8 does not get through."""
        found, last = self._trace(name)
        if found or last is None or last.op_type in (Q, DQ):
            return None
        blocked = last.op_type == "Concat" or any(self.dequantizers(i) for i in last.input[:1] if i not in self.constants)
        return last if blocked and any(self._trace(i)[0] for i in last.input if i) else None

    def _trace(self, name: str) -> tuple[list[NodeProto], NodeProto | None]:
        """DQ nodes that ``name`` comes from, and the node where the search ended."""
        node = self.producer.get(name)
        while node is not None and node.op_type in MOVES and name not in self.constants:
            if not self._moves(node):
                return [], node
            name = node.input[0]
            node = self.producer.get(name)
        if node is None:
            return [], None
        if node.op_type == DQ:
            return [node], node
        if node.op_type != "Concat":
            return [], node
        parts = [self._trace(i)[0] for i in node.input]
        found = [dequantize for part in parts for dequantize in part]
        whole = all(parts) and len({self.scale_key(dequantize) for dequantize in found}) == 1
        return (found if whole else []), node

    def _moves(self, node: NodeProto) -> bool:
        """Whether the operator only moves values: padding with anything but zero adds some."""
        if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
            return True
        return len(node.input) < 3 or not node.input[2] or ((fill := self.value(node, 2)) is not None and not fill.any())

    def ends(self, name: str) -> Iterator[NodeProto]:
        """The operators that read ``name``, seen through those that move values."""
        for reader in self.readers.get(name, []):
            if reader.op_type in MOVES:
                for output in reader.output:
                    yield from self.ends(output)
            else:
                yield reader

    def weighted_source(self, name: str) -> NodeProto | None:
        """The convolution or matrix product that ``name`` comes from by what TensorRT fuses behind it, if any."""
        node = self.producer.get(name)
        while node is not None:
            if node.op_type in WEIGHTED:
                return node
            linear = node.op_type in ("Mul", "Add", "Div", "Sub") and sum(self.is_constant(i) for i in node.input) == 1
            if not linear and node.op_type not in ("BatchNormalization", "Cast", "Identity", "Dropout"):
                return None
            node = self.producer.get(next((i for i in node.input if not self.is_constant(i)), ""))
        return None


def _infer(model: ModelProto) -> dict[str, onnx.TypeProto]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise QATError(f"the graph is no valid ONNX: {error}. Export it again") from error
    return {value.name: value.type for value in (*inferred.input, *inferred.value_info, *inferred.output)}


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or ``default``."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def type_name(element_type: int) -> str:
    """``FLOAT16`` and the like."""
    known = element_type in TensorProto.DataType.values()
    return TensorProto.DataType.Name(element_type) if known else f"type {element_type}"


def is_depthwise(view: View, conv: NodeProto) -> bool:
    """Whether every group of a convolution reads one channel."""
    shape = view.shape(conv.input[1])
    return conv.op_type == "Conv" and shape is not None and shape[1:2] == [1] and attribute(conv, "group", 1) > 1


def count(shape: list[int]) -> int:
    """Product of dimensions; -1 if one of them is open."""
    return -1 if min(shape, default=0) < 0 else math.prod(shape)
