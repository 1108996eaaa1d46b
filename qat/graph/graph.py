"""An ONNX graph with its edges: what reaches an input, what reads a result, and what INT8 passes through on the way.

The one reader of graphs: ``check``, ``inspect``, ``verify`` and ``parity`` ask it the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..errors import QATError
from .reading import skeleton, values

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "Gemm", "MatMul")
PRODUCTS = (*WEIGHTED, "ConvTranspose")
# They change the form of a tensor, and hand all its values on.
_RESHAPES = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# Q and DQ commute with these: codes go through them as well as values do (on TensorRT-RTX, each of them was tried). Casts
# stand around Q/DQ pairs in FP16 graphs.
MOVES = frozenset(
    (
        *_RESHAPES,
        *("DepthToSpace", "Expand", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "MaxPool", "Pad", "SpaceToDepth"),
        "Tile",
    )
)
# TensorRT-RTX takes these into the scale, or computes them on codes; of other versions it is not known.
_RTX_MOVES = frozenset(("Abs", "Neg", "ReduceMax", "ReduceMin"))
_RTX_SCALES = frozenset(("Div", "Mul"))
_RTX_JOINS = frozenset(("Max", "Min"))
# A weight does not stay INT8 behind these, though an activation does.
_NOT_ON_WEIGHTS = frozenset(("Gather", "Pad"))
# Fused behind a convolution.
ACTIVATIONS = frozenset(
    (
        *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Softplus"),
        *("Swish", "Tanh"),
    )
)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class Graph:
    """A graph with its edges. The model is not changed; functions in it are inlined.

    Args:
        model: The model; weights that lie in other files need not be loaded.
        folder: Where its external data lies; ``None`` if unknown.

    Attributes:
        nodes: In graph order.
        names: Their names. TensorRT calls a node without a name after its first output.
        positions: Of the nodes, by name.
        constants: Stored tensors by name.
        producer: The node that computes a tensor.
        readers: The nodes that read a tensor.
        inputs: The graph's inputs, stored tensors left out.
        outputs: Names of its outputs.

    Raises:
        QATError: If the nodes are not in the order in which they run.
    """

    def __init__(self, model: ModelProto, folder: str | None = None) -> None:
        self.model = model
        self._folder = folder
        self.nodes: list[NodeProto] = list((_inlined(model, folder) if model.functions else model).graph.node)
        self.names = [node.name or f"node_of_{next(iter(node.output), '')}" for node in self.nodes]
        self.positions = {name: i for i, name in enumerate(self.names)}
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.inputs = [value for value in model.graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in model.graph.output]
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self._check_order()
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
        self._values: dict[str, np.ndarray | None] = {}
        self._traces: dict[tuple[str, bool], tuple[list[NodeProto], NodeProto | None]] = {}

    def _check_order(self) -> None:
        """Nodes come after those they read, as ONNX demands; without that a search along the edges may never end."""
        computed_at = {output: i for i, node in enumerate(self.nodes) for output in node.output if output}
        for i, node in enumerate(self.nodes):
            if any(computed_at.get(name, -1) >= i for name in node.input):
                raise QATError(
                    f"{self.names[i]}: the ONNX nodes are not in the order in which they run. Export the model again"
                )

    def names_between(self, first: str, last: str) -> list[str]:
        """Names of the nodes from ``first`` to ``last`` in graph order, empty if one of them is unknown."""
        if first not in self.positions or last not in self.positions:
            return []
        return self.names[self.positions[first] : self.positions[last] + 1]

    # Tensors

    @cached_property
    def activations(self) -> frozenset[str]:
        """Tensors that depend on the graph's inputs by value, not by shape alone."""
        return self._behind_inputs(("Shape", "Size"))

    @cached_property
    def depends_on_input(self) -> frozenset[str]:
        """Tensors that are computed from the graph's inputs, from their shapes included."""
        return self._behind_inputs(())

    def _behind_inputs(self, left_out: tuple[str, ...]) -> frozenset[str]:
        found = {value.name for value in self.inputs}
        for node in self.nodes:
            if node.op_type not in left_out and not found.isdisjoint(reads(node)):
                found.update(output for output in node.output if output)
        return frozenset(found)

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

    @cached_property
    def _types(self) -> dict[str, onnx.TypeProto]:
        small = skeleton(self.model, self._folder)
        try:
            inferred = onnx.shape_inference.infer_shapes(
                onnx.inliner.inline_local_functions(small) if small.functions else small, strict_mode=False
            ).graph
        except (onnx.shape_inference.InferenceError, ValueError) as error:
            raise QATError(f"the graph is no valid ONNX: {error}. Export it again") from error
        return {value.name: value.type for value in (*inferred.input, *inferred.value_info, *inferred.output)}

    def element_type(self, name: str) -> int:
        """ONNX's number of the element type; 0 if it is unknown.

        Raises:
            QATError: If types cannot be inferred because the graph is invalid.
        """
        if name in self.constants:
            return self.constants[name].data_type
        kind = self._types.get(name)
        return kind.tensor_type.elem_type if kind is not None else 0

    def is_float(self, name: str) -> bool:
        """Tell if a tensor is of a floating type."""
        return self.element_type(name) in _FLOATS

    def shape(self, name: str) -> list[int] | None:
        """Dimensions, -1 for an open one; ``None`` if the rank is unknown.

        Raises:
            QATError: If shapes cannot be inferred because the graph is invalid.
        """
        if name in self.constants:
            return list(self.constants[name].dims)
        kind = self._types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]

    # Along the edges

    def base(self, name: str) -> str:
        """The tensor that ``name`` is a moved copy of."""
        while (node := self.producer.get(name)) is not None and node.op_type in MOVES and name not in self.constants:
            name = node.input[0]
        return name

    def is_constant(self, name: str) -> bool:
        """Tell if ``name`` has the same values for all inputs of one shape."""
        return name not in self.activations

    def ends(self, name: str) -> Iterator[NodeProto]:
        """The operators that read ``name``, seen through those that move values."""
        pending = [name]
        while pending:
            for reader in self.readers.get(pending.pop(), []):
                if reader.op_type in MOVES:
                    pending += reader.output
                else:
                    yield reader

    def live_input(self, node: NodeProto) -> str | None:
        """The one input of a node that is no constant; ``None`` if there are several or none."""
        live = [name for name in node.input if name in self.activations]
        return live[0] if len(live) == 1 else None

    def weighted_source(self, name: str, *, activated: bool = False) -> NodeProto | None:
        """The convolution or matrix product that ``name`` comes from by what TensorRT fuses behind it, if any.

        Args:
            name: The tensor.
            activated: Also through activations.
        """
        while (node := self.producer.get(name)) is not None:
            if node.op_type in PRODUCTS:
                return node
            fused = node.op_type in ("Mul", "Add", "Div", "Sub", "BatchNormalization", *_RESHAPES)
            live = self.live_input(node)
            if live is None or not (fused or (activated and node.op_type in ACTIVATIONS)):
                return None
            name = live
        return None

    # Q/DQ pairs

    @property
    def is_quantized(self) -> bool:
        """Tell if it holds any DequantizeLinear."""
        return any(node.op_type == DQ for node in self.nodes)

    def qdq(self) -> Iterator[NodeProto]:
        """Q and DQ nodes, in graph order."""
        return (node for node in self.nodes if node.op_type in (Q, DQ))

    def is_weight(self, node: NodeProto) -> bool:
        """Tell if a Q or DQ node works on a constant."""
        return self.is_constant(node.input[0])

    def weight(self, node: NodeProto) -> str | None:
        """The tensor with the shape of the weight that a Q or DQ node works on; ``None`` if that is an activation."""
        quantize = self.quantizer(node) if node.op_type == DQ else None
        name = node.input[0] if quantize is None else quantize.input[0]
        return name if self.is_constant(name) else None

    def is_constant_behind(self, name: str) -> bool:
        """Tell if a dequantized operand is a weight."""
        return any(self.is_weight(dequantize) for dequantize in self.dequantizers(name))

    def quantizer(self, dequantize: NodeProto) -> NodeProto | None:
        """The Q of a DQ, perhaps behind operators that move codes."""
        node = self.producer.get(self.base(dequantize.input[0]))
        return node if node is not None and node.op_type == Q else None

    def before(self, dequantize: NodeProto) -> str:
        """The tensor that enters the pair of a DQ."""
        quantize = self.quantizer(dequantize)
        return dequantize.input[0] if quantize is None else quantize.input[0]

    def scale_key(self, node: NodeProto) -> bytes | str:
        """Equal for equal scales."""
        scale = self.value(node, 1)
        return node.input[1] if scale is None else np.asarray(scale, np.float64).tobytes()

    # What reaches an operand as INT8

    def dequantizers(self, name: str, *, rtx: bool = False) -> list[NodeProto]:
        """The DQ nodes of one scale that ``name`` comes from; empty if TensorRT cannot take it as INT8.

        Args:
            name: The tensor.
            rtx: By what TensorRT-RTX sees through, which is more.
        """
        return self._trace(name, rtx)[0]

    def obstacle(self, name: str, *, rtx: bool = False) -> NodeProto | None:
        """The operator between a DQ and ``name`` that INT8 does not get through."""
        found, last = self._trace(name, rtx)
        if found or last is None or last.op_type in (Q, DQ):
            return None
        blocked = last.op_type == "Concat" or any(self.dequantizers(i, rtx=rtx) for i in last.input[:1])
        return last if blocked and any(self._trace(i, rtx)[0] for i in last.input if i) else None

    def axis_at(self, name: str, axis: int, *, rtx: bool = False) -> int | None:
        """Where an axis of the dequantized weight behind ``name`` lies in ``name``; ``None`` if it is mixed with others."""
        for step in reversed(self._steps(name, rtx)[0]):
            moved = self._axis_behind(step, axis)
            if moved is None:
                return None
            axis = moved
        return axis

    def _trace(self, name: str, rtx: bool) -> tuple[list[NodeProto], NodeProto | None]:
        """DQ nodes that ``name`` comes from, and the node where the search ended."""
        if (name, rtx) not in self._traces:
            self._traces[name, rtx] = self._traced(name, rtx)
        return self._traces[name, rtx]

    def _traced(self, name: str, rtx: bool) -> tuple[list[NodeProto], NodeProto | None]:
        steps, node = self._steps(name, rtx)
        if node is None:
            return [], None
        if node.op_type == DQ:
            blocking = next((step for step in steps if step.op_type in _NOT_ON_WEIGHTS), None) if self.is_weight(node) else None
            return ([node], node) if blocking is None else ([], blocking)
        if node.op_type != "Concat" and not (rtx and node.op_type in _RTX_JOINS):
            return [], node
        parts = [self._trace(i, rtx)[0] for i in node.input]
        found = list({pair.output[0]: pair for part in parts for pair in part}.values())
        whole = all(parts) and len({self.scale_key(dequantize) for dequantize in found}) == 1
        return (found if whole else []), node

    def _steps(self, name: str, rtx: bool) -> tuple[list[NodeProto], NodeProto | None]:
        """The nodes that hand INT8 on to ``name``, the last one first, and the node before them."""
        steps: list[NodeProto] = []
        while (node := self.producer.get(name)) is not None and name not in self.constants:
            source = self._handed_on(node, rtx)
            if source is None:
                return steps, node
            steps.append(node)
            name = source
        return steps, node

    def _handed_on(self, node: NodeProto, rtx: bool) -> str | None:
        """The input whose INT8 values a node hands on; ``None`` if it does not."""
        if node.op_type in MOVES:
            return node.input[0] if node.op_type != "Pad" or self._pads_with_own_values(node) else None
        if rtx and node.op_type in _RTX_MOVES:
            return node.input[0]
        if rtx and node.op_type in _RTX_SCALES:
            numbers = [name in self.constants and math.prod(self.constants[name].dims) == 1 for name in node.input]
            if numbers in ([False, True], [True, False]) and not (node.op_type == "Div" and numbers[0]):
                return node.input[numbers.index(False)]
        return None

    def _pads_with_own_values(self, node: NodeProto) -> bool:
        """Padding with anything but zero adds values that no code may have."""
        if attribute(node, "mode", b"constant") != b"constant":
            return True
        return len(node.input) < 3 or not node.input[2] or ((fill := self.value(node, 2)) is not None and not fill.any())

    def _axis_behind(self, step: NodeProto, axis: int) -> int | None:
        if step.op_type not in ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "GatherND"):
            return axis
        shapes = [self.shape(step.input[0]), self.shape(step.output[0])]
        if step.op_type == "Transpose":
            order = list(attribute(step, "perm", None) or range(len(shapes[0] or []))[::-1])
            return order.index(axis) if axis in order else None
        before, after = shapes
        if before is None or after is None or -1 in (*before, *after) or axis >= len(before):
            return None
        if step.op_type == "Expand":
            return axis + len(after) - len(before)
        # The same axis still, if as many elements lie before it and it is as long.
        outer = math.prod(before[:axis])
        same = (i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == outer)
        return next(same, None) if math.prod(before) == math.prod(after) else None


def _inlined(model: ModelProto, folder: str | None) -> ModelProto:
    try:
        return onnx.inliner.inline_local_functions(skeleton(model, folder))
    except (RuntimeError, ValueError) as error:
        raise QATError(f"the graph is no valid ONNX: its functions cannot be inlined: {error}. Export it again") from error


def reads(node: NodeProto) -> Iterator[str]:
    """The tensors that a node reads, in its subgraphs, too."""
    yield from node.input
    for entry in node.attribute:
        for subgraph in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            for inner in subgraph.node:
                yield from reads(inner)
            yield from (value.name for value in subgraph.output)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or ``default``."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def type_name(element_type: int) -> str:
    """``FLOAT16`` and the like."""
    known = element_type in TensorProto.DataType.values()
    return TensorProto.DataType.Name(element_type) if known else f"type {element_type}"


def is_depthwise(graph: Graph, conv: NodeProto) -> bool:
    """Whether every group of a convolution reads one channel."""
    shape = graph.shape(conv.input[1])
    return conv.op_type == "Conv" and shape is not None and shape[1:2] == [1] and attribute(conv, "group", 1) > 1


def count(shape: list[int]) -> int:
    """Product of dimensions; -1 if one of them is open."""
    return -1 if min(shape, default=0) < 0 else math.prod(shape)
