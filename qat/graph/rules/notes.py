"""What works, but slower than it could, or otherwise than one may expect."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from ..graph import ACTIVATIONS, DQ, WEIGHTED, Graph, Q, attribute, count, is_depthwise
from ..int8 import float_readers, is_kept_apart, summands
from .finding import OPSETS, Finding, Rule, Target, name_of

# The smallest positive FP16 value.
_TINY = 2.0**-24
_ELEMENTWISE = frozenset(["Add", "Cast", "Div", "Mul", "Softmax", "Sub", "Where"])


def _note(node: NodeProto | str, rule: str, problem: str, remedy: str) -> Finding:
    return Finding(node if isinstance(node, str) else name_of(node), problem, remedy, "note", rule)


def _opset(graph: Graph, target: Target) -> Iterator[Finding]:
    # Without a target, what none of them reads: older ones always have a lower ceiling.
    ceiling = OPSETS[target.version] if target.version else max(OPSETS.values())
    if graph.opset > ceiling:
        name = "TensorRT-RTX" if target.version == "rtx" else f"TensorRT {target.version or 11}"
        yield _note(
            "graph", "opset", f"opset {graph.opset}; {name} reads up to {ceiling}", f"Export with opset={ceiling} or less"
        )


def _typing(graph: Graph, target: Target) -> Iterator[Finding]:
    if not any(True for _ in graph.qdq()):
        # Where sites are listed, another rule tells that their pairs are gone.
        if graph.metadata.get("qat.sites", "{}") == "{}":
            yield _note("graph", "no-qdq", "no Q/DQ, so nothing runs in INT8", "Run qat.prepare, calibrate and export_onnx")
        return
    kinds = {graph.element_type(name) for node in graph.nodes for name in node.output}
    if target.is_any_of("11", "rtx") and not kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
        problem = "an FP32 graph; where typing is strong (TensorRT 11, TensorRT-RTX), all that is not quantized runs in FP32"
        yield _note("graph", "fp32", problem, "Export with precision='fp16' for these")


def _pairs(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.qdq():
        quantize = graph.quantizer(node) if node.op_type == DQ else None
        if quantize is not None and graph.scale_key(quantize) != graph.scale_key(node):
            problem = f"its scale differs from that of {name_of(quantize)}, which changes the values by a factor"
            yield _note(node, "pair-scale", problem, "Use one scale for both halves of a pair")
        scale = graph.value(node, 1)
        if node.op_type == Q and scale is not None and ((scale > 0) & (scale < _TINY)).any():
            problem = f"a scale of {float(np.min(scale)):.1e}, which FP16 rounds to zero"
            yield _note(node, "tiny-scale", problem, "Clamp scales to 6e-8 or more; a channel of zeros needs no tiny one")
        weight = graph.constant(node, 1)
        no_axis = not any(a.name == "axis" for a in node.attribute)
        if weight is not None and len(weight.dims) == 1 and weight.dims[0] > 1 and no_axis and target.is_any_of("10"):
            problem = "per-channel scales without axis: 1 by the ONNX rule, 0 in the parser of TensorRT 10.1"
            yield _note(node, "axis-default", problem, "Write the axis")


def _bias(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and graph.dequantizers(node.input[2]):
            yield _note(node, "bias", "Q/DQ on the bias, which costs accuracy and gains nothing", "Keep the bias in float")


def _concats(graph: Graph, target: Target) -> Iterator[Finding]:
    """One scale for all inputs of a concat and its output, else each is quantized anew."""
    for node in graph.nodes:
        if node.op_type != "Concat":
            continue
        # An input counts with the pair before it, else with those that other readers have on it.
        keys = set()
        for name in {*node.input, node.output[0]}:
            before = graph.dequantizers(name) if name != node.output[0] else []
            after = [end for end in graph.ends(name) if end.op_type == Q]
            keys |= {graph.scale_key(pair) for pair in before or after}
        if len(keys) > 1:
            problem = f"{len(keys)} different scales on its inputs and output, so tensors are converted between them"
            yield _note(node, "concat", problem, "Give the inputs and the output of a concat one scale")


def _pools(graph: Graph, target: Target) -> Iterator[Finding]:
    quantized = _downstream(graph)
    for node in graph.nodes:
        if not _is_average(graph, node):
            continue
        if graph.dequantizers(node.input[0]):
            if target.is_any_of("rtx"):
                problem = "average pooling runs in float on TensorRT-RTX despite Q/DQ"
                yield _note(node, "pool-rtx", problem, "Nothing to do: TensorRT itself runs it in INT8 between DQ and Q")
        elif node.input[0] in quantized:
            problem = "average pooling without Q/DQ on its input: it reads float, and so its producer writes float"
            yield _note(node, "pool", problem, "Quantize its input (pool_inputs=True)")


def _is_average(graph: Graph, node: NodeProto) -> bool:
    if node.op_type in ("AveragePool", "GlobalAveragePool"):
        return True
    shape = graph.shape(node.input[0]) if node.op_type == "ReduceMean" else None
    if shape is None or len(shape) != 4:
        return False
    axes = graph.value(node, 1) if len(node.input) > 1 else attribute(node, "axes", None)
    return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}


def _downstream(graph: Graph) -> set[str]:
    """Tensors that depend on a quantized activation."""
    found: set[str] = set()
    for node in graph.nodes:
        if (node.op_type == DQ and not graph.is_weight(node)) or found.intersection(node.input):
            found.update(node.output)
    return found


def _adds(graph: Graph, target: Target) -> Iterator[Finding]:
    """Conv + Add + ReLU is one kernel if the residual input is INT8 and the convolution's own output is not quantized."""
    for node in graph.nodes:
        inputs = summands(graph, node) if node.op_type == "Add" else None
        if inputs is None:
            continue
        fed = [summand for summand in inputs if summand.product is not None]
        layers = [summand.product for summand in fed if summand.product is not None]
        if all(summand.pairs for summand in inputs):
            # TensorRT-RTX computes it in the kernel that it generates behind the convolution.
            if is_kept_apart(inputs) and target.is_any_of("8.6", "10", "11"):
                pair = name_of(fed[0].quantize or fed[0].pairs[0])
                problem = f"Q/DQ on both inputs, {pair} behind a convolution: the Add runs as a kernel of its own"
                yield _note(node, "add-both", problem, "Export with fuse_adds=True and compare the latency")
        elif not any(summand.pairs for summand in inputs) and any(graph.dequantizers(layer.input[0]) for layer in layers):
            problem = "no Q/DQ on its residual input, so the convolution fused with it writes float"
            yield _note(node, "add-float", problem, "Quantize the input that does not come from the convolution")


def _fusions(graph: Graph, target: Target) -> Iterator[Finding]:
    """Q/DQ between a layer and what TensorRT fuses behind it."""
    for node in graph.nodes:
        if node.op_type != Q or graph.is_constant(node.input[0]):
            continue
        layer = graph.weighted_source(node.input[0])
        if layer is None:
            continue
        for pair in graph.ends(node.output[0]):
            for reader in graph.ends(pair.output[0]) if pair.op_type == DQ else ():
                if reader.op_type in ACTIVATIONS or reader.op_type == "BatchNormalization":
                    problem = f"stands between {name_of(layer)} and {name_of(reader)}, which would be fused"
                    yield _note(node, "fusion", problem, f"Place the pair behind {name_of(reader)}")


def _layers(graph: Graph, target: Target) -> Iterator[Finding]:
    """Shapes and neighbours for which INT8 gains little."""
    for node in graph.nodes:
        if node.op_type not in WEIGHTED or not all(graph.dequantizers(name) for name in node.input[:2]):
            continue
        if node.op_type == "Conv":
            yield from _channels(graph, node)
            reader = _float_reader(graph, node.output[0]) if attribute(node, "group", 1) > 1 else None
            if reader is not None and target.is_any_of("8.6", "10", "11"):
                problem = f"convolution of groups whose result {reader} in float, and for that TensorRT 8.6 has no INT8 kernel"
                yield _note(
                    node, "groups-float", problem, "Quantize that, too (a gate: gate_inputs=True), or leave both in float"
                )
        elif _is_vector(graph, node):
            problem = "a matrix times a vector: bound by memory, INT8 gains nothing"
            yield _note(node, "gemv", problem, "Leave it in float")
        elif not graph.is_constant_behind(node.input[1]) and _beside_softmax(graph, node):
            problem = "Q/DQ on both operands of an attention product, which keeps attention from running as one kernel"
            yield _note(node, "attention", problem, "Leave products of two activations in float")


def _channels(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    shape = graph.shape(node.input[1])
    if not shape or len(shape) < 2 or is_depthwise(graph, node):
        return
    # The first layer's few channels are padded anyway.
    given = [shape[0]] + ([shape[1]] if shape[1] > 4 else [])
    for multiple, effect in ((4, "no INT8 kernel reads it without padding"), (32, "INT8 tensor cores pad it")):
        odd = [channels for channels in given if channels > 0 and channels % multiple]
        if odd:
            problem = f"{odd[0]} channels, no multiple of {multiple}: {effect}"
            yield _note(node, f"channels-{multiple}", problem, f"Use multiples of {multiple} where the design is yours")
            return


def _float_reader(graph: Graph, name: str) -> str | None:
    """What reads a result in float, or returns it."""
    reader = next(float_readers(graph, name), None)
    if reader is None:
        return None
    return f"the graph returns as {reader}" if isinstance(reader, str) else f"{name_of(reader)} reads"


def _is_vector(graph: Graph, node: NodeProto) -> bool:
    left, right = graph.shape(node.input[0]), graph.shape(node.input[1])
    if not left or not right:
        return False
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    columns = right[0 if transposed else -1] if len(right) > 1 else 1
    return columns == 1 or count(left[:-1]) == 1


def _beside_softmax(graph: Graph, node: NodeProto) -> bool:
    return _softmax_before(graph, node.input[0]) or _softmax_after(graph, node.output[0])


def _softmax_before(graph: Graph, name: str) -> bool:
    pairs = graph.dequantizers(name)
    quantize = graph.quantizer(pairs[0]) if pairs else None
    producer = graph.producer.get(graph.base(quantize.input[0])) if quantize is not None else None
    return producer is not None and producer.op_type == "Softmax"


def _softmax_after(graph: Graph, name: str) -> bool:
    pending, seen = [name], {name}
    while pending:
        for reader in graph.readers.get(pending.pop(), []):
            if reader.op_type == "Softmax":
                return True
            if reader.op_type in _ELEMENTWISE:
                pending += [output for output in reader.output if output not in seen]
                seen.update(reader.output)
    return False


def _mixed(graph: Graph, target: Target) -> Iterator[Finding]:
    kinds = {graph.element_type(node.output[0]) for node in graph.nodes if node.op_type == Q}
    if (
        TensorProto.INT8 in kinds
        and kinds & {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
        and target.is_any_of("8.6", "10")
    ):
        yield _note("graph", "mixed", "INT8 and FP8 in one graph, which trtexec refuses up to 10.16", "Use one of them")


RULES: tuple[Rule, ...] = (_opset, _typing, _pairs, _bias, _concats, _pools, _adds, _fusions, _layers, _mixed)
