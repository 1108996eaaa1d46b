"""What TensorRT refuses, or computes otherwise than ONNX says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs

from ..graph import DQ, Graph, Q, attribute, type_name
from .finding import Finding, Rule, Target, name_of

_UNSUPPORTED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
_FLOAT8 = frozenset(kind for name, kind in TensorProto.DataType.items() if name.startswith("FLOAT8"))
_FOUR_BIT = frozenset(kind for name, kind in TensorProto.DataType.items() if name in ("INT4", "FLOAT4E2M1"))
_ADA = 89


def _names(graph: Graph, target: Target) -> Iterator[Finding]:
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name:
            problem = "it has no name, so layers cannot be told apart"
            yield Finding(name_of(node), problem, "Name every node once", "note", "name")
        elif node.name in seen:
            # The parser names layers after nodes; that of a Q or DQ must not be taken.
            level = "error" if node.op_type in (Q, DQ) else "note"
            yield Finding(node.name, f"two nodes are named {node.name!r}", "Name every node once", level, "name")
        seen.add(node.name)


def _operators(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type in _UNSUPPORTED:
            problem = f"TensorRT does not support {node.op_type}"
            yield Finding(name_of(node), problem, "Use Q/DQ pairs around the float operator", rule="operator")
        # A graph of opset 17 is one for TensorRT 8.
        for_8 = target.version == "8.6" or (target.version is None and graph.opset <= 17)
        is_part = attribute(node, "start", 0) != 0 or attribute(node, "end", None) is not None
        if node.op_type == "Shape" and is_part and for_8:
            problem = "start and end of Shape, which TensorRT 8.6 ignores; it may crash on the graph"
            yield Finding(name_of(node), problem, "Slice the whole shape, as qat.export_onnx(opset=17) does", rule="shape")
        if node.op_type == "Identity" and node.input[0] in graph.constants and target.is_any_of("8.6"):
            problem = "Identity on a constant, which TensorRT 8 fails on"
            yield Finding(name_of(node), problem, "Give each reader its own constant", rule="identity")


def _scales(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.qdq():
        tensor = graph.constant(node, 1)
        if tensor is None:
            # 8.6 demands a constant; TensorRT-RTX crashed on such graphs; 10 and 11 know computed scales.
            level = "error" if target.is_any_of("8.6", "rtx") else "note"
            problem = "the scale is computed in the graph; TensorRT 8 wants a constant"
            yield Finding(name_of(node), problem, "Store the scale", level, "scale-constant")
            continue
        scale = graph.value(node, 1)
        if scale is not None and not (good := np.isfinite(scale) & (scale > 0)).all():
            problem = f"{int((~good).sum())} scale(s) are not positive and finite, an error"
            yield Finding(name_of(node), problem, "Calibrate again, or clamp the scale", rule="scale-positive")
        if tensor.data_type == TensorProto.FLOAT16 and graph.opset < 19:
            problem = f"FP16 scales need opset 19, the graph has {graph.opset}"
            yield Finding(name_of(node), problem, "Export with opset >= 19, or FP32 scales", rule="fp16-opset")
        if node.op_type == Q and target.version == "8.6" and graph.element_type(node.input[0]) == TensorProto.FLOAT16:
            problem = "FP16 data, but TensorRT 8 quantizes FP32 only"
            yield Finding(
                name_of(node), problem, "Cast to FP32 before it, or export in FP32 and build with fp16", rule="fp16-data"
            )


def _zero_points(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.qdq():
        name = name_of(node)
        if len(node.input) < 3 or not node.input[2]:
            # A DQ takes the type of its data.
            if node.op_type == Q and not attribute(node, "output_dtype", 0):
                problem = "no zero-point: UINT8 by the ONNX rule, INT8 in TensorRT"
                yield Finding(name, problem, "Add an int8 zero", rule="zero-point-missing")
            continue
        tensor = graph.constant(node, 2)
        if tensor is None:
            yield Finding(name, "the zero-point is no constant", "Store an int8 zero", rule="zero-point-constant")
        elif tensor.data_type == TensorProto.UINT8:
            problem = "UINT8 zero-point, which TensorRT reads as INT8 or refuses"
            yield Finding(name, problem, "Use an int8 zero", rule="zero-point-type")
        elif tensor.data_type in _FLOAT8 | _FOUR_BIT:
            yield from _narrow_types(tensor.data_type, name, target)
        elif tensor.data_type != TensorProto.INT8:
            problem = f"{type_name(tensor.data_type)} zero-point, which TensorRT does not read"
            yield Finding(name, problem, "Use an int8 zero", rule="zero-point-type")
        elif (zero_point := graph.value(node, 2)) is not None and zero_point.any():
            problem = "the zero-point is not zero, an error in TensorRT"
            yield Finding(name, problem, "Quantize symmetrically", rule="zero-point-zero")


def _narrow_types(kind: int, name: str, target: Target) -> Iterator[Finding]:
    if target.version == "8.6":
        problem = f"{type_name(kind)}, which TensorRT 8 does not know"
        yield Finding(name, problem, "Use INT8, or a newer TensorRT", rule="type-version")
    elif kind in _FLOAT8 and target.sm is not None and target.sm < _ADA:
        problem = f"{type_name(kind)}, which SM{target.sm} does not have"
        yield Finding(name, problem, "Use INT8, or a GPU from SM89 on", rule="fp8-gpu")


def _axes(graph: Graph, target: Target) -> Iterator[Finding]:
    """Per-channel scales fit the axis they belong to."""
    for node in graph.qdq():
        scale = graph.constant(node, 1)
        if scale is None or len(scale.dims) != 1 or list(scale.dims) == [1]:
            continue
        shape = graph.shape(graph.weight(node) or node.input[0])
        if shape is None:
            continue
        axis, rank = attribute(node, "axis", 1), len(shape)
        if not -rank <= axis < rank:
            problem = f"axis {axis} of a tensor of rank {rank}, an error in TensorRT"
            yield Finding(name_of(node), problem, "Use the axis of the output channels", rule="axis")
        elif shape[axis] not in (-1, scale.dims[0]):
            problem = f"{scale.dims[0]} scales on axis {axis} of size {shape[axis]}, an error in TensorRT"
            yield Finding(name_of(node), problem, "Use one scale for each output channel", rule="axis")


def _stored_codes(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph.qdq():
        if node.op_type == Q:
            continue
        data = graph.constants.get(graph.base(node.input[0]))
        kind = graph.element_type(node.input[0]) if data is None else data.data_type
        if kind == TensorProto.INT32:
            problem = "int32 data (a bias) behind DequantizeLinear, an error in TensorRT"
            yield Finding(name_of(node), problem, "Keep the bias in float", rule="int32")
        # A graph of opset 17 is one for TensorRT 8.
        elif data is not None and (target.version == "8.6" or (target.version is None and graph.opset <= 17)):
            problem = "int8 weights without Q need TensorRT 10"
            yield Finding(name_of(node), problem, "Export with opset >= 19, or float weights", rule="stored-codes")
        if node.op_type == DQ and attribute(node, "output_dtype", 0) and target.version in ("8.6", "10"):
            level = "error" if target.version == "8.6" else "note"
            problem = "output_dtype needs a parser newer than that of TensorRT 10.1"
            yield Finding(name_of(node), problem, "Write a Cast behind the pair instead", level, "output-dtype")


def _types(graph: Graph, target: Target) -> Iterator[Finding]:
    """Inputs of which ONNX demands one type have one; FP16 data next to FP32 scales is the usual offender."""
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type):
            continue
        try:
            schema = defs.get_schema(node.op_type, graph.opset)
        except defs.SchemaError:
            continue
        clash = _clash(graph, node, schema)
        if clash is not None:
            yield Finding(name_of(node), f"{clash}; TensorRT wants one type", "Insert a Cast", rule="types")
    if target.version == "8.6":
        for node in graph.nodes:
            if any(graph.element_type(output) == TensorProto.BFLOAT16 for output in node.output):
                problem = "BF16, which TensorRT 8 does not know"
                yield Finding(name_of(node), problem, "Export in FP32 or FP16", rule="type-version")
                break


def _clash(graph: Graph, node: NodeProto, schema: onnx.defs.OpSchema) -> str | None:
    seen: dict[str, tuple[str, int]] = {}
    for i, name in enumerate(node.input):
        # The last parameter of a variadic operator stands for the rest.
        parameter = schema.inputs[min(i, len(schema.inputs) - 1)] if schema.inputs else None
        kind = graph.element_type(name) if name else 0
        if (
            parameter is None
            or not kind
            or (i >= len(schema.inputs) and parameter.option != schema.FormalParameterOption.Variadic)
        ):
            continue
        if parameter.option == schema.FormalParameterOption.Variadic and not parameter.is_homogeneous:
            continue
        if parameter.type_str == "tensor(float)" and kind != TensorProto.FLOAT:
            return f"its input {parameter.name} is {type_name(kind)}, FLOAT is demanded in opset {graph.opset}"
        first = seen.setdefault(parameter.type_str, (parameter.name, kind))
        if first[1] != kind and "(" not in parameter.type_str:
            return f"its input {parameter.name} is {type_name(kind)}, but {first[0]} is {type_name(first[1])}"
    return None


def _turing(graph: Graph, target: Target) -> Iterator[Finding]:
    if target.sm != 75 or not target.is_any_of("rtx"):
        return
    for node in graph.nodes:
        if node.op_type in ("Gemm", "MatMul") and graph.element_type(node.output[0]) == TensorProto.FLOAT:
            problem = "FP32 matrix products are refused by TensorRT-RTX on SM75"
            yield Finding(name_of(node), problem, "Export in FP16", rule="turing")


RULES: tuple[Rule, ...] = (_names, _operators, _scales, _zero_points, _axes, _stored_codes, _types, _turing)
