"""Variants of a graph that tell what is no fault of an engine, and one that tells what INT8 costs.

One has its sums in another order; one has results rounded to fewer bits, as Winograd and integer kernels do; one has results
rounded to FP16. The last one has no Q/DQ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..graph.graph import DQ, PRODUCTS, Graph, Q, attribute

# Float32 has 24. Winograd kernels lose some 7 of them; INT8 kernels that add the bias in units of their accumulator
# (scale of the data times scale of the weight) lose up to 10.
KEPT_BITS = 14
_FLOAT32_BITS, _FLOAT16_BITS = 24, 11


def reversed_sums(graph: Graph) -> ModelProto:
    """The graph with convolutions and matrix products adding up their terms from last to first."""
    return _changed(graph, partial(_reversed, graph))


def unquantized(graph: Graph) -> ModelProto:
    """The graph without its Q/DQ pairs; weights that are stored as codes stay rounded."""
    return _changed(graph, partial(_unquantized, graph))


def rounded(graph: Graph, *, half: bool, nodes: Collection[str] | None = None) -> ModelProto:
    """The graph with every float32 result rounded.

    Args:
        graph: The graph.
        half: Round to FP16, the constants and inputs that a node reads included, and what is FP16 already to one bit less;
            otherwise to ``KEPT_BITS`` bits.
        nodes: Names of the nodes whose results are rounded; all by default.
    """
    return _changed(graph, partial(_rounded, graph, half, nodes))


def is_rounded(graph: Graph, node: NodeProto, chosen: Collection[str] | None = None) -> bool:
    """Whether a node computes anew in float: codes are exact in any precision, and their scales stay float32."""
    if node.op_type in (Q, DQ, "Constant", "Cast", "Shape", "Identity") or node.output[0] not in graph.depends_on_input:
        return False
    return chosen is None or node.name in chosen


def _changed(graph: Graph, change: Callable[[NodeProto], Iterable[NodeProto]]) -> ModelProto:
    """A copy of the model in which each node is replaced by those that ``change`` makes of it."""
    copy = ModelProto()
    copy.CopyFrom(graph.model)
    del copy.graph.node[:]
    copy.graph.node.extend(new for node in graph.nodes for new in change(node))
    return copy


def _reversed(graph: Graph, node: NodeProto) -> Iterator[NodeProto]:
    axes = _summed(graph, node)
    changed = NodeProto()
    changed.CopyFrom(node)
    for i, (axis, groups, size) in enumerate(axes):
        prefix = f"{node.output[0]}/reversed{i}"
        changed.input[i] = prefix
        if groups == 1:
            for key, value in (("starts", -1), ("ends", -(2**62)), ("axes", axis), ("steps", -1)):
                yield _constant(f"{prefix}/{key}", np.array([value], np.int64))
            names = [f"{prefix}/{key}" for key in ("starts", "ends", "axes", "steps")]
            yield helper.make_node("Slice", [node.input[i], *names], [prefix], name=prefix)
        else:
            order = np.arange(groups * size).reshape(groups, size)[:, ::-1].reshape(-1)
            yield _constant(f"{prefix}/order", order.astype(np.int64))
            yield helper.make_node("Gather", [node.input[i], f"{prefix}/order"], [prefix], name=prefix, axis=axis)
    yield changed


def _unquantized(graph: Graph, node: NodeProto) -> Iterator[NodeProto]:
    quantize = graph.producer.get(node.input[0]) if node.op_type == DQ else None
    if quantize is None or quantize.op_type != Q:
        yield node
    else:
        yield helper.make_node("Identity", [quantize.input[0]], [node.output[0]], name=node.name)


def _summed(graph: Graph, node: NodeProto) -> list[tuple[int, int, int]]:
    """For both operands of a product: the axis that is summed over, its number of groups and their size."""
    if node.op_type == "Gemm":
        transposed = [attribute(node, name, 0) for name in ("transA", "transB")]
        return [(0 if transposed[0] else 1, 1, 0), (1 if transposed[1] else 0, 1, 0)]
    weight = graph.shape(node.input[1]) if node.op_type in PRODUCTS else None
    if not weight:
        return []
    if node.op_type == "MatMul":
        return [(-1, 1, 0), (-1 if len(weight) == 1 else -2, 1, 0)]
    groups = attribute(node, "group", 1)
    if node.op_type == "Conv":
        return [(1, groups, weight[1]), (1, 1, weight[1])] if weight[1] > 1 else []
    size = weight[0] // groups
    return [(1, groups, size), (0, groups, size)] if size > 1 else []


def _rounded(graph: Graph, half: bool, chosen: Collection[str] | None, node: NodeProto) -> Iterator[NodeProto]:
    if not is_rounded(graph, node, chosen):
        yield node
        return
    changed = NodeProto()
    changed.CopyFrom(node)
    float32 = TensorProto.FLOAT
    for i, name in enumerate(node.input if half else ()):
        producer = graph.producer.get(name)
        # What comes from a rounded node is rounded already; products of codes are exact in any precision.
        is_exact = producer is not None and (producer.op_type == DQ or is_rounded(graph, producer, chosen))
        if graph.element_type(name) == float32 and not is_exact:
            changed.input[i] = f"{node.output[0]}/operand{i}"
            yield from _to_half_and_back(name, changed.input[i])
    kinds = (float32, TensorProto.FLOAT16) if half else (float32,)
    results = [i for i, name in enumerate(node.output) if name and graph.element_type(name) in kinds]
    for i in results:
        changed.output[i] = f"{node.output[i]}/exact"
    yield changed
    for i in results:
        is_float32 = graph.element_type(node.output[i]) == float32
        make = _to_fewer_bits if not half else _to_half_and_back if is_float32 else _to_fewer_bits_of_half
        yield from make(changed.output[i], node.output[i])


def _constant(name: str, value: np.ndarray) -> NodeProto:
    return helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(value, name))


def _to_half_and_back(source: str, target: str) -> Iterable[NodeProto]:
    make, half = helper.make_node, f"{target}/half"
    return [
        make("Cast", [source], [half], name=half, to=TensorProto.FLOAT16),
        make("Cast", [half], [target], name=f"{target}/float", to=TensorProto.FLOAT),
    ]


def _to_fewer_bits_of_half(source: str, target: str) -> Iterable[NodeProto]:
    """One bit less than FP16's 11: two FP16 kernels differ in the last one."""
    make, wide, narrow = helper.make_node, f"{target}/wide", f"{target}/narrow"
    return [
        make("Cast", [source], [wide], name=wide, to=TensorProto.FLOAT),
        *_to_fewer_bits(wide, narrow, _FLOAT16_BITS - 1),
        make("Cast", [narrow], [target], name=f"{target}/half", to=TensorProto.FLOAT16),
    ]


def _to_fewer_bits(source: str, target: str, kept: int = KEPT_BITS) -> Iterable[NodeProto]:
    """Veltkamp's splitting (Dekker 1971, section 5): c = (2^s + 1) x, and c - (c - x) is x rounded to 24 - s bits."""
    make = helper.make_node
    factor, product, rest = f"{target}/factor", f"{target}/product", f"{target}/rest"
    return [
        _constant(factor, np.array(2 ** (_FLOAT32_BITS - kept) + 1, np.float32)),
        make("Mul", [source, factor], [product], name=product),
        make("Sub", [product, source], [rest], name=rest),
        make("Sub", [product, rest], [target], name=f"{target}/rounded"),
    ]
