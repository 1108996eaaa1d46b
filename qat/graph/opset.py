"""From opset 18, the lowest that torch's exporter writes, down to 17, the highest that TensorRT 8.6 reads.

Per operator, by the version history in ONNX's Changelog.md; what opset 17 cannot say is refused by name, and what the parser
of TensorRT 8.6 is known to ignore is written without it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from ..errors import QATError

TENSORRT_8 = 17
_TO_THE_END = 2**63 - 1


def downgrade(model: onnx.ModelProto) -> None:
    """Rewrite ``model`` from opset 18 to 17 in place.

    Raises:
        QATError: Naming the node and the operator that opset 17 does not have.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    _check_even_splits(model)
    _slice_shapes(model.graph)
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise _refusal(node, "control flow")
        # Schemas are those of the newest version up to 18; an operator that is older than 18 is the same in 17.
        if node.domain or onnx.defs.get_schema(node.op_type, 18).since_version <= TENSORRT_8:
            continue
        if node.op_type not in _ADAPTERS:
            raise _refusal(node, "its opset-18 form")
        _ADAPTERS[node.op_type](node, constants)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = TENSORRT_8
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))


def _slice_shapes(graph: onnx.GraphProto) -> None:
    """Write Shape-15's ``start`` and ``end``, which TensorRT 8.6 ignores, as a Slice of the whole shape, in place."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Shape" or node.domain or not given:
            continue
        del node.attribute[:]
        start, end = given.get("start", 0), given.get("end", _TO_THE_END)
        if (start, end) == (0, _TO_THE_END):
            continue
        output, whole = node.output[0], f"{node.name}/whole"
        node.output[0] = whole
        bounds = {"starts": start, "ends": end, "axes": 0}
        constants = [numpy_helper.from_array(np.array([value]), f"{node.name}/{name}") for name, value in bounds.items()]
        graph.initializer.extend(constants)
        nodes.append(helper.make_node("Slice", [whole, *(c.name for c in constants)], [output], f"{node.name}/Slice"))
    del graph.node[:]
    graph.node.extend(nodes)


def _refusal(node: NodeProto, what: str) -> QATError:
    return QATError(
        f"{node.name} ({node.op_type}): opset {TENSORRT_8} cannot express {what}. Export with opset=18 or higher, for "
        "TensorRT 10 and later, or write that operation differently"
    )


def _attribute(node: NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _drop(node: NodeProto, name: str) -> None:
    attribute = _attribute(node, name)
    if attribute is not None:
        node.attribute.remove(attribute)


def _drop_default(node: NodeProto, name: str, default: object) -> None:
    """Remove an attribute that opset 18 introduced, if it says what opset 17 does anyway."""
    attribute = _attribute(node, name)
    if attribute is not None:
        if helper.get_attribute_value(attribute) != default:
            raise _refusal(node, f"{name}={helper.get_attribute_value(attribute)!r}")
        node.attribute.remove(attribute)


def _reduce(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Reduce*-18 takes its axes as an input, 13 as an attribute."""
    _drop_default(node, "noop_with_empty_axes", 0)
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in constants:
            raise _refusal(node, "computed axes")
        axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
        node.attribute.append(helper.make_attribute("axes", axes))
    del node.input[1:]


def _check_even_splits(model: onnx.ModelProto) -> None:
    """Split-18 may give a number of outputs and leave the last one smaller; 13 divides evenly."""
    splits = [node for node in model.graph.node if node.op_type == "Split" and _attribute(node, "num_outputs")]
    if not splits:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.output)}
    for node in splits:
        axis = _attribute(node, "axis")
        index = axis.i if axis is not None else 0
        sizes = {shapes[name][index].dim_value if shapes.get(name) else 0 for name in node.output}
        if len(sizes) > 1 or 0 in sizes:
            raise _refusal(node, "num_outputs of unequal or unknown size")


def _split(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    _drop(node, "num_outputs")


def _pad(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    if len(node.input) > 3 and node.input[3]:
        raise _refusal(node, "axes")
    del node.input[3:]


def _resize(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    _drop_default(node, "antialias", 0)
    _drop_default(node, "keep_aspect_ratio_policy", b"stretch")
    axes = _attribute(node, "axes")
    if axes is not None:
        raise _refusal(node, "axes")
    if node.input[2:3] and node.input[2] and len(node.input) > 3 and node.input[3]:
        raise _refusal(node, "scales and sizes together")


def _scatter(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    reduction = _attribute(node, "reduction")
    if reduction is not None and reduction.s not in (b"none", b"add", b"mul"):
        raise _refusal(node, f"reduction={reduction.s.decode()!r}")


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ADAPTERS: dict[str, Callable[[NodeProto, dict[str, onnx.TensorProto]], None]] = {
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS},
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}
