"""What TensorRT-RTX makes of exported files: every quantized convolution and linear layer multiplies INT8 by INT8."""

import numpy as np
import onnx
import pytest
import torch
import torchvision
from export_nets import Recurrent, images, quantized, tiny
from onnx import numpy_helper
from rtx import TARGETS, needs_rtx, not_int8, quantized_nodes
from torch import nn

import qat

pytestmark = needs_rtx
on_targets = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return quantized(torchvision.models.resnet18(), images(2, size=64))


@pytest.fixture(scope="module")
def resnet18_file(resnet18, tmp_path_factory):
    return qat.export_onnx(resnet18, tmp_path_factory.mktemp("resnet18") / "m.onnx", images(1, size=64))


@on_targets
@pytest.mark.parametrize("options", [{}, {"opset": 17}, {"int8_weights": True}, {"fuse_adds": True}], ids=str)
def test_tiny_resnet(tmp_path, options, target):
    path = qat.export_onnx(tiny(), tmp_path / "m.onnx", images(1), **options)
    assert len(quantized_nodes(path)) == 6
    assert not_int8(path, target) == []


@on_targets
def test_resnet18(resnet18_file, target):
    assert len(quantized_nodes(resnet18_file)) == 20
    assert not_int8(resnet18_file, target) == []


def test_resnet18_within_drift(resnet18, resnet18_file):
    report = qat.parity(resnet18, resnet18_file, images(2, size=64), segments=True)
    assert report.segments_exact
    assert report.within_drift()


@pytest.mark.parametrize("shape", [(6, 64), (2, 7, 64)], ids=["2-D", "3-D"])
def test_linear(tmp_path, shape):
    torch.manual_seed(0)
    model = quantized(
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(shape)
    )
    path = qat.export_onnx(model, tmp_path / "m.onnx", torch.randn(shape))
    assert len(quantized_nodes(path)) == 2
    assert not_int8(path) == []


def test_attention(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 1, 4, 64, 128, num_classes=10)
    quantized(model, images(2, size=32))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(1, size=32))
    # The patch convolution, two projections of attention, two linear layers.
    assert len(quantized_nodes(path)) == 5
    assert not_int8(path) == []


def test_oracle_sees_a_convolution_that_is_not_int8(tmp_path):
    """The oracle itself: a rank-1 activation scale costs INT8 on TensorRT-RTX."""
    torch.manual_seed(0)
    proto = onnx.load(qat.export_onnx(tiny(), tmp_path / "m.onnx", images(1)))
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("block1.conv2.input_quantizer/"):
            tensor.CopyFrom(numpy_helper.from_array(np.atleast_1d(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(proto, str(tmp_path / "rank1.onnx"))
    assert not_int8(tmp_path / "rank1.onnx") == ["block1.conv2/Conv"]


def test_site_called_twice(tmp_path):
    torch.manual_seed(0)
    model = quantized(Recurrent(), images(2, channels=4))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(2, channels=4))
    assert len(quantized_nodes(path)) == 2
    assert not_int8(path) == []
