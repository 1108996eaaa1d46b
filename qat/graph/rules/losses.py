"""What builds, but quietly does not run in INT8."""

from __future__ import annotations

import json
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from ..view import DQ, WEIGHTED, Q, View, attribute
from .finding import Finding, Rule, Target, name_of

# Operators that run in INT8 on what a DQ hands them, so that its pair is of use without a quantized layer behind it.
_TAKES_INT8 = frozenset(["Add", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMean", "Resize"])


def _activation_scales(view: View, target: Target) -> Iterator[Finding]:
    for node in view.qdq():
        scale = view.constant(node, 1)
        if scale is None or not scale.dims or view.is_weight(node):
            continue
        single = list(scale.dims) == [1]
        # The parser of TensorRT 10.1 takes one element of any rank for a per-tensor scale.
        level = "note" if single and not target.is_any_of("rtx") else "loss"
        what = "a scale of shape [1] runs in float on TensorRT-RTX" if single else "per-channel scales are for weights"
        problem = f"activation scale of shape {list(scale.dims)}: {what}"
        yield Finding(name_of(node), problem, "Use one scale of rank 0", level, "activation-scale")


def _output_axes(view: View, target: Target) -> Iterator[Finding]:
    """The axis of a per-channel weight is that of its operator's output channels."""
    for node in view.qdq():
        weight = view.weight(node)
        scale, shape = view.constant(node, 1), view.shape(weight) if weight else None
        if node.op_type != DQ or scale is None or len(scale.dims) != 1 or list(scale.dims) == [1] or not shape:
            continue
        axis = attribute(node, "axis", 1)
        if -len(shape) <= axis < len(shape):
            yield from _wrong_axis(view, node, axis % len(shape), len(shape))


def _wrong_axis(view: View, dequantize: NodeProto, axis: int, rank: int) -> Iterator[Finding]:
    pending = [(dequantize.output[0], axis)]
    while pending:
        name, position = pending.pop()
        for reader in view.readers.get(name, []):
            if reader.op_type == "Transpose":
                perm = attribute(reader, "perm", None)
                moved = list(perm).index(position) if perm and position in perm else rank - 1 - position
                pending.append((reader.output[0], moved))
            elif reader.op_type in ("Slice", "Split", "Cast", "Identity", "Dropout"):
                pending += [(output, position) for output in reader.output]
            elif reader.op_type in WEIGHTED and reader.input[1] == name:
                expected = {"Conv": 0, "Gemm": 0 if attribute(reader, "transB", 0) else 1, "MatMul": rank - 1}[reader.op_type]
                if position != expected:
                    problem = f"per-channel weight of {name_of(reader)} on axis {position}, which does not run in INT8"
                    remedy = f"Quantize along axis {expected}, the output channels"
                    yield Finding(name_of(dequantize), problem, remedy, "loss", "output-axis")


def _codes(view: View, target: Target) -> Iterator[Finding]:
    """Codes are read by DequantizeLinear."""
    for node in view.qdq():
        if node.op_type != Q:
            continue
        ends = list(_code_readers(view, node.output[0]))
        if any(end.op_type != DQ for end in ends) or (not ends and node.output[0] not in view.outputs):
            problem = "its codes are read by something else than DequantizeLinear"
            yield Finding(name_of(node), problem, "Write Q and DQ in pairs", "loss", "codes")


def _code_readers(view: View, name: str) -> Iterator[NodeProto]:
    """Like ``View.ends``, but a Cast of codes ends them."""
    for reader in view.readers.get(name, []):
        if reader.op_type == "Cast":
            yield reader
        elif view.base(reader.output[0]) == view.base(name) and reader.op_type != DQ:
            for output in reader.output:
                yield from _code_readers(view, output)
        else:
            yield reader


def _operands(view: View, target: Target) -> Iterator[Finding]:
    """Both operands of a weighted operator come from DQ, or neither."""
    for node in view.nodes:
        if node.op_type == "ConvTranspose" and any(view.dequantizers(name) for name in node.input[:2]):
            problem = "transposed convolutions run in half precision despite Q/DQ"
            yield Finding(name_of(node), problem, "Leave them in float", "note", "transposed")
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        data, weight = (view.dequantizers(name) for name in node.input[:2])
        if any(_is_block(view, dequantize) for dequantize in weight):
            yield from _block_weight(view, node, weight)
        elif data and weight:
            if target.sm == 75 and target.is_any_of("rtx") and node.op_type == "Conv":
                problem = "INT8 convolutions run in half precision on SM75 with TensorRT-RTX"
                yield Finding(name_of(node), problem, "Use TensorRT, or a GPU from SM80 on", "loss", "turing")
        elif data or weight:
            missing = 1 if data else 0
            what, obstacle = ("data", "weight")[missing], view.obstacle(node.input[missing])
            if obstacle is not None:
                yield _behind(view, node, what, obstacle)
            # A pair may stay on data that a float layer shares with a quantized one: that costs nothing.
            elif not (data and _serves_another(view, data, node)):
                problem = f"its {what} has no Q/DQ, so it does not run in INT8"
                yield Finding(name_of(node), problem, "Quantize both operands or none", "loss", "operands")


def _behind(view: View, node: NodeProto, what: str, obstacle: NodeProto) -> Finding:
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


def _serves_another(view: View, dequantizers: list[NodeProto], node: NodeProto) -> bool:
    """Whether something else runs in INT8 thanks to these pairs."""
    pending = [dequantize.output[0] for dequantize in dequantizers]
    while pending:
        for reader in view.readers.get(pending.pop(), []):
            if reader.op_type in _TAKES_INT8 or (reader.op_type in WEIGHTED and reader is not node):
                return True
            if reader is not node and view.base(reader.output[0]) != reader.output[0]:
                pending += list(reader.output)
    return False


def _is_block(view: View, dequantize: NodeProto) -> bool:
    scale = view.constant(dequantize, 1)
    return bool(attribute(dequantize, "block_size", 0)) or (scale is not None and len(scale.dims) > 1)


def _block_weight(view: View, node: NodeProto, weight: list[NodeProto]) -> Iterator[Finding]:
    for dequantize in weight:
        kind = view.element_type(dequantize.input[0])
        if kind == TensorProto.INT8:
            problem = f"INT8 weight of {name_of(node)} in blocks: it is dequantized, the product runs in float"
            yield Finding(name_of(dequantize), problem, "Use one scale for each output channel", "loss", "block")
        elif kind == TensorProto.INT4:
            shape = view.shape(dequantize.input[0]) or []
            axis, size = attribute(dequantize, "axis", 1), attribute(dequantize, "block_size", 0)
            inner = 0 if node.op_type == "MatMul" or not attribute(node, "transB", 0) else len(shape) - 1
            if size > 128 or (shape and len(shape) == 2 and axis % len(shape) != inner):
                problem = f"INT4 weight in blocks of {size} on axis {axis}, which is not fused with {name_of(node)}"
                yield Finding(name_of(dequantize), problem, f"Use blocks of up to 128 on axis {inner}", "loss", "block")


def _metadata(view: View, target: Target) -> Iterator[Finding]:
    """The file says which sites it has; a graph tool may have folded them away."""
    if "qat.sites" not in view.metadata:
        return
    try:
        sites = json.loads(view.metadata["qat.sites"])
        names = {name for calls in sites.values() for name in calls}
    except (ValueError, AttributeError, TypeError):
        yield Finding("graph", "its entry qat.sites is no table of sites", "Export it again", "note", "metadata")
        return
    missing = sorted(names - {node.name for node in view.qdq()}, key=str)
    if names and not any(True for _ in view.qdq()):
        problem = f"no Q/DQ is left of {len(names)}: a graph tool folded them, everything runs in float"
        yield Finding("graph", problem, "Export again and use a tool that keeps Q/DQ, such as qat simplify", "loss", "metadata")
    elif missing:
        problem = f"{len(missing)} of {len(names)} Q/DQ pairs are gone or renamed, the first is {missing[0]}"
        yield Finding("graph", problem, "Make sure that a tool merged equal pairs only", "note", "metadata")


RULES: tuple[Rule, ...] = (_activation_scales, _output_axes, _codes, _operands, _metadata)
