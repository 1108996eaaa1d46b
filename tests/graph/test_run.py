"""The one place that opens ONNX Runtime, and the arrays that graphs are fed."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from qat.errors import QATError
from qat.graph import run
from qat.graph.feeds import graph_feeds, refuse_nan

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def chain(*operators):
    names = ["x", *(f"t{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [helper.make_node(op, [a], [b], b) for op, a, b in zip(operators, names[:-1], names[1:], strict=True)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=9)
    model.opset_import[0].version = 19
    return model


@pytest.mark.parametrize("form", ["model", "bytes", "file", "large"])
def test_every_form_of_a_graph_is_run(form, tmp_path, monkeypatch):
    model = chain("Neg", "Exp")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    if form == "large":
        monkeypatch.setattr(run, "_PROTOBUF_LIMIT", 1)
    source = {"bytes": model.SerializeToString(), "file": tmp_path / "m.onnx"}.get(form, model)
    np.testing.assert_allclose(run.run_model(source, {"x": X}, blame="b")["y"], np.exp(-X), rtol=1e-6)


def test_marked_tensors_are_returned_and_the_model_is_left():
    model = chain("Neg", "Exp")
    found = run.run_model(run.marked(model, ["t0", "y"]), {"x": X}, blame="b")
    np.testing.assert_array_equal(found["t0"], -X)
    assert [value.name for value in model.graph.output] == ["y"]


def test_nothing_is_optimized_as_written():
    for as_written, level in ((True, "ORT_DISABLE_ALL"), (False, "ORT_ENABLE_ALL")):
        session = run.open_session(chain("Exp"), as_written=as_written)
        assert session.get_session_options().graph_optimization_level.name == level


@pytest.mark.parametrize("feeds", [{"x": X.astype(np.int64)}, {"z": X}, {"x": X[0]}])
def test_what_onnx_runtime_raises_is_told(feeds):
    with pytest.raises(QATError, match=r"of mine: .*Look at it"):
        run.run_model(chain("Neg"), feeds, blame="of mine", remedy=". Look at it")


def test_a_graph_that_it_refuses_is_told():
    with pytest.raises(QATError, match="of mine: "):
        run.open_session(b"no graph", blame="of mine")


INPUTS = [
    helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["n", 3]),
    helper.make_tensor_value_info("b", TensorProto.INT64, [2]),
]
B = np.array([1, 2])


def test_feeds_go_by_name_or_by_position():
    for fed in (graph_feeds(INPUTS, [X, B], "inputs"), graph_feeds(INPUTS, [B, X], "inputs", named={"b": B, "a": X})):
        assert fed["a"].dtype == np.float16
        np.testing.assert_array_equal(fed["a"], X)
        np.testing.assert_array_equal(fed["b"], B)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([X], r"inputs: 1 arrays, the ONNX file has 2 inputs: \['a', 'b'\]"),
        ([X, B.astype(np.int32)], "inputs: b is int32, the ONNX file wants int64"),
        ([X, B[:1]], r"inputs: b has shape \[1\], the ONNX file wants \[2\]"),
        ([X[0], B], r"inputs: a has shape \[3\], the ONNX file wants \['n', 3\]"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(values, message):
    with pytest.raises(QATError, match=message):
        graph_feeds(INPUTS, values, "inputs")


def test_nan_is_refused():
    with pytest.raises(QATError, match="inputs: a holds 1 NaN"):
        refuse_nan({"a": np.array([1, np.nan])}, "inputs")
