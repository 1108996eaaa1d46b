"""What builds, but quietly does not run in INT8."""

from __future__ import annotations

import json
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from ..graph import DQ, MOVES, WEIGHTED, Graph, Q, attribute
from ..int8 import activation_scale, missing_operand, wrong_axes
from .finding import Finding, Rule, Target, name_of


def _activation_scales(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.qdq():
        shape = activation_scale(graph, node)
        if shape is None:
            continue
        single = shape == [1]
        # The parser of TensorRT 10.1 takes one element of any rank for a per-tensor scale.
        level = "note" if single and not target.is_any_of("rtx") else "loss"
        what = "a scale of shape [1] runs in float on TensorRT-RTX" if single else "per-channel scales are for weights"
        problem = f"activation scale of shape {shape}: {what}"
        yield Finding(name_of(node), problem, "Use one scale of rank 0", level, "activation-scale")


def _output_axes(graph: Graph, target: Target) -> Iterator[Finding]:
    """The axis of a per-channel weight is that of its operator's output channels."""
    for node in graph.nodes:
        for wrong in wrong_axes(graph, node, rtx=target.is_rtx) if node.op_type in WEIGHTED else ():
            problem = f"per-channel weight of {name_of(node)} on axis {wrong.position}, which does not run in INT8"
            remedy = f"Quantize along axis {wrong.expected}, the output channels"
            yield Finding(name_of(wrong.pair), problem, remedy, "loss", "output-axis")


def _codes(graph: Graph, target: Target) -> Iterator[Finding]:
    """Codes are read by DequantizeLinear."""
    for node in graph.qdq():
        if node.op_type != Q:
            continue
        ends = list(_code_readers(graph, node.output[0]))
        if any(end.op_type != DQ for end in ends) or (not ends and node.output[0] not in graph.outputs):
            problem = "its codes are read by something else than DequantizeLinear"
            yield Finding(name_of(node), problem, "Write Q and DQ in pairs", "loss", "codes")


def _code_readers(graph: Graph, name: str) -> Iterator[NodeProto]:
    """Like ``Graph.ends``, but also through a Concat, and a Cast of codes ends them."""
    pending, seen = [name], {name}
    while pending:
        for reader in graph.readers.get(pending.pop(), []):
            if reader.op_type == "Concat" or (reader.op_type in MOVES and reader.op_type != "Cast"):
                pending += [output for output in reader.output if output not in seen]
                seen.update(reader.output)
            else:
                yield reader


def _operands(graph: Graph, target: Target) -> Iterator[Finding]:
    """Both operands of a weighted operator come from DQ, or neither."""
    for node in graph.nodes:
        if node.op_type == "ConvTranspose" and any(graph.dequantizers(name) for name in node.input[:2]):
            problem = "transposed convolutions run in half precision despite Q/DQ"
            yield Finding(name_of(node), problem, "Leave them in float", "note", "transposed")
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        data, weight = (graph.dequantizers(name, rtx=target.is_rtx) for name in node.input[:2])
        if any(_is_block(graph, dequantize) for dequantize in weight):
            yield from _block_weight(graph, node, weight)
        elif data and weight:
            if target.sm == 75 and target.is_any_of("rtx") and node.op_type == "Conv":
                problem = "INT8 convolutions run in half precision on SM75 with TensorRT-RTX"
                yield Finding(name_of(node), problem, "Use TensorRT, or a GPU from SM80 on", "loss", "turing")
        elif (missing := missing_operand(graph, node, rtx=target.is_rtx)) is not None:
            if missing.obstacle is not None:
                yield _behind(node, missing.what, missing.obstacle)
            else:
                problem = f"its {missing.what} has no Q/DQ, so it does not run in INT8"
                yield Finding(name_of(node), problem, "Quantize both operands or none", "loss", "operands")


def _behind(node: NodeProto, what: str, obstacle: NodeProto) -> Finding:
    name = name_of(obstacle)
    if obstacle.op_type == "Concat":
        problem = (
            f"its {what} comes from {name} (Concat), whose inputs differ in scale or are float, so it does not run in INT8"
        )
        return Finding(
            name_of(node), problem, f"Give all inputs of {name} one scale, or quantize its output", "loss", "operands"
        )
    problem = f"{name} ({obstacle.op_type}) stands between DequantizeLinear and its {what}, so it does not run in INT8"
    return Finding(name_of(node), problem, f"Place the Q/DQ pair behind {name}", "loss", "operands")


def _is_block(graph: Graph, dequantize: NodeProto) -> bool:
    scale = graph.constant(dequantize, 1)
    return bool(attribute(dequantize, "block_size", 0)) or (scale is not None and len(scale.dims) > 1)


def _block_weight(graph: Graph, node: NodeProto, weight: list[NodeProto]) -> Iterator[Finding]:
    for dequantize in weight:
        kind = graph.element_type(dequantize.input[0])
        if kind == TensorProto.INT8:
            problem = f"INT8 weight of {name_of(node)} in blocks: it is dequantized, the product runs in float"
            yield Finding(name_of(dequantize), problem, "Use one scale for each output channel", "loss", "block")
        elif kind == TensorProto.INT4:
            shape = graph.shape(dequantize.input[0]) or []
            axis, size = attribute(dequantize, "axis", 1), attribute(dequantize, "block_size", 0)
            inner = 0 if node.op_type == "MatMul" or not attribute(node, "transB", 0) else len(shape) - 1
            if size > 128 or (shape and len(shape) == 2 and axis % len(shape) != inner):
                problem = f"INT4 weight in blocks of {size} on axis {axis}, which is not fused with {name_of(node)}"
                yield Finding(name_of(dequantize), problem, f"Use blocks of up to 128 on axis {inner}", "loss", "block")


def _metadata(graph: Graph, target: Target) -> Iterator[Finding]:
    """The file says which sites it has; a graph tool may have folded them away."""
    if "qat.sites" not in graph.metadata:
        return
    try:
        sites = json.loads(graph.metadata["qat.sites"])
        names = {name for calls in sites.values() for name in calls}
    except (ValueError, AttributeError, TypeError):
        yield Finding("graph", "its entry qat.sites is no table of sites", "Export it again", "note", "metadata")
        return
    missing = sorted(names - {node.name for node in graph.qdq()}, key=str)
    if names and not any(True for _ in graph.qdq()):
        problem = f"no Q/DQ is left of {len(names)}: a graph tool folded them, everything runs in float"
        yield Finding("graph", problem, "Export again and use a tool that keeps Q/DQ, such as qat simplify", "loss", "metadata")
    elif missing:
        problem = f"{len(missing)} of {len(names)} Q/DQ pairs are gone or renamed, the first is {missing[0]}"
        yield Finding("graph", problem, "Make sure that a tool merged equal pairs only", "note", "metadata")


RULES: tuple[Rule, ...] = (_activation_scales, _output_axes, _codes, _operands, _metadata)
