"""What float16 does to the values of a graph, measured on example inputs in ONNX Runtime: overflow, and codes that change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..errors import QATError
from .precision import DQ, SMALLEST_HALF, Q, TypePlan, peak_of
from .run import run_model

LARGEST_HALF = float(np.finfo(np.float16).max)
_LISTED = 10


@dataclass(frozen=True)
class ChangedCodes:
    """How many codes FP16 scales and FP16 data change against FP32 scales.

    Attributes:
        changed: By Q node, the number of changed codes; weights exactly, activations on the example inputs.
        total: By Q node, the number of codes.
    """

    changed: Mapping[str, int]
    total: Mapping[str, int]

    @property
    def worst(self) -> str:
        """The node with the largest share of changed codes."""
        return max(self.total, key=lambda name: self.changed[name] / max(self.total[name], 1))

    def __str__(self) -> str:
        changed, total, worst = sum(self.changed.values()), sum(self.total.values()), self.worst
        share = self.changed[worst] / max(self.total[worst], 1)
        return f"{changed} of {total} codes changed ({changed / max(total, 1):.3%}), most of {worst}: {share:.2%}"


def refuse_overflow(model: onnx.ModelProto, plan: TypePlan, feeds: Mapping[str, np.ndarray], folder: Path) -> None:
    """Run the float32 graph and compare what ``plan`` makes half with the largest float16, 65504.

    Infinities of the float32 graph itself, a mask of ``-inf`` say, stay what they are and are no overflow.

    Args:
        model: The float32 graph, left as it is.
        plan: What becomes float16.
        feeds: The graph's inputs.
        folder: Where an instrumented graph of 2 GiB or more may be written.

    Raises:
        QATError: Naming nodes and magnitudes.
    """
    becomes_half = plan.becomes_half()
    peaks = {name: peak_of(numpy_helper.to_array(plan.constants[name])) for name in becomes_half if name in plan.constants}
    computed = [name for name in becomes_half if name not in plan.constants]
    nodes: list[NodeProto] = []
    for i, name in enumerate(computed):
        nodes += [
            helper.make_node("Abs", [name], [f"qat.abs.{i}"]),
            helper.make_node("IsInf", [name], [f"qat.inf.{i}"]),
            helper.make_node("Where", [f"qat.inf.{i}", "qat.zero", f"qat.abs.{i}"], [f"qat.finite.{i}"]),
            helper.make_node("ReduceMax", [f"qat.finite.{i}"], [f"qat.peak.{i}"], keepdims=0),
        ]
    outputs = {f"qat.peak.{i}": TensorProto.FLOAT for i in range(len(computed))}
    constants = [numpy_helper.from_array(np.zeros((), np.float32), "qat.zero")]
    values = _run(model, nodes, constants, outputs, feeds, folder)
    peaks.update({name: float(values[f"qat.peak.{i}"]) for i, name in enumerate(computed)})
    above = {name: peak for name, peak in peaks.items() if peak > LARGEST_HALF}
    if not above:
        return
    lines = []
    for name, peak in sorted(above.items(), key=lambda item: -item[1])[:_LISTED]:
        if name in plan.constants:
            what = f"{plan.nodes[becomes_half[name][0]].proto.name}: its constant {name}"
        elif name in plan.producer:
            what = plan.nodes[plan.producer[name]].proto.name
        else:
            what = f"graph input {name}"
        lines.append(f"{what}: magnitude {peak:.6g} on the example inputs, float16 ends at {LARGEST_HALF:.0f}")
    more = [f"... and {len(above) - _LISTED} more"] if len(above) > _LISTED else []
    names = list(dict.fromkeys(plan.nodes[index].proto.name for name in above for index in becomes_half[name]))
    remedy = f"fp32_nodes={names}" if names else "half_io=False"
    raise QATError("\n".join([*lines, *more]) + f"\nKeep these in float32 with {remedy}, or export with precision='bf16'.")


def count_changed_codes(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], folder: Path, element_type: int
) -> ChangedCodes:
    """Compare the codes of float32 scales with those of scales rounded to half, each fed the same half data.

    Weights are compared as float32 weights with float32 scales against half weights with half scales, since that is what
    the two files hold. The quotient is taken in float32 in both, as the engine's kernels do.

    Args:
        model: The float32 graph, left as it is.
        feeds: The graph's inputs.
        folder: Where an instrumented graph of 2 GiB or more may be written.
        element_type: The ONNX type of the scales.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    extra: list[TensorProto] = []
    outputs: dict[str, int] = {}
    sites = [node for node in model.graph.node if node.op_type == Q]
    for i, node in enumerate(sites):
        x, scale, zero_point = node.input[:3]
        is_weight = x in constants
        half_scale = rounded_scale(numpy_helper.to_array(constants[scale]), element_type).astype(np.float32)
        extra.append(numpy_helper.from_array(half_scale, f"qat.scale.{i}"))
        extra.append(numpy_helper.from_array(np.array(0, np.int64), f"qat.unused.{i}"))
        axis = {a.name: a.i for a in node.attribute if a.name == "axis"}
        nodes += [
            helper.make_node("Cast", [x], [f"qat.half.{i}"], to=element_type),
            helper.make_node("Cast", [f"qat.half.{i}"], [f"qat.x.{i}"], to=TensorProto.FLOAT),
            helper.make_node(Q, [x if is_weight else f"qat.x.{i}", scale, zero_point], [f"qat.exact.{i}"], **axis),
            helper.make_node(Q, [f"qat.x.{i}", f"qat.scale.{i}", zero_point], [f"qat.rounded.{i}"], **axis),
            helper.make_node("Cast", [f"qat.exact.{i}"], [f"qat.a.{i}"], to=TensorProto.INT32),
            helper.make_node("Cast", [f"qat.rounded.{i}"], [f"qat.b.{i}"], to=TensorProto.INT32),
            helper.make_node("Equal", [f"qat.a.{i}", f"qat.b.{i}"], [f"qat.same.{i}"]),
            helper.make_node("Not", [f"qat.same.{i}"], [f"qat.differs.{i}"]),
            helper.make_node("Cast", [f"qat.differs.{i}"], [f"qat.one.{i}"], to=TensorProto.INT64),
            helper.make_node("ReduceSum", [f"qat.one.{i}"], [f"qat.changed.{i}"], keepdims=0),
            helper.make_node("Size", [x], [f"qat.total.{i}"]),
        ]
        outputs |= {f"qat.changed.{i}": TensorProto.INT64, f"qat.total.{i}": TensorProto.INT64}
    values = _run(model, nodes, extra, outputs, feeds, folder)
    names = [node.name for node in sites]
    return ChangedCodes(
        {name: int(values[f"qat.changed.{i}"]) for i, name in enumerate(names)},
        {name: int(values[f"qat.total.{i}"]) for i, name in enumerate(names)},
    )


def round_scales(model: onnx.ModelProto, element_type: int) -> None:
    """Give every Q and DQ the float32 value of its scale in half, in place: what is stored in half later is that value."""
    scales = {node.input[1] for node in model.graph.node if node.op_type in (Q, DQ)}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            rounded = rounded_scale(numpy_helper.to_array(tensor), element_type).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))


def rounded_scale(scale: np.ndarray, element_type: int) -> np.ndarray:
    """``scale`` in half; what would become 0 is the smallest positive value, since TensorRT refuses a scale of 0."""
    smallest = SMALLEST_HALF if element_type == TensorProto.FLOAT16 else 0.0
    return np.maximum(scale, np.float32(smallest)).astype(helper.tensor_dtype_to_np_dtype(element_type))


def _run(
    model: onnx.ModelProto,
    nodes: list[NodeProto],
    constants: list[TensorProto],
    outputs: Mapping[str, int],
    feeds: Mapping[str, np.ndarray],
    folder: Path,
) -> dict[str, np.ndarray]:
    """The values of ``outputs`` in ``model`` with ``nodes`` added to it."""
    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    measured.graph.node.extend(nodes)
    measured.graph.initializer.extend(constants)
    measured.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items())
    blame = "the float32 graph: ONNX Runtime does not run it on the example inputs"
    return run_model(measured, feeds, wanted=outputs, blame=blame, scratch=folder)
