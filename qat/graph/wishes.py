"""What an ONNX graph asks to be run in INT8, and which of its features keep TensorRT from doing so.

The graph alone is read; rules: TensorRT's explicit quantization (developer guide, "Working with Quantized Types") and what
TensorRT-RTX was observed to do with graphs that break them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import QATError

if TYPE_CHECKING:
    import onnx

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
# These hand a tensor on without changing values.
_MOVES = ("Transpose", "Reshape", "Slice", "Split", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean")
# TensorRT fuses these into the convolution or matrix product before them: batch norm, layer scale, bias.
_EPILOGUE = ("BatchNormalization", "Dropout", "Mul", "Add")
# And these: activations. A Mul is one if both operands come from the same layer (SiLU).
_ACTIVATIONS = ("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Swish", "Tanh")
_BEHIND = (*_ACTIVATIONS, *_MOVES, "BatchNormalization", "Dropout")


@dataclass(frozen=True)
class Wish:
    """A node that the graph asks to be run in INT8, or an Add, a gate or a pooling next to such nodes.

    Attributes:
        node: Name of the ONNX node.
        op: Its operator.
        group: ``"conv"``, ``"linear"`` (Gemm and MatMul), ``"add"``, ``"gate"`` (the product of two) or ``"pool"``.
        obstacle: What in the graph keeps TensorRT from running it in INT8, or an Add from being fused; ``None`` if nothing.
        detail: Its size, for messages.
        position: Of the node in the graph.
        float_reader: What reads the result of a convolution or matrix product in float, so that its kernel must write float;
            ``None`` if nothing does.
    """

    node: str
    op: str
    group: str
    obstacle: str | None
    detail: str
    position: int
    float_reader: str | None = None


class Graph:
    """An ONNX graph with its edges, and what it asks for.

    Args:
        model: The model; weights that lie in other files need not be loaded.

    Raises:
        QATError: If the nodes are not sorted.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        # TensorRT calls a node without a name after its first output.
        self.names = [node.name or f"node_of_{node.output[0]}" for node in self.nodes]
        self.positions = {name: i for i, name in enumerate(self.names)}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._check_order()
        self.activations = self._activations(model)

    def _check_order(self) -> None:
        """Nodes come after those they read, as ONNX demands; without that a search along the edges may never end."""
        positions = {output: i for i, node in enumerate(self.nodes) for output in node.output}
        for i, node in enumerate(self.nodes):
            if any(positions.get(name, -1) >= i for name in node.input):
                raise QATError(
                    f"{self.names[i]}: the ONNX nodes are not in the order in which they run. Export the model again"
                )

    def _activations(self, model: onnx.ModelProto) -> set[str]:
        """Tensors that depend on the model's inputs by value, not by shape alone."""
        found = {value.name for value in model.graph.input} - set(self.constants)
        for node in self.nodes:
            if node.op_type not in ("Shape", "Size") and any(name in found for name in node.input):
                found.update(node.output)
        return found

    @property
    def is_quantized(self) -> bool:
        """Whether it holds any DequantizeLinear."""
        return any(node.op_type == _DQ for node in self.nodes)

    def wishes(self) -> tuple[Wish, ...]:
        """What should run in INT8, every Add and pooling of activations, and every quantized gate, in graph order."""
        found: list[Wish] = []
        for i, (node, name) in enumerate(zip(self.nodes, self.names, strict=True)):
            if node.op_type in _PRODUCTS and self._wants_int8(node):
                group = "conv" if node.op_type.startswith("Conv") else "linear"
                obstacle, reader = self._product_obstacle(node), self._float_reader(node)
                found.append(Wish(name, node.op_type, group, obstacle, self._size(node), i, reader))
            elif node.op_type == "Add" and self._joins_activations(node):
                found.append(Wish(name, "Add", "add", self._add_obstacle(node), "", i))
            elif node.op_type == "Mul" and self._joins_activations(node) and all(map(self.dequantize, node.input)):
                found.append(Wish(name, "Mul", "gate", None, "", i))
            elif node.op_type in _POOLS and self._is_pool(node):
                found.append(Wish(name, node.op_type, "pool", self._pool_obstacle(node), "", i))
        return tuple(found)

    # Convolutions and matrix products

    def _wants_int8(self, node: Any) -> bool:
        data, weight = (self.dequantize(name) for name in node.input[:2])
        if data is not None and weight is None:
            # A pair may stay on data that a float layer shares with a quantized one: that asks for nothing.
            return all(reader is node for reader in self._readers_behind(data.output[0]))
        return weight is not None

    def _product_obstacle(self, node: Any) -> str | None:
        pairs = [self.dequantize(name) for name in node.input[:2]]
        for pair, operand in zip(pairs, ("data", "weight"), strict=True):
            if pair is None:
                return f"its {operand} has no Q/DQ: quantize both operands or none"
        if node.op_type == "ConvTranspose":
            return "transposed convolutions run in float despite Q/DQ: leave them without"
        for pair, tensor in zip(pairs, node.input[:2], strict=True):
            obstacle = self._weight_axis(node, pair, tensor) if self._is_weight(pair) else self._activation_scale(pair)
            if obstacle is not None:
                return obstacle
        return None

    def _activation_scale(self, pair: Any) -> str | None:
        scale = self.constants.get(pair.input[1])
        if scale is None or not scale.dims:
            return None
        what = "a scale of rank 0" if list(scale.dims) == [1] else "one scale for the whole tensor"
        return f"its activation scale ({self._name(pair)}) has shape {list(scale.dims)}: use {what}"

    def _weight_axis(self, node: Any, pair: Any, tensor: str) -> str | None:
        """Per-channel weights are INT8 only along the output channels, seen through what moves them on the way."""
        scale = self.constants.get(pair.input[1])
        data = self._weight_data(pair)
        if scale is None or data is None or not data.dims or list(scale.dims) in ([], [1]) or tensor == node.input[0]:
            return None
        rank = len(data.dims)
        axis = _attribute(pair, "axis", 1) % rank
        moved = axis
        # From the weight to its operator; Reshape and Flatten may mix axes, so that nothing can be said.
        for step in reversed(self._steps(tensor)):
            if step.op_type == "Transpose":
                permutation = next((list(a.ints) for a in step.attribute if a.name == "perm"), list(range(rank))[::-1])
                moved = permutation.index(moved)
            elif step.op_type not in ("Slice", "Split", "Identity", "Cast"):
                return None
        if node.op_type == "Conv":
            expected = 0
        else:
            expected = 0 if _attribute(node, "transB", 0) else rank - 1
        if moved == expected:
            return None
        return f"its weight is quantized along axis {axis} ({self._name(pair)}): use the axis of the output channels"

    def _float_reader(self, node: Any) -> str | None:
        """What reads the result in float, through the activation behind it."""
        reached, pending = {node.output[0]}, [node.output[0]]
        while pending:
            for reader in self.readers.get(pending.pop(), []):
                if reader.output[0] not in reached and self._is_activation(reader, reached):
                    reached.add(reader.output[0])
                    pending.append(reader.output[0])
        for name in sorted(reached):
            for reader in self.readers.get(name, []):
                if reader.op_type != _Q and reader.output[0] not in reached:
                    return self._name(reader)
        return None

    def _is_activation(self, node: Any, reached: set[str]) -> bool:
        if node.op_type == "Mul":
            return all(name in reached for name in node.input)
        if node.op_type == "Add":  # fused with the layer, if its other operand is in INT8 or constant
            others = [name for name in node.input if name not in reached]
            return all(name not in self.activations or self.dequantize(name) is not None for name in others)
        return node.op_type in _BEHIND

    # Adds

    def _joins_activations(self, node: Any) -> bool:
        return len(node.input) == 2 and all(name in self.activations for name in node.input)

    def _add_obstacle(self, node: Any) -> str | None:
        pairs = [self.dequantize(name) for name in node.input]
        sources = [self._fed_by_product(self._before(pair, name)) for pair, name in zip(pairs, node.input, strict=True)]
        if not any(sources):
            return "no convolution or matrix product feeds it directly"
        fusable = [name for name, pair, fed in zip(node.input, pairs, sources, strict=True) if fed and pair is None]
        if not fusable:
            return (
                "its input from a convolution or matrix product has Q/DQ, which keeps the two apart: export with fuse_adds=True"
            )
        return None

    def _before(self, pair: Any | None, name: str) -> str:
        """The tensor behind a Q/DQ pair, or the tensor itself."""
        if pair is None:
            return name
        producer = self.producer.get(pair.input[0])
        return producer.input[0] if producer is not None and producer.op_type == _Q else pair.input[0]

    def _fed_by_product(self, name: str) -> bool:
        """Whether a Conv, Gemm or MatMul computes the tensor, up to what TensorRT fuses behind it."""
        while (node := self.producer.get(name)) is not None:
            if node.op_type in _PRODUCTS:
                return True
            live = [tensor for tensor in node.input if tensor in self.activations]
            if node.op_type not in (*_EPILOGUE, *_MOVES) or len(live) != 1:
                return False
            name = live[0]
        return False

    # Pooling

    def _is_pool(self, node: Any) -> bool:
        # ReduceMean is part of a LayerNorm as well; one that reads a Q/DQ pair is a pooling.
        return node.op_type != "ReduceMean" or self.dequantize(node.input[0]) is not None

    def _pool_obstacle(self, node: Any) -> str | None:
        before = self.dequantize(node.input[0]) is not None
        after = any(reader.op_type == _Q for reader in self._readers_behind(node.output[0]))
        if before or (after and "Max" in node.op_type):
            return None
        return "no Q/DQ around it: quantize its input"

    # Edges

    def dequantize(self, name: str) -> Any | None:
        """The DequantizeLinear that a tensor comes from, seen through what only moves values."""
        steps = self._steps(name)
        node = self.producer.get(steps[-1].input[0] if steps else name)
        return node if node is not None and node.op_type == _DQ else None

    def _steps(self, name: str) -> list[Any]:
        """The nodes that move the values of a tensor, the last one first."""
        steps = []
        while (node := self.producer.get(name)) is not None and node.op_type in _MOVES:
            steps.append(node)
            name = node.input[0]
        return steps

    def _readers_behind(self, name: str) -> Iterator[Any]:
        pending = [name]
        while pending:
            for reader in self.readers.get(pending.pop(), []):
                if reader.op_type in _MOVES:
                    pending += reader.output
                else:
                    yield reader

    def _weight_data(self, pair: Any) -> Any | None:
        """The constant that a DequantizeLinear works on, through the Q before it."""
        name = pair.input[0]
        while name not in self.constants:
            node = self.producer.get(name)
            if node is None or node.op_type not in (_Q, "Cast", "Identity", "Clip"):
                return None
            name = node.input[0]
        return self.constants[name]

    def _is_weight(self, pair: Any) -> bool:
        return pair.input[0] not in self.activations

    def _size(self, node: Any) -> str:
        """Such as ``64 -> 128 channels, 3x3, 4 groups``."""
        pair = self.dequantize(node.input[1])
        data = self._weight_data(pair) if pair is not None else self.constants.get(node.input[1])
        if data is None:
            return ""
        if node.op_type == "Conv":
            groups = _attribute(node, "group", 1)
            out, into, *kernel = data.dims
            text = f"{into * groups} -> {out} channels, {'x'.join(map(str, kernel))}"
            return text + (f", {groups} groups" if groups > 1 else "")
        return f"weight {'x'.join(map(str, data.dims))}"

    def _name(self, node: Any) -> str:
        return node.name or f"node_of_{node.output[0]}"


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def between(graph: Graph, first: str, last: str) -> Iterable[str]:
    """Names of the nodes from ``first`` to ``last`` in graph order, empty if one of them is unknown."""
    if first not in graph.positions or last not in graph.positions:
        return ()
    return graph.names[graph.positions[first] : graph.positions[last] + 1]
