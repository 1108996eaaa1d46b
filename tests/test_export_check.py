"""check_onnx: each rule on a graph that breaks it, and none on a graph that keeps them."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.export.check import check_onnx


def conv_graph(*, opset=19, **changes):
    """x -> Q -> DQ -> Conv(w -> Q -> DQ, bias), with some constants or parts exchanged."""
    given = {
        "x_scale": np.float32(0.1),
        "x_zero": np.int8(0),
        "w": np.ones((4, 3, 1, 1), np.float32),
        "w_scale": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "bias": np.zeros(4, np.float32),
        **{name: value for name, value in changes.items() if isinstance(value, np.ndarray | np.generic)},
    }
    axis = changes.get("axis", 0)
    per_channel = {"axis": axis} if given["w_scale"].ndim else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], "x/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], "x/DQ"),
        helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["w_q"], "w/Q", **per_channel),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_dq"], "w/DQ", **per_channel),
        helper.make_node(changes.get("op", "Conv"), ["x_dq", "w_dq", "bias"], ["y"], "conv"),
    ]
    for edit in changes.values():
        if callable(edit):
            edit(nodes)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def matmul_graph(*, shape=(6, 4), axis=1, transpose=False, scales=4):
    """x @ w with both operands quantized, the weight perhaps behind a Transpose."""
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones(shape, np.float32),
        "w_s": np.full(scales, 0.01, np.float32),
        "w_z": np.zeros(scales, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], "x/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], "x/DQ"),
        helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["w_q"], "w/Q", axis=axis),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w_dq"], "w/DQ", axis=axis),
    ]
    if transpose:
        nodes.append(helper.make_node("Transpose", ["w_dq"], ["w_t"], "transpose", perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x_dq", "w_t" if transpose else "w_dq"], ["y"], "matmul"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def rename(nodes):
    nodes[4].name = "x/Q"


def rename_pair(nodes):
    nodes[3].name = "x/DQ"


def unname(nodes):
    nodes[4].name = ""


def bare_data(nodes):
    nodes[4].input[0] = "x"


def bare_weight(nodes):
    nodes[4].input[1] = "w"


def identity(nodes):
    nodes.insert(0, helper.make_node("Identity", ["x_scale"], ["copy"], "copy"))


def quantized_bias(nodes):
    nodes.insert(4, helper.make_node("DequantizeLinear", ["bias", "x_scale"], ["b_dq"], "b/DQ"))
    nodes[5].input[2] = "b_dq"


def no_zero_point(nodes):
    del nodes[0].input[2]


def other_scale(nodes):
    nodes[1].input[1] = "s2"


def computed_scale(nodes):
    nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["x_max"], "max", keepdims=0))
    nodes[1].input[1] = nodes[2].input[1] = "x_max"


def codes_read(nodes):
    nodes[1].op_type = "Cast"
    del nodes[1].input[1:]
    nodes[1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def dynamic(nodes):
    nodes.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "dynamic"))


def broken(model, **target):
    """Findings but notes."""
    return [finding for finding in check_onnx(model, **target) if finding.level != "note"]


def test_a_correct_graph_has_no_findings():
    assert broken(conv_graph()) == []


@pytest.mark.parametrize(
    ("changes", "node", "message", "level"),
    [
        ({"x_scale": np.float32(0)}, "x/Q", "1 scale.s. are not positive", "error"),
        ({"w_scale": np.array([1, 1, -1, np.nan], np.float32)}, "w/Q", "2 scale.s. are not positive", "error"),
        ({"x_scale": np.array([0.1], np.float32)}, "x/DQ", r"shape \[1\]", "loss"),
        ({"x_scale": np.full(3, 0.1, np.float32)}, "x/Q", "per-channel scales are for weights", "loss"),
        ({"x_zero": np.int8(3)}, "x/Q", "zero-point is not zero", "error"),
        ({"x_zero": np.uint8(0)}, "x/Q", "UINT8 zero-point", "error"),
        ({"x_zero": np.int16(0)}, "x/Q", "INT16 zero-point", "error"),
        ({"w_scale": np.full(3, 0.01, np.float32)}, "w/Q", "3 scales on axis 0 of size 4", "error"),
        ({"w_scale": np.full(3, 0.01, np.float32), "axis": 1}, "w/DQ", "on axis 1, which does not run in INT8", "loss"),
        ({"axis": 7}, "w/Q", "axis 7 of a tensor of rank 4", "error"),
        ({"edit": rename}, "x/Q", "two nodes are named", "note"),
        ({"edit": rename_pair}, "x/DQ", "two nodes are named", "error"),
        ({"edit": unname}, "node of y", "has no name", "note"),
        ({"edit": bare_data}, "conv", "its data has no Q/DQ", "loss"),
        ({"edit": bare_weight}, "conv", "its weight has no Q/DQ", "loss"),
        ({"edit": identity}, "copy", "Identity on a constant", "error"),
        ({"edit": quantized_bias, "bias": np.zeros(4, np.int32)}, "b/DQ", "int32 data", "error"),
        ({"edit": quantized_bias, "bias": np.zeros(4, np.int8)}, "conv", "Q/DQ on the bias", "note"),
        ({"edit": no_zero_point}, "x/Q", "no zero-point", "error"),
        ({"edit": other_scale, "s2": np.float32(0.3)}, "x/DQ", "scale differs from that of x/Q", "note"),
        ({"edit": computed_scale}, "x/Q", "scale is computed in the graph", "error"),
        ({"edit": codes_read}, "x/Q", "read by something else", "loss"),
        ({"edit": dynamic}, "dynamic", "does not support DynamicQuantizeLinear", "error"),
    ],
)
def test_a_broken_rule_is_found(changes, node, message, level):
    findings = check_onnx(conv_graph(**changes))
    assert any(f.node == node and re.search(message, f.problem) and f.level == level for f in findings), findings


def test_int8_weights_are_not_for_opset_17():
    def stored(nodes):
        del nodes[2]
        nodes[2].input[0] = "codes"

    def findings(opset, **target):
        model = conv_graph(opset=opset, edit=stored, codes=np.ones((4, 3, 1, 1), np.int8))
        return [f.node for f in broken(model, **target)]

    assert findings(17) == ["w/DQ"]
    assert findings(17, target="10") == []
    assert findings(19) == []
    assert findings(19, target="8.6") == ["w/DQ"]


def test_transposed_convolution_is_noted_only():
    graph = conv_graph(op="ConvTranspose", w_scale=np.float32(0.01), w_zero=np.int8(0))
    assert [(f.node, f.level) for f in check_onnx(graph) if f.node != "graph"] == [("conv", "note")]


@pytest.mark.parametrize(
    ("settings", "is_broken"),
    [
        ({"shape": (6, 4), "axis": 1}, False),
        ({"shape": (6, 4), "axis": 0, "scales": 6}, True),
        ({"shape": (4, 6), "axis": 0, "transpose": True}, False),
        ({"shape": (4, 6), "axis": 1, "scales": 6, "transpose": True}, True),
    ],
)
def test_matmul_weights_are_quantized_along_the_output(settings, is_broken):
    found = [f for f in check_onnx(matmul_graph(**settings)) if "does not run in INT8" in f.problem]
    assert bool(found) is is_broken


def test_float_layer_may_read_what_a_quantized_one_reads():
    model = conv_graph()
    model.graph.node.append(helper.make_node("Conv", ["x_dq", "w"], ["z"], "float"))
    assert broken(model) == []


def test_a_file_is_read(tmp_path):
    onnx.save(conv_graph(x_scale=np.float32(-1)), str(tmp_path / "m.onnx"))
    finding = check_onnx(tmp_path / "m.onnx")[0]
    assert str(finding).startswith("x/Q: ")
    assert "Calibrate again" in str(finding)
