"""What TensorRT would refuse, or quietly not run in INT8, found in the ONNX graph alone.

Rules: TensorRT's explicit quantization (developer guide, "Working with Quantized Types") and what its parser and
TensorRT-RTX were observed to do with graphs that break them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

Q, DQ = "QuantizeLinear", "DequantizeLinear"
_UNSUPPORTED = (
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
)
_WEIGHTED = ("Conv", "Gemm", "MatMul")
# These hand a weight on to its operator without changing values.
_MOVES = ("Transpose", "Reshape", "Slice", "Split", "Identity", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        node: Name of the ONNX node.
        problem: What is wrong and what TensorRT does about it.
        remedy: What to do.
        level: ``"error"``: refused, or INT8 is lost; ``"note"``: works, but not as one may expect.
    """

    node: str
    problem: str
    remedy: str
    level: str = "error"

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}. {self.remedy}."


def check_onnx(model: onnx.ModelProto | str | os.PathLike[str]) -> list[Finding]:
    """Check a Q/DQ graph against TensorRT's rules.

    Args:
        model: The graph, or its file.

    Returns:
        What was found, in graph order; empty if nothing.
    """
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(os.fspath(model))
    view = _View(proto)
    findings: list[Finding] = []
    for rule in (_names, _operators, _scales, _zero_points, _axes, _pairs, _operands):
        findings += rule(view)
    order = {node.name: i for i, node in enumerate(proto.graph.node)}
    return sorted(findings, key=lambda finding: order.get(finding.node, -1))


class _View:
    """A graph with its edges."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)

    def qdq(self) -> Iterator[NodeProto]:
        return (node for node in self.nodes if node.op_type in (Q, DQ))

    def constant(self, node: NodeProto, index: int) -> TensorProto | None:
        return self.constants.get(node.input[index]) if index < len(node.input) else None

    def source(self, name: str) -> tuple[NodeProto | None, list[NodeProto]]:
        """The node that computes ``name``, seen through operators that only move values, and those operators."""
        moves: list[NodeProto] = []
        node = self.producer.get(name)
        while node is not None and node.op_type in _MOVES:
            moves.append(node)
            node = self.producer.get(node.input[0])
        return node, moves

    def is_weight(self, node: NodeProto) -> bool:
        """Whether a Q or DQ node works on a constant."""
        if node.input[0] in self.constants:
            return True
        producer = self.producer.get(node.input[0])
        return node.op_type == DQ and producer is not None and producer.op_type == Q and producer.input[0] in self.constants

    def rank(self, node: NodeProto) -> int:
        """Rank of the constant that a weight's Q or DQ node works on."""
        name = node.input[0] if node.input[0] in self.constants else self.producer[node.input[0]].input[0]
        return len(self.constants[name].dims)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _names(view: _View) -> Iterator[Finding]:
    seen: set[str] = set()
    for node in view.nodes:
        if not node.name or node.name in seen:
            problem = f"two nodes are named {node.name!r}" if node.name else "it has no name, so layers cannot be told apart"
            yield Finding(node.name or f"node of {node.output[0]}", problem, "Name every node once")
        seen.add(node.name)


def _operators(view: _View) -> Iterator[Finding]:
    for node in view.nodes:
        if node.op_type in _UNSUPPORTED:
            yield Finding(node.name, f"TensorRT does not support {node.op_type}", "Use Q/DQ pairs around the float operator")
        if node.op_type == "Identity" and node.input[0] in view.constants:
            yield Finding(node.name, "Identity on a constant, which TensorRT 8 fails on", "Give each reader its own constant")


def _scales(view: _View) -> Iterator[Finding]:
    for node in view.qdq():
        tensor = view.constant(node, 1)
        if tensor is None:
            yield Finding(node.name, "the scale is computed in the graph; TensorRT 8 wants a constant", "Store the scale")
            continue
        scale = numpy_helper.to_array(tensor)
        if not (np.isfinite(scale) & (scale > 0)).all():
            bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
            yield Finding(
                node.name, f"{bad} scale(s) are not positive and finite, an error", "Calibrate again, or clamp the scale"
            )
        if tensor.data_type == TensorProto.FLOAT16 and view.opset < 19:
            yield Finding(node.name, f"FP16 scales need opset 19, the graph has {view.opset}", "Export with opset >= 19")
        if not view.is_weight(node) and scale.ndim:
            what = (
                "a scale of shape [1] runs in float on TensorRT-RTX"
                if scale.size == 1
                else "per-channel scales are for weights"
            )
            yield Finding(node.name, f"activation scale of shape {list(scale.shape)}: {what}", "Use one scale of rank 0")


def _zero_points(view: _View) -> Iterator[Finding]:
    for node in view.qdq():
        if len(node.input) < 3 or not node.input[2]:
            yield Finding(node.name, "no zero-point: UINT8 by the ONNX rule, INT8 in TensorRT", "Add an int8 zero")
            continue
        tensor = view.constant(node, 2)
        if tensor is None:
            yield Finding(node.name, "the zero-point is no constant", "Store an int8 zero")
        elif tensor.data_type == TensorProto.UINT8:
            yield Finding(node.name, "UINT8 zero-point, which TensorRT reads as INT8 or refuses", "Use an int8 zero")
        elif tensor.data_type != TensorProto.INT8:
            kind = TensorProto.DataType.Name(tensor.data_type)
            yield Finding(node.name, f"{kind} zero-point; only INT8 is handled here", "Use an int8 zero")
        elif numpy_helper.to_array(tensor).any():
            yield Finding(node.name, "the zero-point is not zero, an error in TensorRT", "Quantize symmetrically")


def _axes(view: _View) -> Iterator[Finding]:
    """Per-channel scales fit their axis, and the axis is that of the operator's output channels."""
    for node in view.qdq():
        scale = view.constant(node, 1)
        if scale is None or not scale.dims or not view.is_weight(node) or list(scale.dims) == [1]:
            continue
        data = view.constants.get(node.input[0])
        axis = _attribute(node, "axis", 1)
        rank = view.rank(node)
        if not -rank <= axis < rank:
            yield Finding(
                node.name,
                f"axis {axis} of a weight of rank {rank}, an error in TensorRT",
                "Use the axis of the output channels",
            )
            continue
        axis %= rank
        if data is not None and len(scale.dims) == 1 and data.dims[axis] != scale.dims[0]:
            problem = f"{scale.dims[0]} scales on axis {axis} of size {data.dims[axis]}, an error in TensorRT"
            yield Finding(node.name, problem, "Give one scale a channel")
        elif node.op_type == DQ:
            yield from _output_axis(view, node, axis)


def _output_axis(view: _View, dequantize: NodeProto, axis: int) -> Iterator[Finding]:
    pending = [(dequantize.output[0], axis)]
    while pending:
        name, position = pending.pop()
        for reader in view.readers.get(name, []):
            if reader.op_type == "Transpose":
                perm = next((list(a.ints) for a in reader.attribute if a.name == "perm"), None)
                rank = view.rank(dequantize)
                moved = perm.index(position) if perm else rank - 1 - position
                pending.append((reader.output[0], moved))
            elif reader.op_type in ("Slice", "Split"):
                pending += [(output, position) for output in reader.output]
            elif reader.op_type in ("Conv", "Gemm", "MatMul") and reader.input[1] == name:
                rank = view.rank(dequantize)
                expected = {"Conv": 0, "Gemm": 0 if _attribute(reader, "transB", 0) else 1, "MatMul": rank - 1}[reader.op_type]
                if position != expected:
                    problem = f"per-channel weight of {reader.name} on axis {position}, which does not run in INT8"
                    yield Finding(dequantize.name, problem, f"Quantize along axis {expected}, the output channels")


def _pairs(view: _View) -> Iterator[Finding]:
    for node in view.qdq():
        data = view.constants.get(node.input[0])
        if node.op_type == Q:
            readers = view.readers.get(node.output[0], [])
            if not readers or any(reader.op_type != DQ for reader in readers):
                yield Finding(
                    node.name, "its codes are read by something else than DequantizeLinear", "Write Q and DQ in pairs"
                )
            yield from (
                Finding(reader.name, f"its scale differs from that of {node.name}", "Use one scale for both halves of a pair")
                for reader in readers
                if reader.op_type == DQ and not _same(view, node, reader)
            )
        elif data is not None and data.data_type == TensorProto.INT32:
            yield Finding(
                node.name, "int32 data (a bias) behind DequantizeLinear, an error in TensorRT", "Keep the bias in float"
            )
        elif data is not None and view.opset <= 17:
            yield Finding(node.name, "int8 weights without Q need TensorRT 10", "Export with opset >= 19, or float weights")


def _same(view: _View, quantize: NodeProto, dequantize: NodeProto) -> bool:
    scales = view.constant(quantize, 1), view.constant(dequantize, 1)
    if scales[0] is None or scales[1] is None:
        return quantize.input[1] == dequantize.input[1]
    return np.array_equal(numpy_helper.to_array(scales[0]), numpy_helper.to_array(scales[1]))


def _operands(view: _View) -> Iterator[Finding]:
    """Both operands of a weighted operator come from DQ, or neither; its bias never does."""
    for node in view.nodes:
        if node.op_type == "ConvTranspose" and any(_is_dequantized(view, name) for name in node.input[:2]):
            yield Finding(
                node.name, "transposed convolutions run in half precision despite Q/DQ", "Leave them in float", "note"
            )
        if node.op_type not in _WEIGHTED or len(node.input) < 2:
            continue
        quantized = [_is_dequantized(view, name) for name in node.input[:2]]
        if any(quantized) and not all(quantized):
            missing = "data" if quantized[1] else "weight"
            # A pair may stay on data that a float layer shares with a quantized one: that costs nothing.
            shared = not quantized[1] and _serves_another(view, node.input[0], node)
            if not shared:
                yield Finding(
                    node.name, f"its {missing} has no Q/DQ, so it does not run in INT8", "Quantize both operands or none"
                )
        if len(node.input) > 2 and _is_dequantized(view, node.input[2]):
            yield Finding(node.name, "Q/DQ on the bias", "Keep the bias in float")


def _is_dequantized(view: _View, name: str) -> bool:
    source, _ = view.source(name)
    return source is not None and source.op_type == DQ


def _serves_another(view: _View, name: str, node: NodeProto) -> bool:
    return any(reader is not node for reader in view.readers.get(name, []))
