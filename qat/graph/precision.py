"""A strongly typed graph: everything that is not quantized computes in float16 or bfloat16.

TensorRT 11 and TensorRT-RTX compute what the graph says, so an FP32 graph becomes an FP32 engine apart from its INT8 nodes.
Which tensors may be half is read from the operators' ONNX schemas: the inputs and outputs that share a type variable change
together, what a schema fixes to float (the scales of Resize, say) stays.

What stays in float32, and why:

* **Scales**, so that no code changes. Below opset 23 QuantizeLinear gives its data the type of the scale and
  DequantizeLinear its output: Casts around the pair (half -> float -> Q -> DQ -> half). From opset 23 the two are typed
  apart: Q reads half data against a float scale, and DQ has ``output_dtype``.
* **Weights before their Q**: their codes are those of the float32 file.
* **Operators whose intermediate results leave the range or the precision of half** (:data:`UNSAFE`): exponentials,
  powers, logarithms, roots and the sums of reductions. Normalizations with a ``stash_type`` say themselves that they
  compute in float32 inside, and take half data. Softmax between Casts is still fused with the matrix products around it
  (observed on TensorRT-RTX). The Attention operator of opset 23 takes half data without its ``softmax_precision``, which
  TensorRT's parser refuses.
* **Cheap operators with a constant that half cannot hold**: an epsilon that would become subnormal or 0, a mask of -1e9.
* **What computes shapes and indices from shapes**: half counts to 2048 only.
* **Cheap operators between two that stay in float32**: Casts around them would cost more than they save.
"""

from __future__ import annotations

import fnmatch
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..errors import QATError

FLOAT = TensorProto.FLOAT
ELEMENT_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Conv and the like take bfloat16 from here on; output_dtype of DequantizeLinear from there.
BF16_OPSET, OUTPUT_DTYPE_OPSET = 22, 23
# FP16 scales, by the ONNX rule for QuantizeLinear.
HALF_SCALE_OPSET = 19
# The scale that FP16 keeps at least: its smallest positive value.
SMALLEST_HALF = float(np.finfo(np.float16).smallest_subnormal)

Q, DQ = "QuantizeLinear", "DequantizeLinear"
UNSAFE = frozenset(
    {
        # Exponentials and powers overflow half at 11.1 and 256^2; roots and quotients of what underflowed are worse.
        *("Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "Softmax", "LogSoftmax", "Mish"),
        # Sums over many elements.
        *(f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")),
        *("CumSum", "InstanceNormalization", "LpNormalization", "MeanVarianceNormalization", "LpPool", "GlobalLpPool"),
        # Before opset 21 it has no stash_type.
        "GroupNormalization",
        "NegativeLogLikelihoodLoss",
        "SoftmaxCrossEntropyLoss",
    }
)
# Kernels of their own, where half pays: they are half between float32 neighbours too.
_HEAVY = frozenset(
    {
        *("Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "Attention", "LSTM", "GRU", "RNN"),
        *("Resize", "GridSample", "RoiAlign", "LayerNormalization", "RMSNormalization", "BatchNormalization"),
    }
)
# The attribute by which a normalization says in which type it computes inside.
STASH = "stash_type"
# They read the shape, or convert from any type.
_INDIFFERENT = frozenset({"Cast", "Shape", "Size"})


@dataclass(frozen=True)
class Slot:
    """One float32 tensor at a node: where, and whether the schema lets it be half."""

    index: int
    tensor: str
    halvable: bool


@dataclass(frozen=True)
class PlannedNode:
    """A node and its float32 tensors."""

    proto: NodeProto
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]

    @property
    def is_light(self) -> bool:
        return self.proto.op_type not in _HEAVY | _INDIFFERENT | {Q, DQ}


@dataclass
class TypePlan:
    """Which nodes compute in half, and which tensors are half in the end.

    Attributes:
        element_type: The ONNX element type, float16 or bfloat16.
        half: By index of the node in the graph.
        nodes: The graph's nodes with their float32 tensors.
        half_io: Whether the graph's inputs and outputs are half.
        half_scales: Whether Q and DQ hold half scales and read half data.
    """

    element_type: int
    opset: int
    nodes: list[PlannedNode]
    half: list[bool]
    half_io: bool
    half_scales: bool
    producer: dict[str, int]
    readers: dict[str, list[int]]
    inputs: frozenset[str]
    outputs: frozenset[str]
    constants: dict[str, TensorProto]
    fixed: set[int] = field(default_factory=set)

    @property
    def types_apart(self) -> bool:
        """Whether Q and DQ have a type for the scale and one for the data."""
        return self.opset >= OUTPUT_DTYPE_OPSET or self.half_scales

    def is_half(self, tensor: str) -> bool:
        """Whether the tensor is half where it is computed."""
        if tensor in self.producer:
            index = self.producer[tensor]
            slot = next(slot for slot in self.nodes[index].writes if slot.tensor == tensor)
            return self.half[index] and slot.halvable
        return tensor in self.inputs and self.half_io

    def reads_half(self, index: int, slot: Slot) -> bool | None:
        """Whether the node wants that tensor in half; ``None`` if it takes either."""
        op = self.nodes[index].proto.op_type
        if op in (Q, DQ) and slot.index == 1:
            return self.half_scales
        if op in _INDIFFERENT or (op == Q and self.types_apart and not self.half_scales):
            return None
        return self.half[index] and slot.halvable

    def uses(self, writes: Sequence[Slot]) -> Iterator[tuple[int, Slot]]:
        """Who reads these tensors, and where."""
        for written in writes:
            for reader in self.readers.get(written.tensor, ()):
                yield from ((reader, slot) for slot in self.nodes[reader].reads if slot.tensor == written.tensor)

    def becomes_half(self) -> dict[str, list[int]]:
        """Tensors that are half somewhere, constants included, and the nodes that make them so: writer and readers."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for slot in node.writes:
                if self.is_half(slot.tensor):
                    found.setdefault(slot.tensor, []).append(index)
            for slot in node.reads:
                if self.reads_half(index, slot):
                    found.setdefault(slot.tensor, []).append(index)
        for name in self.inputs | self.outputs if self.half_io else ():
            if name in self.producer or name in self.inputs:
                found.setdefault(name, [])
        return found


def decide(
    model: onnx.ModelProto,
    precision: str,
    *,
    half_io: bool = False,
    half_scales: bool = False,
    fp32_nodes: Sequence[str] = (),
) -> TypePlan:
    """Decide what computes in half. The model is left as it is.

    Args:
        model: Float32, with Q/DQ pairs.
        precision: ``"fp16"`` or ``"bf16"``.
        half_io: Also the graph's inputs and outputs.
        half_scales: Also the scales; codes may change.
        fp32_nodes: Names of nodes that stay in float32, as patterns with ``*`` and ``?``.

    Raises:
        QATError: For a pattern that fits no node, control flow, an operator without a schema, or a tensor without a type.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    types = _types(model)
    nodes = [_node(proto, model, types, ELEMENT_TYPES[precision]) for proto in model.graph.node]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for slot in node.reads:
            readers.setdefault(slot.tensor, []).append(index)
    result = TypePlan(
        ELEMENT_TYPES[precision],
        opset,
        nodes,
        [True] * len(nodes),
        half_io,
        half_scales,
        {slot.tensor: index for index, node in enumerate(nodes) for slot in node.writes},
        readers,
        frozenset(value.name for value in model.graph.input if types[value.name] == FLOAT),
        frozenset(value.name for value in model.graph.output if types[value.name] == FLOAT),
        {tensor.name: tensor for tensor in model.graph.initializer},
    )
    forced = _forced(nodes, fp32_nodes)
    indices = _index_arithmetic(result, model)
    for index, node in enumerate(nodes):
        op = node.proto.op_type
        if op in (Q, DQ):
            result.half[index] = result.types_apart
        elif index in forced or index in indices or _is_unsafe(node, result):
            result.half[index] = False
            result.fixed.add(index)
        elif op == "Cast":
            # Only its output is decided here, if that is float32.
            result.half[index] = bool(node.writes)
    _join_islands(result)
    _keep_between(result)
    for index, node in enumerate(nodes):
        wishes = {result.reads_half(reader, slot) for reader, slot in result.uses(node.writes)}
        if node.proto.op_type == DQ and not half_scales and wishes == {False}:
            result.half[index] = False
    return result


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor, without copying the weights."""
    stub = onnx.ModelProto()
    stub.CopyFrom(_without_weights(model))
    inferred = onnx.shape_inference.infer_shapes(stub, strict_mode=True, data_prop=True).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.WhichOneof("value") != "tensor_type":
            raise QATError(f"{value.name}: a {value.type.WhichOneof('value')}; only tensors can be half. Use precision='fp32'")
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _without_weights(model: onnx.ModelProto, most: int = 1024) -> onnx.ModelProto:
    """A copy in which large constants are inputs: inference needs small ones only, and has a limit of 2 GiB."""
    stub = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    stub.graph.name = model.graph.name or "graph"
    stub.graph.input.extend(model.graph.input)
    stub.graph.output.extend(model.graph.output)
    stub.graph.node.extend(model.graph.node)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= most:
            stub.graph.initializer.append(tensor)
        else:
            stub.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return stub


def _node(proto: NodeProto, model: onnx.ModelProto, types: dict[str, int], element_type: int) -> PlannedNode:
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in proto.attribute):
        raise QATError(
            f"{proto.name} ({proto.op_type}): control flow cannot be typed here. Write the model without it, or export with "
            "precision='fp32'"
        )
    version = next((entry.version for entry in model.opset_import if entry.domain == proto.domain), None)
    try:
        schema = onnx.defs.get_schema(proto.op_type, version or 1, proto.domain)
    except onnx.defs.SchemaError as error:
        raise QATError(
            f"{proto.name}: {proto.domain}::{proto.op_type} is no ONNX operator, its types are unknown. Export with "
            "precision='fp32'"
        ) from error
    unknown = [name for name in (*proto.input, *proto.output) if name and name not in types]
    if unknown:
        raise QATError(f"{proto.name}: the type of {unknown[0]} cannot be inferred. Export with precision='fp32'")
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({TensorProto.DataType.Name(element_type).lower()})"

    def slots(names: Sequence[str], formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> Iterator[Slot]:
        for i, name in enumerate(names):
            if name and types[name] == FLOAT:
                # A variadic parameter is the last and stands for all that follow.
                variable = formals[min(i, len(formals) - 1)].type_str
                yield Slot(i, name, wanted in allowed.get(variable, ()))

    return PlannedNode(proto, tuple(slots(proto.input, schema.inputs)), tuple(slots(proto.output, schema.outputs)))


def _forced(nodes: list[PlannedNode], patterns: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for pattern in patterns:
        matching = {i for i, node in enumerate(nodes) if fnmatch.fnmatchcase(node.proto.name, pattern)}
        if not matching:
            raise QATError(
                f"fp32_nodes: no node is named {pattern!r}. Names are those of the ONNX file, 'layer1.0.conv1/Conv' say"
            )
        found |= matching
    return found


def _is_unsafe(node: PlannedNode, plan: TypePlan) -> bool:
    op = node.proto.op_type
    if not any(slot.halvable for slot in (*node.reads, *node.writes)):
        return True
    if op in UNSAFE and not has_stash(node.proto, plan.opset):
        return True
    # A source whose type no attribute that we know of tells.
    if not node.reads and node.writes and op not in ("Cast", "Constant", "ConstantOfShape"):
        return True
    return node.is_light and any(
        slot.halvable and slot.tensor in plan.constants and _is_lost(plan.constants[slot.tensor], plan.element_type)
        for slot in node.reads
    )


def has_stash(node: NodeProto, opset: int) -> bool:
    """Whether an attribute of the operator tells in which type it computes inside."""
    return STASH in onnx.defs.get_schema(node.op_type, opset, node.domain).attributes


def _is_lost(tensor: TensorProto, element_type: int) -> bool:
    """Whether a constant is beyond what half can hold: too large somewhere, or so small that all of it becomes subnormal."""
    if element_type != TensorProto.FLOAT16:
        return False
    peak, info = peak_of(numpy_helper.to_array(tensor)), np.finfo(np.float16)
    return peak != 0 and not float(info.tiny) <= peak <= float(info.max)


def peak_of(values: np.ndarray) -> float:
    """The largest finite magnitude; 0 if there is none."""
    magnitudes = np.abs(values)
    return float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))


def _index_arithmetic(plan: TypePlan, model: onnx.ModelProto) -> set[int]:
    """Nodes that compute in float on shapes and constants alone and end in an integer, or where float is demanded."""
    data = {value.name for value in model.graph.input}
    free: list[bool] = []
    for node in plan.nodes:
        depends = node.proto.op_type not in ("Shape", "Size") and not data.isdisjoint(node.proto.input)
        free.append(not depends)
        if depends:
            data.update(node.proto.output)
    found: set[int] = set()
    for index in reversed(range(len(plan.nodes))):
        node = plan.nodes[index]
        for reader in (r for slot in node.writes for r in plan.readers.get(slot.tensor, ()) if free[index]):
            fixed = any(not slot.halvable for slot in plan.nodes[reader].reads if plan.producer.get(slot.tensor) == index)
            if (
                fixed
                or reader in found
                or (free[reader] and len(plan.nodes[reader].writes) < len(plan.nodes[reader].proto.output))
            ):
                found.add(index)
    return found


def _join_islands(plan: TypePlan) -> None:
    """Pull in what combines float32 results: the difference whose square is taken, the quotient of two of them.

    Without it x - mean would be rounded between the mean and the variance of a normalization that is spelled out.
    """
    queue = deque(sorted(plan.fixed))
    while queue:
        index = queue.popleft()
        node = plan.nodes[index]
        near = [plan.producer[slot.tensor] for slot in node.reads if slot.tensor in plan.producer]
        near += [reader for slot in node.writes for reader in plan.readers.get(slot.tensor, ())]
        for other in near:
            if other in plan.fixed or not plan.nodes[other].is_light:
                continue
            sources = [plan.producer.get(slot.tensor) for slot in plan.nodes[other].reads if slot.tensor not in plan.constants]
            before = [source in plan.fixed for source in sources]
            after = any(
                reader in plan.fixed for slot in plan.nodes[other].writes for reader in plan.readers.get(slot.tensor, ())
            )
            if (any(before) and after) or (len(before) > 1 and all(before)):
                plan.half[other] = False
                plan.fixed.add(other)
                queue.append(other)


def _keep_between(plan: TypePlan) -> None:
    """Leave cheap operators in float32 whose every source and reader is float32 anyway: the largest such set."""
    candidates = {i for i, node in enumerate(plan.nodes) if plan.half[i] and node.is_light and node.reads and node.writes}

    def is_float(index: int) -> bool:
        return index in candidates or not plan.half[index]

    def fits(node: PlannedNode, index: int) -> bool:
        for slot in node.reads:
            source = plan.producer.get(slot.tensor)
            if slot.tensor in plan.constants or not slot.halvable:
                continue
            if plan.half_io if source is None else not is_float(source):
                return False
        if plan.half_io and any(slot.tensor in plan.outputs for slot in node.writes):
            return False
        return all(reader in candidates or plan.reads_half(reader, slot) is False for reader, slot in plan.uses(node.writes))

    changed = True
    while changed:
        leaving = {index for index in candidates if not fits(plan.nodes[index], index)}
        candidates -= leaving
        changed = bool(leaving)
    for index in candidates:
        plan.half[index] = False
