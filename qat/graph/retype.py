"""Carrying out a plan of precisions: Casts where writer and reader differ, constants stored in their type."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .precision import DQ, FLOAT, STASH, PlannedNode, TypePlan, has_stash


def apply(model: onnx.ModelProto, plan: TypePlan) -> None:
    """Carry out ``plan`` in place: Casts where the types of writer and reader differ, constants stored in their type."""
    _Retyping(model, plan).run()


class _Retyping:
    def __init__(self, model: onnx.ModelProto, plan: TypePlan) -> None:
        self.graph = model.graph
        self.plan = plan
        self.name = TensorProto.DataType.Name(plan.element_type).lower()
        self.done: list[NodeProto] = []
        self.made: dict[tuple[str, bool], str] = {}
        self.taken = {name for node in self.graph.node for name in (node.name, *node.input, *node.output)}
        self.taken.update(value.name for value in (*self.graph.input, *self.graph.output, *self.graph.initializer))
        # What replaces a graph output that must be converted at the border.
        self.inner: dict[str, str] = {}

    def run(self) -> None:
        plan = self.plan
        for name in sorted(plan.outputs & set(plan.producer)):
            if plan.is_half(name) != plan.half_io:
                self.inner[name] = self._unique(f"{name}/{self.name if plan.is_half(name) else 'float'}")
        for index, node in enumerate(plan.nodes):
            self._node(index, node)
        for name, inner in self.inner.items():
            self.done.append(self._cast(inner, name, plan.half_io))
        del self.graph.node[:]
        self.graph.node.extend(self.done)
        for value in (*self.graph.input, *self.graph.output):
            if plan.half_io and value.type.tensor_type.elem_type == FLOAT:
                value.type.tensor_type.elem_type = plan.element_type

    def _node(self, index: int, node: PlannedNode) -> None:
        plan, proto = self.plan, onnx.NodeProto()
        proto.CopyFrom(node.proto)
        if plan.half[index]:
            self._retype(proto, node)
        from_to = [plan.is_half(slot.tensor) for slot in (*node.reads, *node.writes)]
        if proto.op_type == "Cast" and len(from_to) == 2 and from_to[0] == from_to[1]:
            proto.op_type = "Identity"
            del proto.attribute[:]
        if proto.op_type == "BatchNormalization" and plan.half[index]:
            self._combine(proto)
        for slot in node.reads:
            wanted = plan.reads_half(index, slot)
            if wanted is None or proto.input[slot.index] != slot.tensor:
                proto.input[slot.index] = self.inner.get(proto.input[slot.index], proto.input[slot.index])
            elif slot.tensor in plan.constants:
                proto.input[slot.index] = self._constant(slot.tensor, wanted)
            else:
                proto.input[slot.index] = self._tensor(slot.tensor, wanted)
        for i, name in enumerate(proto.output):
            proto.output[i] = self.inner.get(name, name)
        self.done.append(proto)

    def _retype(self, proto: NodeProto, node: PlannedNode) -> None:
        """Attributes that name a type."""
        float_output = any(slot.halvable for slot in node.writes)
        attributes = {a.name: a for a in proto.attribute}
        if proto.op_type == "Cast" and float_output:
            attributes["to"].i = self.plan.element_type
        elif proto.op_type == DQ and not self.plan.half_scales:
            proto.attribute.append(helper.make_attribute("output_dtype", self.plan.element_type))
        elif proto.op_type in ("Constant", "ConstantOfShape") and float_output:
            given = attributes.get("value")
            value = numpy_helper.to_array(given.t) if given is not None else np.zeros(1, np.float32)
            del proto.attribute[:]
            proto.attribute.append(helper.make_attribute("value", _converted(value, "", self.plan.element_type)))
        if has_stash(proto, self.plan.opset) and STASH not in attributes:
            proto.attribute.append(helper.make_attribute(STASH, FLOAT))

    def _combine(self, proto: NodeProto) -> None:
        """Batch normalization as one factor and one summand a channel, computed in float64.

        Rounded one by one to half, a small variance would be subnormal, a large one infinite.
        """
        names = list(proto.input[1:5])
        if any(name not in self.plan.constants for name in names) or any(
            a.name == "training_mode" and a.i for a in proto.attribute
        ):
            return
        scale, bias, mean, variance = (numpy_helper.to_array(self.plan.constants[name]).astype(np.float64) for name in names)
        epsilon = next((a.f for a in proto.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        values = (factor, bias - mean * factor, np.zeros_like(mean), np.ones_like(variance))
        for i, (kind, value) in enumerate(zip(("factor", "summand", "zeros", "ones"), values, strict=True), start=1):
            name = self._unique(f"{proto.name}/{kind}")
            self.graph.initializer.append(_converted(value.astype(np.float32), name, self.plan.element_type))
            proto.input[i] = name
        kept = [a for a in proto.attribute if a.name != "epsilon"]
        del proto.attribute[:]
        proto.attribute.extend([*kept, helper.make_attribute("epsilon", 0.0)])

    def _tensor(self, name: str, half: bool) -> str:
        """``name`` in the type wanted, through a Cast if it has the other one."""
        inner = self.inner.get(name, name)
        if self.plan.is_half(name) == half:
            return inner
        # The graph's output at the border is that Cast already, but it comes last: readers have one of their own.
        if (name, half) not in self.made:
            self.made[name, half] = self._unique(f"{name}/{self.name if half else 'float'}")
            self.done.append(self._cast(inner, self.made[name, half], half))
        return self.made[name, half]

    def _constant(self, name: str, half: bool) -> str:
        if not half:
            return name
        if (name, True) not in self.made:
            made = self.made[name, True] = self._unique(f"{name}/{self.name}")
            values = numpy_helper.to_array(self.plan.constants[name])
            self.graph.initializer.append(_converted(values, made, self.plan.element_type))
        return self.made[name, True]

    def _cast(self, source: str, target: str, half: bool) -> NodeProto:
        kind = self.plan.element_type if half else FLOAT
        return helper.make_node("Cast", [source], [target], self._unique(f"{target}/Cast"), to=kind)

    def _unique(self, base: str) -> str:
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def _converted(values: np.ndarray, name: str, element_type: int) -> TensorProto:
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(np.asarray(values).astype(dtype), name)
