"""Float files: the baseline that an INT8 engine is compared with, by export_float and by export_onnx of a float model."""

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_nets import TwoHeads, images, tiny
from torch import nn
from torchvision.models import mobilenet_v2

import qat
from qat.export import export_float
from qat.graph.check import check_onnx


@pytest.fixture(scope="module")
def model():
    """One MobileNetV2 block of each kind: without expansion, of stride 2, residual."""
    torch.manual_seed(0)
    return mobilenet_v2(weights=None, num_classes=5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]).eval()


def outputs(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@pytest.mark.parametrize("opset", [17, pytest.param(19, marks=pytest.mark.slow), 23])
def test_computes_what_the_model_computes_for_any_batch(model, tmp_path, opset):
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = export_float(model, tmp_path / "m.onnx", x[:1], opset=opset)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [opset]
    with torch.no_grad():
        np.testing.assert_allclose(outputs(path, x)[0], model(x).numpy(), rtol=1e-4, atol=1e-6)


class ChannelsLast(nn.Module):
    """Pools a map that lies channels-last, as ConvNeXt's."""

    def __init__(self, dims):
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 3)
        self.pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)

    def forward(self, x):
        return self.pool(self.conv(x).movedim(1, -1).contiguous().movedim(-1, 1)).flatten(1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pooling_of_a_channels_last_map_is_a_reduction(dims, tmp_path):
    model = ChannelsLast(dims).eval()
    x = torch.rand(3, 3, *([6] * dims), generator=torch.Generator().manual_seed(0))
    path = export_float(model, tmp_path / "m.onnx", x[:2])
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators & {"ReduceMean", "GlobalAveragePool"}
    assert not operators & {"Gather", "Range"}
    with torch.no_grad():
        np.testing.assert_allclose(outputs(path, x)[0], model(x).numpy(), rtol=1e-4, atol=1e-6)


class Attention(nn.Module):
    def __init__(self, mask=None, heads_first=True, **options):
        super().__init__()
        self.mask, self.heads_first, self.options = mask, heads_first, options

    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, 2, 4)).unbind(-3)  # N, length, heads, 4
        if self.heads_first:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)


LOWER = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("model", "plain", "precision"),
    [
        (Attention(), True, "fp32"),
        (Attention(scale=0.3), True, "fp32"),
        (Attention(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))), True, "fp16"),
        (Attention(LOWER), False, "fp32"),
        (Attention(is_causal=True), False, "fp32"),
    ],
    ids=["plain", "scale", "mask", "boolean", "causal"],
)
def test_attention_transposes_its_keys_at_once(model, plain, precision, tmp_path):
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    path = export_float(model.eval(), tmp_path / "m.onnx", x[:2], precision=precision)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Shape" in operators) is not plain
    assert operators.count("MatMul") == 2
    assert operators.count("Softmax") == 1
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 5e-3, "atol": 5e-3}
    np.testing.assert_allclose(outputs(path, x)[0], model(x).numpy(), **tolerance)


def test_attention_between_heads(tmp_path):
    model = Attention(heads_first=False).eval()
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    path = export_float(model, tmp_path / "m.onnx", x[:2])
    np.testing.assert_allclose(outputs(path, x)[0], model(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [17, 23])
def test_attention_viewed_as_its_kernel_lays_it_out(opset, tmp_path):
    class Viewed(Attention):
        def forward(self, x):
            heads = super().forward(x)
            return heads.transpose(1, 2).view(x.shape[0], x.shape[1], -1)

    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    path = export_float(Viewed().eval(), tmp_path / "m.onnx", x[:2], opset=opset)
    np.testing.assert_allclose(outputs(path, x)[0], Viewed()(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [17, 23])
def test_attention_of_every_opset(opset, tmp_path):
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    path = export_float(Attention().eval(), tmp_path / "m.onnx", x[:2], opset=opset)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Attention" in operators) is (opset == 23)
    np.testing.assert_allclose(outputs(path, x)[0], Attention()(x).numpy(), rtol=1e-5, atol=1e-6)


def test_half_graph_multiplies_in_half_and_keeps_float_inputs(model, tmp_path):
    path = export_float(model, tmp_path / "m.onnx", torch.rand(1, 3, 64, 64), precision="fp16")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1 + 2 + 2 * 3 + 1
    assert {types[node.output[0]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_model_is_left_in_its_mode_with_its_statistics(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = net[1].running_mean.clone()
    export_float(net, tmp_path / "m.onnx", torch.rand(2, 3, 8, 8))
    assert net[0].training
    assert net[1].training
    assert torch.equal(net[1].running_mean, before)


def test_outputs_are_named_by_the_keys_of_a_dict(tmp_path):
    path = export_float(TwoHeads().eval(), tmp_path / "m.onnx", images(1))
    assert [value.name for value in onnx.load(path).graph.output] == ["out", "aux.0", "aux.1"]


def test_prepared_model_is_refused(tmp_path):
    with pytest.raises(qat.QATError, match=r"prepared.*qat\.export_onnx"):
        export_float(tiny(), tmp_path / "m.onnx", images(1))
    assert list(tmp_path.iterdir()) == []


def test_export_onnx_of_a_float_model_writes_the_same_file_and_warns(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meant = export_float(net, tmp_path / "float.onnx", x)
    with pytest.warns(UserWarning, match=r"not prepared, so this is a float file.*qat\.prepare.*export_float") as caught:
        path = qat.export_onnx(net, tmp_path / "m.onnx", x)
    assert caught[0].filename == __file__
    assert path.read_bytes() == meant.read_bytes()


def test_a_float_file_takes_the_arguments_that_are_not_about_quantization(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 40)).eval(), torch.rand(2, 3, 8, 8)
    options = {
        "input_names": ["picture"],
        "output_names": ["scores"],
        "external_data": True,
        "precision": "fp16",
        "half_io": True,
    }
    with pytest.warns(UserWarning, match="float file"):
        path = qat.export_onnx(net, tmp_path / "m.onnx", x, **options)
    graph = onnx.load(path).graph
    assert ([v.name for v in graph.input], [v.name for v in graph.output]) == (["picture"], ["scores"])
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert (tmp_path / "m.onnx.data").exists()


def test_reports_say_that_nothing_is_quantized(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), images(2)
    path = export_float(net, tmp_path / "float.onnx", x)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata == {"qat.sites": "{}", "qat.precision": "fp32"}
    assert [(finding.level, finding.rule) for finding in check_onnx(path)] == [("note", "no-qdq")]
    report = qat.parity(net, path, x)
    assert not report.is_quantized
    assert "A float file: nothing in it is quantized" in str(report)


def test_reports_of_a_quantized_file_do_not(tmp_path):
    model, x = tiny(), images(2)
    report = qat.parity(model, qat.export_onnx(model, tmp_path / "m.onnx", x), x)
    assert report.is_quantized
    assert "float file" not in str(report)
