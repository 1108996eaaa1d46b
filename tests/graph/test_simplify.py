"""simplify: fewer operators, the same quantization, the same outputs; or nothing written."""

import json

import numpy as np
import onnx
import pytest
import torch
from export_nets import images, quantized, tiny
from onnx import TensorProto, helper, numpy_helper
from ort import open_as_written
from rtx import needs_rtx, not_int8
from torch import nn

import qat
from qat.errors import QATError
from qat.graph.simplify import simplify

N = helper.make_node


def graph(nodes, *, opset=19, shape=(1, 4, 8, 8), **constants):
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", shape), ("y", None))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], values), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 10
    return model


def pair(x, name, scale="s"):
    return [
        N("QuantizeLinear", [x, scale, "z"], [f"{name}_q"], f"{name}/Q"),
        N("DequantizeLinear", [f"{name}_q", scale, "z"], [name], f"{name}/DQ"),
    ]


def twins(**changes):
    """Two equal pairs on one tensor, whose sum is taken."""
    nodes = [*pair("x", "a"), *pair("x", "b"), N("Identity", ["b"], ["c"], "copy"), N("Add", ["a", "c"], ["y"], "add")]
    return graph(nodes, s=np.float32(0.1), z=np.int8(0), **changes)


def saved(model, folder):
    onnx.save(model, str(folder / "m.onnx"))
    return folder / "m.onnx"


def outputs(path, feeds):
    session = open_as_written(path)
    return session.run(None, feeds)


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(16, 32), layer, nn.Linear(32, 4)).eval()


def test_an_exported_file_keeps_its_parity(tmp_path):
    model, x = tiny(), images(2)
    path = qat.export_onnx(model, tmp_path / "m.onnx", x)
    result = simplify(path, tmp_path / "small.onnx")
    assert result.is_exact
    report = qat.parity(model, tmp_path / "small.onnx", x, codes=True)
    assert report.within_drift()
    assert len(report.sites) == len(qat.parity(model, path, x, codes=True).sites)


def test_metadata_is_kept(tmp_path):
    path = qat.export_onnx(tiny(), tmp_path / "m.onnx", images(1), fuse_adds=True)
    simplify(path, tmp_path / "small.onnx")
    kept = [{e.key: e.value for e in onnx.load(str(p)).metadata_props} for p in (path, tmp_path / "small.onnx")]
    assert kept[0] == kept[1]
    assert kept[0]["qat.fuse_adds"] == "true"


def test_operators_become_fewer(tmp_path):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    path = qat.export_onnx(quantized(transformer(), x), tmp_path / "m.onnx", x)
    result = simplify(path, tmp_path / "small.onnx")
    assert sum(result.after.values()) < sum(result.before.values())
    assert result.after["QuantizeLinear"] == result.before["QuantizeLinear"]
    assert sum(result.after.values()) == len(onnx.load(str(tmp_path / "small.onnx")).graph.node)


@needs_rtx
def test_rtx_runs_the_result_in_int8(tmp_path):
    simplify(qat.export_onnx(tiny(), tmp_path / "m.onnx", images(1)), tmp_path / "small.onnx")
    assert not_int8(tmp_path / "small.onnx") == []


def test_equal_pairs_are_merged_and_named(tmp_path):
    model = twins()
    helper.set_model_props(model, {"qat.sites": json.dumps({"first": ["a/Q"], "second": ["b/Q"]})})
    result = simplify(saved(model, tmp_path), tmp_path / "small.onnx")
    assert (result.before["QuantizeLinear"], result.after["QuantizeLinear"]) == (2, 1)
    small = onnx.load(str(tmp_path / "small.onnx"))
    left = next(node.name for node in small.graph.node if node.op_type == "QuantizeLinear")
    assert json.loads(small.metadata_props[0].value) == {"first": [left], "second": [left]}
    assert set(result.merged.values()) <= {node.name for node in small.graph.node}


def test_pairs_of_other_scales_stay(tmp_path):
    nodes = [*pair("x", "a"), *pair("x", "b", "s2"), N("Add", ["a", "b"], ["y"], "add")]
    model = graph(nodes, s=np.float32(0.1), s2=np.float32(0.2), z=np.int8(0))
    result = simplify(saved(model, tmp_path))
    assert (result.after["QuantizeLinear"], result.merged) == (2, {})


def test_unused_pairs_may_go(tmp_path):
    model = graph(
        [*pair("x", "a"), *pair("x", "b"), N("Relu", ["a"], ["y"], "relu"), N("Relu", ["b"], ["unused"], "dead")],
        s=np.float32(0.1),
        z=np.int8(0),
    )
    result = simplify(saved(model, tmp_path), tmp_path / "small.onnx")
    assert result.after["QuantizeLinear"] == 1


def test_nodes_without_names_get_some(tmp_path):
    model = twins()
    for node in model.graph.node:
        node.name = ""
    simplify(saved(model, tmp_path), tmp_path / "small.onnx")
    names = [node.name for node in onnx.load(str(tmp_path / "small.onnx")).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_folded_batch_norm_is_within_rounding(tmp_path):
    rng = np.random.default_rng(0)
    constants = {name: rng.uniform(0.5, 2, 8).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    nodes = [N("Conv", ["x", "w"], ["c"], "conv"), N("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], "bn")]
    path = saved(graph(nodes, w=rng.standard_normal((8, 4, 3, 3)).astype(np.float32), **constants), tmp_path)
    result = simplify(path, tmp_path / "small.onnx")
    assert "BatchNormalization" not in result.after
    assert not result.is_exact
    assert result.differences["y"] < 1e-5
    x = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(*(outputs(p, {"x": x})[0] for p in (path, tmp_path / "small.onnx")), rtol=1e-4, atol=1e-5)
    (tmp_path / "small.onnx").unlink()
    with pytest.raises(QATError, match="differs by"):
        simplify(path, tmp_path / "small.onnx", tolerance=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def lose_pairs(model, **settings):
    """A tool that drops Q/DQ."""
    for node in model.graph.node:
        if node.op_type == "Add":
            node.input[:] = ["x", "x"]
    kept = [node for node in model.graph.node if node.op_type == "Add"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def make_asymmetric(model, **settings):
    """A tool that changes a zero-point."""
    for tensor in model.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(numpy_helper.from_array(np.int8(3), "z"))
    return model


def double(model, **settings):
    """A tool that changes a scale."""
    for tensor in model.graph.initializer:
        if tensor.name == "s":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.2), "s"))
    return model


def rename_output(model, **settings):
    model.graph.node[-1].output[0] = model.graph.output[0].name = "other"
    return model


def fail(model, **settings):
    raise KeyError("no such operator")


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (lose_pairs, "a/Q .QuantizeLinear. is gone"),
        (make_asymmetric, "breaks a rule"),
        (double, "differs by"),
        (rename_output, "changed the outputs"),
        (fail, "cannot simplify it"),
    ],
)
def test_a_tool_that_changes_the_model_is_refused(tmp_path, monkeypatch, tool, message):
    monkeypatch.setattr("onnxslim.slim", tool)
    path = saved(twins(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(QATError, match=message):
        simplify(path, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_without_out_nothing_is_written(tmp_path):
    path = saved(twins(), tmp_path)
    result = simplify(path)
    assert result.out is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_in_place(tmp_path):
    path = saved(twins(), tmp_path)
    simplify(path, path)
    assert len(onnx.load(str(path)).graph.node) < 6


def test_external_data_stays_external(tmp_path):
    path = qat.export_onnx(tiny(), tmp_path / "m.onnx", images(1), external_data=True)
    x = images(2).numpy()
    simplify(path, tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx.data").stat().st_size > 10_000
    before, after = (outputs(p, {"images": x})[0] for p in (path, tmp_path / "small.onnx"))
    np.testing.assert_array_equal(before, after)


def test_given_inputs_are_used(tmp_path):
    path = saved(twins(shape=(1, 4, "height", 8)), tmp_path)
    with pytest.raises(QATError, match="dimension 2 is open"):
        simplify(path)
    assert simplify(path, inputs={"x": np.ones((1, 4, 3, 8), np.float32)}).is_exact
    with pytest.raises(QATError, match="ONNX Runtime cannot run it"):
        simplify(path, inputs={"x": np.ones((1, 5, 3, 8), np.float64)})


def test_the_table_shows_both_counts(tmp_path):
    text = str(simplify(saved(twins(), tmp_path)))
    row = next(line.split() for line in text.splitlines() if line.startswith("QuantizeLinear"))
    assert row == ["QuantizeLinear", "2", "1"]
    assert "nothing written" in text


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff")
    with pytest.raises(QATError, match="is no ONNX file"):
        simplify(tmp_path / "m.onnx", tmp_path / "small.onnx")
    path = saved(twins(), tmp_path)
    with pytest.raises(QATError, match="cannot be written"):
        simplify(path, tmp_path / "missing" / "small.onnx")
    with pytest.raises(QATError, match="is a folder"):
        simplify(path, tmp_path)
