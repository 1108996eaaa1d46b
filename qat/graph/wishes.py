"""What an ONNX graph asks to be run in INT8, and which of its features keep TensorRT from doing so; the graph alone is read."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from .graph import PRODUCTS, Graph, Q, attribute
from .int8 import activation_scale, float_readers, is_kept_apart, missing_operand, summands, wrong_axes

_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean")


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


def wishes(graph: Graph, *, rtx: bool = False) -> tuple[Wish, ...]:
    """What should run in INT8, every Add and pooling of activations, and every quantized gate, in graph order.

    Args:
        graph: The graph.
        rtx: Name the obstacles for TensorRT-RTX, which sees through more than other versions are known to.
    """
    found: list[Wish] = []
    for i, (node, name) in enumerate(zip(graph.nodes, graph.names, strict=True)):
        if node.op_type in PRODUCTS and _wants_int8(graph, node, rtx):
            group = "conv" if node.op_type.startswith("Conv") else "linear"
            obstacle, reader = _product_obstacle(graph, node, rtx), _float_reader(graph, node)
            found.append(Wish(name, node.op_type, group, obstacle, _size(graph, node), i, reader))
        elif node.op_type == "Add" and (inputs := summands(graph, node, rtx=rtx)) is not None:
            if not any(summand.product for summand in inputs):
                why: str | None = "no convolution or matrix product feeds it directly"
            elif is_kept_apart(inputs) and not rtx:
                why = "its input from a convolution or matrix product has Q/DQ, which keeps the two apart: export with "
                why += "fuse_adds=True"
            else:
                why = None
            found.append(Wish(name, "Add", "add", why, "", i))
        elif node.op_type == "Mul" and len(node.input) == 2 and _is_gate(graph, node):
            found.append(Wish(name, "Mul", "gate", None, "", i))
        elif node.op_type in _POOLS and _is_pool(graph, node):
            found.append(Wish(name, node.op_type, "pool", _pool_obstacle(graph, node), "", i))
    return tuple(found)


def _wants_int8(graph: Graph, node: NodeProto, rtx: bool) -> bool:
    both = all(graph.dequantizers(name, rtx=rtx) for name in node.input[:2])
    return both or missing_operand(graph, node, rtx=rtx) is not None


def _product_obstacle(graph: Graph, node: NodeProto, rtx: bool) -> str | None:
    missing = missing_operand(graph, node, rtx=rtx)
    if missing is not None and missing.obstacle is None:
        return f"its {missing.what} has no Q/DQ: quantize both operands or none"
    if missing is not None and missing.obstacle is not None:
        name, op = _name(missing.obstacle), missing.obstacle.op_type
        if op == "Concat":
            return (
                f"its {missing.what} comes from {name} (Concat), whose inputs differ in scale or are float: give them one scale"
            )
        return f"{name} ({op}) stands between DequantizeLinear and its {missing.what}: place the Q/DQ pair behind it"
    if node.op_type == "ConvTranspose":
        return "transposed convolutions run in float despite Q/DQ: leave them without"
    for name in node.input[:2]:
        for pair in graph.dequantizers(name, rtx=rtx):
            shape = activation_scale(graph, pair)
            if shape is not None:
                what = "a scale of rank 0" if shape == [1] else "one scale for the whole tensor"
                return f"its activation scale ({_name(pair)}) has shape {shape}: use {what}"
    for wrong in wrong_axes(graph, node, rtx=rtx):
        return f"its weight is quantized along axis {wrong.axis} ({_name(wrong.pair)}): use the axis of the output channels"
    return None


def _float_reader(graph: Graph, node: NodeProto) -> str | None:
    return next((_name(reader) for reader in float_readers(graph, node.output[0]) if isinstance(reader, NodeProto)), None)


def _is_gate(graph: Graph, node: NodeProto) -> bool:
    return all(not graph.is_constant(name) and graph.dequantizers(name) for name in node.input)


def _is_pool(graph: Graph, node: NodeProto) -> bool:
    # ReduceMean is part of a LayerNorm as well; one that reads a Q/DQ pair is a pooling.
    return node.op_type != "ReduceMean" or bool(graph.dequantizers(node.input[0]))


def _pool_obstacle(graph: Graph, node: NodeProto) -> str | None:
    after = any(reader.op_type == Q for reader in graph.ends(node.output[0]))
    if graph.dequantizers(node.input[0]) or (after and "Max" in node.op_type):
        return None
    return "no Q/DQ around it: quantize its input"


def _size(graph: Graph, node: NodeProto) -> str:
    """Such as ``64 -> 128 channels, 3x3, 4 groups``."""
    pairs = graph.dequantizers(node.input[1])
    weight = graph.weight(pairs[0]) if pairs else node.input[1]
    dims = graph.shape(weight) if weight and graph.is_constant(weight) else None
    if not dims:
        return ""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        out, into, *kernel = dims
        text = f"{into * groups} -> {out} channels, {'x'.join(map(str, kernel))}"
        return text + (f", {groups} groups" if groups > 1 else "")
    return f"weight {'x'.join(map(str, dims))}"


def _name(node: NodeProto) -> str:
    return node.name or f"node_of_{node.output[0]}"
