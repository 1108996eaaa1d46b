"""From the exporter's placeholders to Q/DQ pairs, on the protobuf."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxscript
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..core.formats import INT8, quantize
from ..errors import QATError

DOMAIN = "qat"
SITES_KEY = "qat.sites"


def _placeholder() -> onnxscript.values.Op:
    schema = onnx.defs.OpSchema
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        "FakeQuantize",
        # Described here, registered nowhere: no process-wide state.
        schema(
            "FakeQuantize",
            DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T"), schema.FormalParameter("scale", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "float32")],
            attributes=[
                schema.Attribute("call", schema.AttrType.INT),
                schema.Attribute("axis", schema.AttrType.INT, required=False),
            ],
        ),
    )


PLACEHOLDER = _placeholder()


@dataclass(frozen=True)
class _Call:
    """One call of a site, as the placeholder node tells it."""

    order: int
    site: str
    axis: int | None
    x: str
    scale: np.ndarray
    y: str


def finish(model: onnx.ModelProto, weight_sites: set[str], *, int8_weights: bool) -> onnx.ModelProto:
    """Replace the placeholders by Q/DQ pairs and tidy up, in place.

    Every pair has constants of its own, named after the site: TensorRT 8 fails on constants shared through Identity
    nodes. The metadata entry ``qat.sites`` maps each site to its Q node, one a call, in the order of the calls.

    Args:
        model: As torch's exporter leaves it.
        weight_sites: Sites that quantize weights.
        int8_weights: Store the codes of weights instead of the weights.

    Raises:
        QATError: For a weight that is computed from the model's inputs.
    """
    graph = model.graph
    _pool_quantized_means(graph)
    _strip(model)
    _name_nodes(graph.node)
    _fold_weights(model, weight_sites)
    calls = _calls(graph)
    constants = _constants(graph)
    outputs = {value.name for value in graph.output}
    pairs: dict[tuple[str, bytes, int | None], tuple[str, str]] = {}
    counts: dict[str, int] = {}
    sites: dict[str, list[str]] = {}
    replaced: dict[str, list[NodeProto]] = {}
    renamed: dict[str, str] = {}
    for call in sorted(calls, key=lambda call: call.order):
        if call.site in weight_sites and call.x not in constants:
            raise QATError(f"{call.site}: the weight depends on the model's inputs; TensorRT needs a constant")
        # The tensor may itself be the output of a pair that was merged into another.
        key = (renamed.get(call.x, call.x), call.scale.tobytes(), call.axis)
        if key not in pairs:
            count = counts[call.site] = counts.get(call.site, 0) + 1
            prefix = call.site if count == 1 else f"{call.site}.{count - 1}"
            codes = constants[call.x] if int8_weights and call.site in weight_sites else None
            output = call.y if call.y in outputs else f"{prefix}/output"
            nodes, tensors = _pair(call, key[0], output, prefix, codes)
            graph.initializer.extend(tensors)
            replaced[call.y] = nodes
            pairs[key] = (nodes[0].name, output)
        name, output = pairs[key]
        renamed[call.y] = output
        sites.setdefault(call.site, []).append(name)
    _replace_nodes(graph, replaced, renamed)
    drop_unused(graph)
    for i, entry in reversed(list(enumerate(model.opset_import))):
        if entry.domain == DOMAIN:
            del model.opset_import[i]
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    model.producer_name = "qat"
    del model.metadata_props[:]
    set_metadata(model, {SITES_KEY: json.dumps(sites)})
    return model


def set_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Add entries to the model's metadata."""
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _calls(graph: onnx.GraphProto) -> list[_Call]:
    constants = _constants(graph)
    calls = []
    for node in graph.node:
        if node.domain == DOMAIN:
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            scale = numpy_helper.to_array(constants[node.input[1]])
            calls.append(_Call(given["call"], given["site"].decode(), given.get("axis"), node.input[0], scale, node.output[0]))
    return calls


def _pair(call: _Call, x: str, y: str, prefix: str, weight: TensorProto | None) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and constants of the pair from ``x`` to ``y``; codes and DQ alone if ``weight`` is to be stored as codes."""
    scale = numpy_helper.from_array(call.scale, f"{prefix}/scale")
    zero_point = numpy_helper.from_array(np.zeros(call.scale.shape, np.int8), f"{prefix}/zero_point")
    axis: dict[str, Any] = {} if call.axis is None else {"axis": call.axis}
    codes = f"{prefix}/codes"
    dequantize = helper.make_node(
        "DequantizeLinear", [codes, scale.name, zero_point.name], [y], f"{prefix}/DequantizeLinear", **axis
    )
    if weight is not None:
        int8 = quantize(numpy_helper.to_array(weight), call.scale, axis=call.axis, fmt=INT8).astype(np.int8)
        return [dequantize], [scale, zero_point, numpy_helper.from_array(int8, codes)]
    quantize_node = helper.make_node(
        "QuantizeLinear", [x, scale.name, zero_point.name], [codes], f"{prefix}/QuantizeLinear", **axis
    )
    return [quantize_node, dequantize], [scale, zero_point]


def _replace_nodes(graph: onnx.GraphProto, replaced: Mapping[str, list[NodeProto]], renamed: Mapping[str, str]) -> None:
    """Exchange placeholders for their pairs; readers of a merged pair's output read the remaining one's."""
    outputs = {value.name for value in graph.output}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
        elif node.output[0] in replaced:
            nodes.extend(replaced[node.output[0]])
        elif node.output[0] in outputs:
            nodes.append(helper.make_node("Identity", [renamed[node.output[0]]], [node.output[0]], f"{node.name}/Identity"))
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output depends on."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _reads(node: NodeProto) -> set[str]:
    """Every tensor that a node reads, its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            for inner in subgraph.node:
                names |= _reads(inner)
            names.update(value.name for value in subgraph.output)
    return names


def _fold_weights(model: onnx.ModelProto, weight_sites: set[str]) -> None:
    """Make constants of the weights that are computed from constants, such as standardized ones.

    TensorRT quantizes a weight only if it is a constant.
    """
    graph = model.graph
    constants = _constants(graph)
    producers = {output: node for node in graph.node for output in node.output}
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        site = next(helper.get_attribute_value(a).decode() for a in node.attribute if a.name == "site")
        if site not in weight_sites or node.input[0] in constants:
            continue
        members = _ancestors(node.input[0], producers, constants)
        if members is not None:
            name = f"{site}/weight"
            if name not in constants:
                ordered = [other for other in graph.node if id(other) in members]
                constants[name] = _evaluate(model, ordered, node.input[0], name, constants)
                graph.initializer.append(constants[name])
            node.input[0] = name


def _ancestors(name: str, producers: dict[str, NodeProto], constants: Mapping[str, TensorProto]) -> set[int] | None:
    """The ids of the nodes that compute ``name`` from constants; ``None`` if it needs more than those."""
    members: set[int] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if not current or current in constants:
            continue
        producer = producers.get(current)
        if producer is None or producer.domain == DOMAIN:
            return None
        if id(producer) not in members:
            members.add(id(producer))
            pending += _reads(producer)
    return members


def _evaluate(
    model: onnx.ModelProto, nodes: list[NodeProto], output_name: str, name: str, constants: Mapping[str, TensorProto]
) -> TensorProto:
    """The value of ``output_name`` as a constant called ``name``."""
    from onnx.reference import ReferenceEvaluator

    read = {item for node in nodes for item in _reads(node)}
    output = helper.make_tensor_value_info(output_name, TensorProto.FLOAT, None)
    part = helper.make_graph(nodes, "constant", [], [output], [t for key, t in constants.items() if key in read])
    imports = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    values: Any = ReferenceEvaluator(helper.make_model(part, opset_imports=imports)).run(None, {})
    return numpy_helper.from_array(np.ascontiguousarray(values[0], dtype=np.float32), name)


def _pool_quantized_means(graph: onnx.GraphProto) -> None:
    """Write a quantized mean over all spatial axes as the pooling it is, in place.

    torch's exporter turns global average pooling into ReduceMean. TensorRT lists average pooling among the operators that it
    runs in INT8 between DQ and Q, not reductions.
    """
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    constants = _constants(graph)
    quantized = {node.output[0] for node in graph.node if node.domain == DOMAIN}
    for node in graph.node:
        if node.op_type != "ReduceMean" or node.input[0] not in quantized or len(node.input) < 2:
            continue
        rank, axes = ranks.get(node.input[0], 0), constants.get(node.input[1])
        kept = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "keepdims"), 1)
        if not kept or rank <= 2 or axes is None:
            continue
        if {int(axis) % rank for axis in numpy_helper.to_array(axes)} == set(range(2, rank)):
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for debugging, source paths among it; shapes are inferred anew by who needs them."""
    del model.graph.value_info[:]
    model.graph.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")


def _name_nodes(nodes: Iterable[NodeProto]) -> None:
    """Unique names, ``<module path>/<operator>`` where the exporter knows the module."""
    taken: set[str] = set()
    for node in nodes:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
        # The scopes are the modules from the root to the operation, and last the operation.
        path = [scope for scope in (ast.literal_eval(scopes)[:-1] if scopes else []) if not scope.startswith("_empty_nn")]
        base = f"{path[-1]}/{node.op_type}" if path and path[-1] else node.op_type
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
