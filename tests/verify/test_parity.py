"""parity: what it measures, on graphs that agree and on graphs that were made to disagree."""

import numpy as np
import onnx
import pytest
import torch
from export_nets import Recurrent, TwoHeads, images, quantized, tiny
from onnx import helper, numpy_helper
from ort import open_as_written
from torch import nn

import qat
from qat.core.numerics import quantize
from qat.core.quantizer import State, quantizers
from qat.verify.differences import Difference
from qat.verify.onnx_parity import _ReversedSums


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return qat.export_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx", images(1))


@pytest.fixture(scope="module")
def report(model, path):
    return qat.parity(model, path, images(4), codes=True, segments=True)


def changed(path, tmp_path, name, factor):
    """A copy of the file with one constant multiplied."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(proto, str(tmp_path / "changed.onnx"))
    return tmp_path / "changed.onnx"


def awkward(scale):
    """Ties, zeros of both signs, denormals, huge values and infinities, in units of ``scale`` and not."""
    codes = np.arange(-140, 140, dtype=np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf], np.float32)
    drawn = np.random.default_rng(0).normal(0, 60 * scale, 4096).astype(np.float32)
    return np.concatenate([(codes + np.float32(0.5)) * scale, codes * scale, special, drawn]).astype(np.float32)


def quantize_in_onnx(x, scale, axis):
    """Codes by ONNX Runtime's QuantizeLinear."""
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("q", onnx.TensorProto.INT8, None)],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.zeros(scale.shape, np.int8), "z")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return open_as_written(proto.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0123, 3e-5, 2.0**-24])
def test_same_tensor_same_codes_per_tensor(scale):
    x = awkward(np.float32(scale))
    expected = quantize_in_onnx(x, np.asarray(scale, np.float32), None)
    np.testing.assert_array_equal(quantize(torch.from_numpy(x), torch.tensor(scale)).numpy(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_same_tensor_same_codes_per_channel(axis):
    scales = np.array([1.0, 0.1, 0.0123, 3e-5], np.float32)
    x = np.stack([awkward(scale) for scale in scales], axis)
    expected = quantize_in_onnx(x, scales, axis)
    np.testing.assert_array_equal(quantize(torch.from_numpy(x), torch.from_numpy(scales), axis=axis).numpy(), expected)


def test_an_exported_site_gives_the_same_codes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.from_numpy(awkward(0.02)[:4648].reshape(-1, 8))
    x = x[x.isfinite().all(1) & (x.abs() < 1e3).all(1)]
    quantized(model, x)
    site = model[0].input_quantizer
    path = qat.export_onnx(model, tmp_path / "m.onnx", x[:2])
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("0.input_quantizer/codes", onnx.TensorProto.INT8, None))
    session = open_as_written(proto.SerializeToString())
    codes = session.run(["0.input_quantizer/codes"], {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_array_equal(codes, np.rint(x.numpy() / site.scale.numpy()).clip(-128, 127))


def test_difference_by_hand():
    reference, other = np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 2.0], [4.0, 5.0]])
    found = Difference.between(reference, other)
    assert (found.max_abs, found.max_rel, found.top1) == (2.0, 0.5, 0.5)
    assert found.sqnr == pytest.approx(10 * np.log10(30 / 4))


def test_equal_outputs_have_infinite_sqnr():
    assert Difference.between(np.ones((2, 3, 4)), np.ones((2, 3, 4))) == Difference(0.0, 0.0, float("inf"), None)


def test_export_agrees_with_the_model(report):
    assert report.top1 == 1.0
    assert report.outputs[0].onnx.max_rel < 0.02
    assert report.codes_equal > 0.999


def test_no_farther_than_pytorch_from_itself(report):
    assert report.within_drift()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=4, padding="same"), (2, 8, 9, 9)),
        (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (8, 9, 9)),
        (nn.Conv1d(8, 4, 3, groups=2), (8, 11)),
        (nn.Conv3d(8, 4, 2, dilation=2), (2, 8, 5, 5, 5)),
        (nn.Linear(64, 5), (64,)),
        (nn.Linear(64, 5, bias=False), (2, 3, 64)),
    ],
    ids=str,
)
def test_drift_sums_the_same_terms_in_another_order(layer, shape):
    """The layers have random weights; any will do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    expected = layer.double()(x.double())
    layer.float()
    with _ReversedSums():
        reversed_sum = layer(x)
    torch.testing.assert_close(reversed_sum.double(), expected, rtol=1e-5, atol=1e-5)
    if isinstance(layer, nn.Linear):
        by_keyword = _ReversedSums()
        with by_keyword:
            assert torch.equal(nn.functional.linear(weight=layer.weight, bias=layer.bias, input=x), reversed_sum)


def test_drift_is_not_nothing():
    """Neither kernels nor memory formats change the bits of these 1x1 convolutions."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(256, 64, 1, bias=False), torch.randn(1, 256, 28, 28)
    with _ReversedSums():
        changed = layer(x)
    assert not torch.equal(changed, layer(x))


def test_segments_have_equal_weight_codes(report):
    weights = [s for s in report.segments if s.is_weight]
    assert len(weights) == 6
    assert sum(s.differing for s in weights) == 0


def test_segments_differ_near_ties_only(report):
    activations = [s for s in report.segments if not s.is_weight]
    # 9 pairs; two of them are called twice, by the convolution and the Add or the downsampling.
    assert len(activations) == 11
    assert all(s.max_difference <= 1 and s.tie_distance < 1e-3 for s in activations)
    assert sum(s.differing for s in activations) <= 1e-3 * sum(s.elements for s in activations)
    assert report.segments_exact


def test_sites_are_reported_once_a_pair(report):
    assert len(report.sites) == 9
    assert report.unmatched == []


def test_a_wrong_weight_scale_shows_in_its_own_segment_only(model, path, tmp_path):
    bad = changed(path, tmp_path, "block1.conv2.weight_quantizer/scale", 1.5)
    segments = qat.parity(model, bad, images(2), segments=True).segments
    assert {s.site for s in segments if s.is_weight and s.differing} == {"block1.conv2.weight_quantizer"}
    assert not any(s.differing > 0.01 * s.elements for s in segments if s.site.startswith("stem"))


def test_a_wrong_activation_scale_shows_in_the_codes(model, path, tmp_path):
    bad = changed(path, tmp_path, "block2.conv2.input_quantizer/scale", 1.5)
    report = qat.parity(model, bad, images(2), codes=True, segments=True)
    share = {s.site: s.equal for s in report.sites}
    assert share["block2.conv2.input_quantizer"] < 0.9
    assert share["block1.conv2.input_quantizer"] > 0.99
    assert not report.segments_exact
    assert not report.within_drift()


def test_int8_weights_are_compared_too(model, tmp_path):
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(1), int8_weights=True)
    report = qat.parity(model, path, images(2), segments=True)
    assert report.segments_exact
    assert sum(s.is_weight for s in report.segments) == 6


def test_fused_graph_is_compared_with_the_same_sites_off(model, tmp_path):
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(1), fuse_adds=True)
    report = qat.parity(model, path, images(4), codes=True, segments=True)
    assert report.segments_exact
    assert report.within_drift()
    assert not any("a_quantizer" in s.site for s in report.sites)


def test_calls_of_one_site_are_matched_in_order(tmp_path):
    torch.manual_seed(0)
    model = quantized(Recurrent(), images(2, channels=4))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(2, channels=4))
    report = qat.parity(model, path, images(2, channels=4), codes=True, segments=True)
    assert [(s.call, s.equal > 0.999) for s in report.sites] == [(0, True), (1, True)]
    assert report.segments_exact


def test_every_output_has_a_row(tmp_path):
    torch.manual_seed(0)
    model = quantized(TwoHeads(), images(2))
    report = qat.parity(model, qat.export_onnx(model, tmp_path / "m.onnx", images(2)), images(3))
    assert [o.name for o in report.outputs] == ["out", "aux.0", "aux.1"]
    assert report.top1 is None


def test_external_data_is_found(model, tmp_path):
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(1), external_data=True)
    assert qat.parity(model, path, images(2), codes=True).top1 == 1.0


def test_report_prints_its_numbers(report):
    text = str(report)
    for word in ("output", "drift", "top-1", "100.00%", "block2.quant_add0.b_quantizer", "weights", "activations"):
        assert word in text


def test_model_is_left_as_it_was(path):
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qat.parity(model, path, images(2), codes=True, segments=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not site._forward_pre_hooks and site.state is State.QUANTIZING for _, site in quantizers(model))


def test_missing_file(model, tmp_path):
    with pytest.raises(qat.QATError, match=r"no such file\. Run qat\.export_onnx"):
        qat.parity(model, tmp_path / "none.onnx", images(1))


def test_foreign_file(model, path, tmp_path):
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, str(tmp_path / "m.onnx"))
    with pytest.raises(qat.QATError, match=r"not a file of qat\.export_onnx"):
        qat.parity(model, tmp_path / "m.onnx", images(1))


def test_file_of_another_model(path):
    other = quantized(Recurrent(), images(2, channels=4))
    with pytest.raises(qat.QATError, match=r"^stem\.0\.input_quantizer: in the ONNX file but not in the model"):
        qat.parity(other, path, images(1))


def test_model_without_ranges(path):
    model = tiny()
    model.stem[0].input_quantizer.set_state(State.OFF)
    with pytest.raises(qat.QATError, match=r"^stem\.0\.input_quantizer: quantized in the ONNX file, off in the model"):
        qat.parity(model, path, images(1))


def test_inputs_of_another_shape(model, path, tmp_path):
    with pytest.raises(qat.QATError, match=r"inputs: images has shape \[2, 3, 20, 20\], the ONNX file wants"):
        qat.parity(model, path, images(2, size=20))
    with pytest.raises(qat.QATError, match="inputs: the model does not run"):
        qat.parity(model, path, images(2, channels=1))
