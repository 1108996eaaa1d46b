"""What works, but slower than it could, or otherwise than one may expect."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from ..view import ACTIVATIONS, DQ, WEIGHTED, Q, View, attribute, count, is_depthwise
from .finding import OPSETS, Finding, Rule, Target, name_of

# The smallest positive FP16 value.
_TINY = 2.0**-24
_ELEMENTWISE = frozenset(["Add", "Cast", "Div", "Mul", "Softmax", "Sub", "Where"])


def _note(node: NodeProto | str, rule: str, problem: str, remedy: str) -> Finding:
    return Finding(node if isinstance(node, str) else name_of(node), problem, remedy, "note", rule)


def _opset(view: View, target: Target) -> Iterator[Finding]:
    # Without a target, what none of them reads: older ones always have a lower ceiling.
    ceiling = OPSETS[target.version] if target.version else max(OPSETS.values())
    if view.opset > ceiling:
        name = "TensorRT-RTX" if target.version == "rtx" else f"TensorRT {target.version or 11}"
        yield _note(
            "graph", "opset", f"opset {view.opset}; {name} reads up to {ceiling}", f"Export with opset={ceiling} or less"
        )


def _typing(view: View, target: Target) -> Iterator[Finding]:
    if not any(True for _ in view.qdq()):
        # Where sites are listed, another rule tells that their pairs are gone.
        if view.metadata.get("qat.sites", "{}") == "{}":
            yield _note("graph", "no-qdq", "no Q/DQ, so nothing runs in INT8", "Run qat.prepare, calibrate and export_onnx")
        return
    kinds = {view.element_type(name) for node in view.nodes for name in node.output}
    if target.is_any_of("11", "rtx") and not kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
        problem = "an FP32 graph; where typing is strong (TensorRT 11, TensorRT-RTX), all that is not quantized runs in FP32"
        yield _note("graph", "fp32", problem, "Export with precision='fp16' for these")


def _pairs(view: View, target: Target) -> Iterator[Finding]:
    for node in view.qdq():
        quantize = view.quantizer(node) if node.op_type == DQ else None
        if quantize is not None and view.scale_key(quantize) != view.scale_key(node):
            problem = f"its scale differs from that of {name_of(quantize)}, which changes the values by a factor"
            yield _note(node, "pair-scale", problem, "Use one scale for both halves of a pair")
        scale = view.value(node, 1)
        if node.op_type == Q and scale is not None and ((scale > 0) & (scale < _TINY)).any():
            problem = f"a scale of {float(np.min(scale)):.1e}, which FP16 rounds to zero"
            yield _note(node, "tiny-scale", problem, "Clamp scales to 6e-8 or more; a channel of zeros needs no tiny one")
        weight = view.constant(node, 1)
        no_axis = not any(a.name == "axis" for a in node.attribute)
        if weight is not None and len(weight.dims) == 1 and weight.dims[0] > 1 and no_axis and target.is_any_of("10"):
            problem = "per-channel scales without axis: 1 by the ONNX rule, 0 in the parser of TensorRT 10.1"
            yield _note(node, "axis-default", problem, "Write the axis")


def _bias(view: View, target: Target) -> Iterator[Finding]:
    for node in view.nodes:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and view.dequantizers(node.input[2]):
            yield _note(node, "bias", "Q/DQ on the bias, which costs accuracy and gains nothing", "Keep the bias in float")


def _concats(view: View, target: Target) -> Iterator[Finding]:
    """One scale for all inputs of a concat and its output, else each is quantized anew."""
    for node in view.nodes:
        if node.op_type != "Concat":
            continue
        # An input counts with the pair before it, else with those that other readers have on it.
        keys = set()
        for name in {*node.input, node.output[0]}:
            before = view.dequantizers(name) if name != node.output[0] else []
            after = [end for end in view.ends(name) if end.op_type == Q]
            keys |= {view.scale_key(pair) for pair in before or after}
        if len(keys) > 1:
            problem = f"{len(keys)} different scales on its inputs and output, so tensors are converted between them"
            yield _note(node, "concat", problem, "Give the inputs and the output of a concat one scale")


def _pools(view: View, target: Target) -> Iterator[Finding]:
    quantized = _downstream(view)
    for node in view.nodes:
        if not _is_average(view, node):
            continue
        if view.dequantizers(node.input[0]):
            if target.is_any_of("rtx"):
                problem = "average pooling runs in float on TensorRT-RTX despite Q/DQ"
                yield _note(node, "pool-rtx", problem, "Nothing to do: TensorRT itself runs it in INT8 between DQ and Q")
        elif node.input[0] in quantized:
            problem = "average pooling without Q/DQ on its input: it reads float, and so its producer writes float"
            yield _note(node, "pool", problem, "Quantize its input (pool_inputs=True)")


def _is_average(view: View, node: NodeProto) -> bool:
    if node.op_type in ("AveragePool", "GlobalAveragePool"):
        return True
    shape = view.shape(node.input[0]) if node.op_type == "ReduceMean" else None
    if shape is None or len(shape) != 4:
        return False
    axes = view.value(node, 1) if len(node.input) > 1 else attribute(node, "axes", None)
    return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}


def _downstream(view: View) -> set[str]:
    """Tensors that depend on a quantized activation."""
    found: set[str] = set()
    for node in view.nodes:
        if (node.op_type == DQ and not view.is_weight(node)) or found.intersection(node.input):
            found.update(node.output)
    return found


def _adds(view: View, target: Target) -> Iterator[Finding]:
    """Conv + Add + ReLU is one kernel if the residual input is INT8 and the convolution's own output is not quantized."""
    for node in view.nodes:
        if node.op_type != "Add" or any(view.is_constant(name) for name in node.input):
            continue
        pairs = [view.dequantizers(name) for name in node.input]
        if all(pairs):
            quantizers = [view.quantizer(part[0]) for part in pairs]
            fed = [pair for pair in quantizers if pair is not None and view.weighted_source(pair.input[0]) is not None]
            if fed:
                problem = f"Q/DQ on both inputs, {name_of(fed[0])} behind a convolution: the Add runs as a kernel of its own"
                yield _note(node, "add-both", problem, "Export with fuse_adds=True and compare the latency")
        elif not any(pairs):
            layers = [layer for name in node.input if (layer := view.weighted_source(name)) is not None]
            if any(view.dequantizers(layer.input[0]) for layer in layers):
                problem = "no Q/DQ on its residual input, so the convolution fused with it writes float"
                yield _note(node, "add-float", problem, "Quantize the input that does not come from the convolution")


def _fusions(view: View, target: Target) -> Iterator[Finding]:
    """Q/DQ between a layer and what TensorRT fuses behind it."""
    for node in view.nodes:
        if node.op_type != Q or view.is_constant(node.input[0]):
            continue
        layer = view.weighted_source(node.input[0])
        if layer is None:
            continue
        for pair in view.ends(node.output[0]):
            for reader in view.ends(pair.output[0]) if pair.op_type == DQ else ():
                if reader.op_type in ACTIVATIONS or reader.op_type == "BatchNormalization":
                    problem = f"stands between {name_of(layer)} and {name_of(reader)}, which would be fused"
                    yield _note(node, "fusion", problem, f"Place the pair behind {name_of(reader)}")


def _layers(view: View, target: Target) -> Iterator[Finding]:
    """Shapes and neighbours for which INT8 gains little."""
    for node in view.nodes:
        if node.op_type not in WEIGHTED or not all(view.dequantizers(name) for name in node.input[:2]):
            continue
        if node.op_type == "Conv":
            yield from _channels(view, node)
            reader = _float_reader(view, node.output[0]) if attribute(node, "group", 1) > 1 else None
            if reader is not None and target.is_any_of("8.6", "10", "11"):
                problem = f"convolution of groups whose result {reader} in float, and for that TensorRT 8.6 has no INT8 kernel"
                yield _note(
                    node, "groups-float", problem, "Quantize that, too (a gate: gate_inputs=True), or leave both in float"
                )
        elif _is_vector(view, node):
            problem = "a matrix times a vector: bound by memory, INT8 gains nothing"
            yield _note(node, "gemv", problem, "Leave it in float")
        elif not view.is_constant_behind(node.input[1]) and _beside_softmax(view, node):
            problem = "Q/DQ on both operands of an attention product, which keeps attention from running as one kernel"
            yield _note(node, "attention", problem, "Leave products of two activations in float")


def _channels(view: View, node: NodeProto) -> Iterator[Finding]:
    shape = view.shape(node.input[1])
    if not shape or len(shape) < 2 or is_depthwise(view, node):
        return
    # The first layer's few channels are padded anyway.
    given = [shape[0]] + ([shape[1]] if shape[1] > 4 else [])
    for multiple, effect in ((4, "no INT8 kernel reads it without padding"), (32, "INT8 tensor cores pad it")):
        odd = [channels for channels in given if channels > 0 and channels % multiple]
        if odd:
            problem = f"{odd[0]} channels, no multiple of {multiple}: {effect}"
            yield _note(node, f"channels-{multiple}", problem, f"Use multiples of {multiple} where the design is yours")
            return


def _float_reader(view: View, name: str) -> str | None:
    """What reads a result in float, or returns it, through the activation behind it."""
    reached, pending = {name}, [name]
    while pending:
        at = pending.pop()
        for reader in view.readers.get(at, []):
            joined = reader.op_type == "Mul" and reached.issuperset(reader.input)
            if reader.op_type == "Add":  # fused with the layer, if its other operand is in INT8 or constant
                others = [name for name in reader.input if name not in reached]
                joined = all(view.is_constant(name) or view.dequantizers(name) for name in others)
            if joined or reader.op_type in ACTIVATIONS or reader.op_type in ("BatchNormalization", "Cast", "Identity"):
                pending += [output for output in reader.output if output not in reached]
                reached.update(reader.output)
    for at in sorted(reached):
        if at in view.outputs:
            return f"the graph returns as {at}"
        for reader in view.readers.get(at, []):
            if reader.op_type != Q and not reached.issuperset(reader.output):
                return f"{name_of(reader)} reads"
    return None


def _is_vector(view: View, node: NodeProto) -> bool:
    left, right = view.shape(node.input[0]), view.shape(node.input[1])
    if not left or not right:
        return False
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    columns = right[0 if transposed else -1] if len(right) > 1 else 1
    return columns == 1 or count(left[:-1]) == 1


def _beside_softmax(view: View, node: NodeProto) -> bool:
    return _softmax_before(view, node.input[0]) or _softmax_after(view, node.output[0])


def _softmax_before(view: View, name: str) -> bool:
    pairs = view.dequantizers(name)
    quantize = view.quantizer(pairs[0]) if pairs else None
    producer = view.producer.get(view.base(quantize.input[0])) if quantize is not None else None
    return producer is not None and producer.op_type == "Softmax"


def _softmax_after(view: View, name: str) -> bool:
    pending, seen = [name], {name}
    while pending:
        for reader in view.readers.get(pending.pop(), []):
            if reader.op_type == "Softmax":
                return True
            if reader.op_type in _ELEMENTWISE:
                pending += [output for output in reader.output if output not in seen]
                seen.update(reader.output)
    return False


def _mixed(view: View, target: Target) -> Iterator[Finding]:
    kinds = {view.element_type(node.output[0]) for node in view.nodes if node.op_type == Q}
    if (
        TensorProto.INT8 in kinds
        and kinds & {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
        and target.is_any_of("8.6", "10")
    ):
        yield _note("graph", "mixed", "INT8 and FP8 in one graph, which trtexec refuses up to 10.16", "Use one of them")


RULES: tuple[Rule, ...] = (_opset, _typing, _pairs, _bias, _concats, _pools, _adds, _fusions, _layers, _mixed)
