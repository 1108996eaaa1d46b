"""TensorRT's calibration caches: read, refused where malformed, given to the sites that read the tensors."""

import struct

import pytest
import torch
from prepare_nets import Block, Net, images, snapshot
from torch import nn

import qat
from qat.core.quantizer import WeightQuantizer, is_prepared, quantizers
from qat.errors import QATError
from qat.export import export_float
from qat.interop import load_calibration_cache, read_calibration_cache, tensor_names

HEADER = "TRT-8601-EntropyCalibration2\n"


def line(name, scale):
    return f"{name}: {struct.pack('>f', scale).hex()}\n"


@pytest.mark.parametrize("header", [HEADER, "TRT-100100-MinMaxCalibration\r\n", "0\n"])
def test_scales_are_read_by_tensor_name(tmp_path, header):
    path = tmp_path / "x.cache"
    text = header + "input.1: 3c010a14\n" + line("(Unnamed Layer* 0) [Shuffle]: out:0", 0.5) + line("zeros", 0.0) + "\n"
    path.write_bytes(text.encode())
    # 0x3c010a14: sign 0, exponent 120 - 127, fraction 0x010a14.
    scales = {"input.1": (1 + 0x010A14 / 2**23) / 2**7, "(Unnamed Layer* 0) [Shuffle]: out:0": 0.5, "zeros": 0.0}
    assert read_calibration_cache(path) == scales


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no calibration cache of TensorRT"),
        (b"x: 3c010a14\n", "first line is not TRT-"),
        (b"1\nx: 3c010a14\n", "first line is not TRT-"),
        (HEADER.encode(), "holds no scales"),
        (HEADER.encode() + b"x: 3c010a1\n", r"line 2 is not 'tensor: <8 hex digits>': 'x: 3c010a1'"),
        (HEADER.encode() + b"y: 3c010a14\nx 3c010a14\n", "line 3 is not"),
        (HEADER.encode() + b"x: 3c010a1g\n", "line 2 is not"),
        (HEADER.encode() + b"x: 7fc00000\n", "line 2: the scale of 'x' is nan"),
        (HEADER.encode() + b"x: 7f800000\n", "line 2: the scale of 'x' is inf"),
        (HEADER.encode() + b"x: bc010a14\n", "line 2: the scale of 'x' is -0"),
        (HEADER.encode() + b"x: 3c010a14\nx: 3c010a15\n", "line 3: 'x' has another scale before"),
        (HEADER.encode() + b"\xff\xfe: 3c010a14\n", "it is no text"),
    ],
)
def test_malformed_caches_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "x.cache"
    path.write_bytes(content)
    with pytest.raises(QATError, match=rf"x\.cache: .*{message}"):
        read_calibration_cache(path)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(QATError, match=r"x\.cache: cannot be read"):
        read_calibration_cache(tmp_path / "x.cache")


def net():
    torch.manual_seed(0)
    model = Net(nn.Sequential(Block(), Block())).eval()
    model.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval())  # exporters fold it
    with torch.no_grad():
        model.stem[1].running_mean.uniform_(-1, 1)
        model.stem[1].running_var.uniform_(0.5, 2)
    return model


def export(exporter, path):
    if exporter == "qat":
        return export_float(net(), path, images())
    torch.onnx.export(net(), images(), path, dynamo=False, opset_version=17, input_names=["data"])
    return path


def observed(model):
    """The maximum of what each site reads, by a calibration of its own."""
    qat.prepare(model)
    qat.calibrate(model, [images()], method="max", progress=False)
    return {path: site.amax for path, site in quantizers(model) if not isinstance(site, WeightQuantizer)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("exporter", ["qat", "torchscript"])
def test_sites_get_the_scale_of_their_tensor_whoever_exported_the_graph(tmp_path, exporter):
    onnx_path = export(exporter, tmp_path / "float.onnx")
    ranges = observed(reference := net())
    qat.prepare(model := net())
    names = tensor_names(model, onnx_path, images())
    assert names.keys() == ranges.keys()
    assert names["stem.0.input_quantizer"] == ("x" if exporter == "qat" else "data",)
    cache = tmp_path / "x.cache"
    cache.write_text(HEADER + "".join(line(found[0], float(ranges[site]) / 127) for site, found in names.items()))
    imported = load_calibration_cache(model, cache, onnx_path, images())
    assert imported.sites == {site: found[0] for site, found in names.items()}
    assert not imported.unset
    for path, site in quantizers(model):
        # amax -> scale in the file -> amax: a unit in the last place each.
        assert torch.allclose(site.scale, reference.get_submodule(path).scale, rtol=2**-22, atol=0)
    assert torch.allclose(model(images(1)), reference(images(1)), atol=0.05)


def test_a_tensor_that_the_cache_lacks_is_an_error_and_nothing_changes(tmp_path):
    onnx_path = export("qat", tmp_path / "float.onnx")
    qat.prepare(model := net())
    before = snapshot(model)
    scales = {
        found[0]: 0.1
        for site, found in tensor_names(model, onnx_path, images()).items()
        if site != "fc" and "conv2" not in site
    }
    with pytest.raises(
        QATError, match=r"^body\.0\.conv2\.input_quantizer, body\.1\.conv2\.input_quantizer: cache has no scale"
    ):
        load_calibration_cache(model, scales, onnx_path, images())
    assert snapshot(model) == before
    assert not any(site.has_range for _, site in quantizers(model))


def test_a_graph_with_other_weights_is_not_matched(tmp_path):
    onnx_path = export("qat", tmp_path / "float.onnx")
    qat.prepare(model := net())
    names = tensor_names(model, onnx_path, images())
    with torch.no_grad():
        model.stem[0].weight.mul_(1.1)
    assert not tensor_names(model, onnx_path, images())["body.0.conv1.input_quantizer"]
    with pytest.raises(QATError, match="with the model's weights"):
        load_calibration_cache(model, {found[0]: 0.1 for found in names.values()}, onnx_path, images())


def test_a_tensor_of_zeros_gets_the_smallest_range(tmp_path):
    onnx_path = export("qat", tmp_path / "float.onnx")
    qat.prepare(model := net())
    names = tensor_names(model, onnx_path, images())
    imported = load_calibration_cache(model, {found[0]: 0.0 for found in names.values()}, onnx_path, images())
    assert len(imported.notes) == len(names)
    assert "raised to 7.6e-06" in imported.notes[0]
    assert all(site.has_range for _, site in quantizers(model))


def test_equal_tensors_with_other_scales_are_told(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x.clamp(min=0)), x

    torch.manual_seed(0)
    model = Twice().eval()
    onnx_path = export_float(model, tmp_path / "float.onnx", images())
    qat.prepare(model, qat.QuantConfig(head=()))
    names = tensor_names(model, onnx_path, images())["b.input_quantizer"]
    assert len(names) == 2
    with pytest.warns(UserWarning, match=r"b\.input_quantizer: .* with other scales"):
        load_calibration_cache(model, {"x": 0.1, names[0]: 0.1, names[1]: 0.2}, onnx_path, images())


def test_a_float_model_is_refused(tmp_path):
    onnx_path = export("qat", tmp_path / "float.onnx")
    model = net()
    with pytest.raises(QATError, match="not prepared"):
        load_calibration_cache(model, {"x": 0.1}, onnx_path, images())
    with pytest.raises(QATError, match="not prepared"):
        tensor_names(model, onnx_path, images())
    assert not is_prepared(model)


@pytest.mark.parametrize("scale", [float("nan"), -1.0, 1e38])
def test_a_scale_that_gives_no_range_is_named_and_nothing_changes(tmp_path, scale):
    onnx_path = export("qat", tmp_path / "float.onnx")
    qat.prepare(model := net())
    before = snapshot(model)
    named = tensor_names(model, onnx_path, images())
    scales = {found[0]: 0.1 for found in named.values()}
    tensor, *_ = list(named.values())[-1]
    with pytest.raises(QATError, match=rf"the scale of {tensor} in cache gives no finite range"):
        load_calibration_cache(model, {**scales, tensor: scale}, onnx_path, images())
    assert snapshot(model) == before
    assert not any(quantizer.has_range for _, quantizer in quantizers(model))


class Attending(nn.Module):
    """Its attention reads, by the exporter, a sequence in another order than the module."""

    def __init__(self, batch_first):
        super().__init__()
        self.into, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.into(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_sites_of_attention_get_the_ranges_of_their_tensors(tmp_path, batch_first):
    torch.manual_seed(0)
    model, x = Attending(batch_first).eval(), torch.randn(2, 6, 16)
    export_float(model, tmp_path / "float.onnx", example_inputs=x)
    qat.prepare(model)
    names = tensor_names(model, tmp_path / "float.onnx", x)
    scales = dict.fromkeys((name for found in names.values() for name in found), 0.01)
    result = load_calibration_cache(model, scales, tmp_path / "float.onnx", x)
    assert result.unset == ()
    assert {"attention.query_quantizer", "attention.out_quantizer", "into.input_quantizer"} <= set(result.sites)
    assert all(site.has_range for _, site in quantizers(model))
    assert float(model.attention.out_quantizer.amax) == pytest.approx(1.27)
    weight = model.attention.in_proj_weight.detach().abs().amax(1)
    torch.testing.assert_close(model.attention.in_weight_quantizer.amax, weight)
    without = {name: scale for name, scale in scales.items() if name not in names["attention.out_quantizer"]}
    with pytest.raises(QATError, match="out_quantizer: cache has no scale"):
        load_calibration_cache(model, without, tmp_path / "float.onnx", x)
