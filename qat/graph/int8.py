"""What keeps a node from INT8: the questions that ``check_onnx`` asks beforehand and ``qat.tensorrt.inspect`` afterwards.

Rules: TensorRT's explicit quantization (developer guide, "Working with Quantized Types") and what TensorRT-RTX was observed to
do with graphs that break them. ``rtx`` is for what TensorRT-RTX alone is known to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import NodeProto

from .graph import ACTIVATIONS, MOVES, WEIGHTED, Graph, Q, attribute

OPERANDS = ("data", "weight")
# Operators that run in INT8 on what a DQ hands them, so that its pair is of use without a quantized layer behind it.
_TAKES_INT8 = frozenset(["Add", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMean", "Resize"])


@dataclass(frozen=True)
class Operand:
    """An operand of a convolution or matrix product without a Q/DQ pair, though the other one has one.

    Attributes:
        what: ``"data"`` or ``"weight"``.
        obstacle: The operator that stands between it and a DQ; ``None`` if there is no DQ.
    """

    what: str
    obstacle: NodeProto | None


def missing_operand(graph: Graph, node: NodeProto, *, rtx: bool = False) -> Operand | None:
    """The operand that keeps a product half quantized; ``None`` if both have a pair, or none has one that is for it."""
    pairs = [graph.dequantizers(name, rtx=rtx) for name in node.input[:2]]
    if all(pairs) or not any(pairs):
        return None
    missing = 1 if pairs[0] else 0
    obstacle = graph.obstacle(node.input[missing], rtx=rtx)
    # A pair may stay on data that a float layer shares with a quantized one: that costs nothing.
    if obstacle is None and pairs[0] and _serves_another(graph, pairs[0], node):
        return None
    return Operand(OPERANDS[missing], obstacle)


def _serves_another(graph: Graph, dequantizers: list[NodeProto], node: NodeProto) -> bool:
    """Whether something else runs in INT8 thanks to these pairs."""
    pending = [dequantize.output[0] for dequantize in dequantizers]
    while pending:
        for reader in graph.readers.get(pending.pop(), []):
            if reader.op_type in _TAKES_INT8 or (reader.op_type in WEIGHTED and reader is not node):
                return True
            if reader is not node and reader.op_type in MOVES:
                pending += list(reader.output)
    return False


def activation_scale(graph: Graph, pair: NodeProto) -> list[int] | None:
    """The shape of the scale of an activation's Q or DQ, where it is none of one number of rank 0."""
    scale = graph.constant(pair, 1)
    return None if scale is None or not scale.dims or graph.is_weight(pair) else list(scale.dims)


@dataclass(frozen=True)
class WrongAxis:
    """A weight that is quantized along another axis than that of the output channels.

    Attributes:
        pair: Its DQ.
        axis: The axis there.
        position: The same axis as the product reads it.
        expected: The axis of the output channels there.
    """

    pair: NodeProto
    axis: int
    position: int
    expected: int


def wrong_axes(graph: Graph, node: NodeProto, *, rtx: bool = False) -> Iterator[WrongAxis]:
    """Per-channel weights are INT8 along the output channels only, seen through what moves them on the way."""
    for i, name in enumerate(node.input[:2]):
        shape = graph.shape(name)
        for pair in graph.dequantizers(name, rtx=rtx):
            weight, scale = graph.weight(pair), graph.constant(pair, 1)
            stored = graph.shape(weight) if weight else None
            if scale is None or len(scale.dims) != 1 or list(scale.dims) == [1] or not stored or not shape:
                continue
            axis = attribute(pair, "axis", 1)
            if not -len(stored) <= axis < len(stored):
                continue
            axis %= len(stored)
            position, expected = graph.axis_at(name, axis, rtx=rtx), _output_axis(node, i, len(shape))
            if position not in (None, expected):
                yield WrongAxis(pair, axis, position, expected)


def _output_axis(node: NodeProto, operand: int, rank: int) -> int:
    """Axis of an operand that becomes an axis of the result."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 1 - operand if attribute(node, ("transA", "transB")[operand], 0) else operand
    return rank - 2 + operand


def float_readers(graph: Graph, name: str) -> Iterator[NodeProto | str]:
    """What reads the result of a product in float, through what is fused behind it: nodes, and names of graph outputs."""
    reached, pending = {name}, [name]
    while pending:
        for reader in graph.readers.get(pending.pop(), []):
            if reader.output[0] not in reached and _is_fused(graph, reader, reached):
                pending += reader.output
                reached.update(reader.output)
    for at in sorted(reached):
        if at in graph.outputs:
            yield at
        for reader in graph.readers.get(at, []):
            if reader.op_type != Q and reader.output[0] not in reached:
                yield reader


def _is_fused(graph: Graph, node: NodeProto, reached: set[str]) -> bool:
    if node.op_type == "Mul":
        return all(name in reached for name in node.input)
    if node.op_type == "Add":  # fused with the layer, if its other operand is in INT8 or constant
        others = [name for name in node.input if name not in reached]
        return all(graph.is_constant(name) or graph.dequantizers(name) for name in others)
    return node.op_type in ACTIVATIONS or node.op_type in MOVES or node.op_type == "BatchNormalization"


@dataclass(frozen=True)
class Summand:
    """An input of an Add.

    Attributes:
        pairs: The DQ nodes it comes from.
        quantize: The Q of the first of them.
        product: The convolution or matrix product that computes it, or what enters its pair.
    """

    pairs: list[NodeProto]
    quantize: NodeProto | None
    product: NodeProto | None


def summands(graph: Graph, add: NodeProto, *, rtx: bool = False) -> tuple[Summand, ...] | None:
    """Both inputs of an Add of two activations; ``None`` for another Add."""
    if len(add.input) != 2 or any(graph.is_constant(name) for name in add.input):
        return None
    found = []
    for name in add.input:
        pairs = graph.dequantizers(name)
        source = graph.before(pairs[0]) if pairs else name
        # A generated kernel of TensorRT-RTX begins behind the product and goes on through activations.
        product = graph.weighted_source(source, activated=rtx)
        found.append(Summand(pairs, graph.quantizer(pairs[0]) if pairs else None, product))
    return tuple(found)


def is_kept_apart(inputs: tuple[Summand, ...]) -> bool:
    """Whether Q/DQ stands between an Add and each product that it could be fused with.

    TensorRT then runs the Add as a kernel of its own (8.6, 10, 11); TensorRT-RTX computes it behind the product.
    """
    fed = [summand for summand in inputs if summand.product is not None]
    return bool(fed) and all(summand.pairs for summand in fed)
