"""The one reader of graphs: what reaches an input, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.errors import QATError
from qat.graph.graph import Graph

N = helper.make_node


def model(nodes, **constants):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], stored), ir_version=9)
    made.opset_import[0].version = 19
    return made


def quantized(x, name):
    return [
        N("QuantizeLinear", [x, "s", "z"], [f"{name}.q"], f"{name}/Q"),
        N("DequantizeLinear", [f"{name}.q", "s", "z"], [name], f"{name}/DQ"),
    ]


SCALE = {"s": np.float32(0.1), "z": np.int8(0)}


def test_inputs_and_outputs_that_are_left_out_are_no_edge():
    """Both are called "": the one that is left out below stands behind the one above."""
    nodes = [N("Clip", ["x", "", "six"], ["c"], "clip"), N("Dropout", ["c"], ["y", ""], "dropout")]
    graph = Graph(model(nodes, six=np.float32(6)))
    assert graph.producer["y"].name == "dropout"
    assert "" not in graph.readers


def test_nodes_out_of_order_are_refused():
    with pytest.raises(QATError, match="b: the ONNX nodes are not in the order"):
        Graph(model([N("Relu", ["a"], ["y"], "b"), N("Relu", ["x"], ["a"], "a")]))


def test_many_ways_to_one_pair_are_gone_once():
    """Each Concat doubles the ways: 2 to the 60 of them."""
    nodes = quantized("x", "d0") + [N("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], f"cat{i}", axis=1) for i in range(60)]
    graph = Graph(model([*nodes, N("Identity", ["d60"], ["y"])], **SCALE))
    assert [pair.name for pair in graph.dequantizers("y")] == ["d0/DQ"]


def test_weights_are_not_read():
    made = model([N("Conv", ["x", "w"], ["y"], "conv")])
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4, 300, 300], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="nowhere")
    made.graph.initializer.append(outside)
    graph = Graph(made)
    assert graph.shape("w") == [4, 4, 300, 300]
    assert graph.value(graph.nodes[0], 1) is None


def test_a_weight_that_is_computed_from_constants_is_one():
    nodes = [N("Clip", ["w", "", "six"], ["c"], "clip"), *quantized("c", "d"), N("Conv", ["x", "d"], ["y"], "conv")]
    graph = Graph(model(nodes, w=np.ones((4, 4, 1, 1), np.float32), six=np.float32(6), **SCALE))
    assert graph.weight(graph.producer["d"]) == "c"
    assert graph.shape("c") == [4, 4, 1, 1]


def test_a_shape_is_no_activation():
    nodes = [N("Shape", ["x"], ["shape"], "shape"), N("Reshape", ["x", "shape"], ["y"], "reshape")]
    graph = Graph(model(nodes))
    assert graph.is_constant("shape")
    assert not graph.is_constant("y")
    assert "shape" in graph.depends_on_input


def test_what_a_branch_reads_counts():
    """An If whose branches read the graph's input by name."""
    branch = helper.make_graph([N("Identity", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, None)])
    graph = Graph(model([N("If", ["c"], ["y"], "if", then_branch=branch, else_branch=branch)], c=np.bool_(True)))
    assert not graph.is_constant("y")


def test_functions_are_inlined():
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [N("Add", ["a", "a"], ["b"], "add")], [helper.make_opsetid("", 19)]
    )
    made = model([N("Twice", ["x"], ["y"], "twice", domain="own")])
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    onnx.checker.check_model(made)
    assert [node.op_type for node in Graph(made).nodes] == ["Add"]
