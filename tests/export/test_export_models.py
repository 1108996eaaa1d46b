"""The whole arrow on real architectures: export at opset 17 and 19, RTX compiles all sites to INT8, codes agree."""

import pytest
import torch
import torchvision
from export_nets import images, quantized
from rtx import not_int8, quantized_nodes

import qat
from qat.export import BackboneAndHead

pytestmark = pytest.mark.slow
rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install -e '.[rtx]')")

# Name, image size, number of Conv/Gemm/MatMul nodes with two quantized operands: all convolutions and linear layers of
# the published architecture but the head (for segmentation the last convolution of each head).
CLASSIFIERS = [
    ("resnet18", 64, 20),
    ("resnet50", 64, 53),
    ("mobilenet_v2", 64, 52),
    ("efficientnet_b0", 64, 81),
    ("convnext_tiny", 64, 22 + 36),
    ("densenet121", 64, 120),
    ("shufflenet_v2_x1_0", 64, 56),
    ("vit_b_16", 224, 1 + 12 * 4),
    ("deeplabv3_resnet50", 64, 53 + 7),
]


def make(name):
    torch.manual_seed(0)
    extra = {"weights_backbone": None} if "deeplab" in name else {}
    return torchvision.models.get_model(name, weights=None, **extra)


@pytest.mark.parametrize(("name", "size", "nodes"), CLASSIFIERS)
def test_model(tmp_path, name, size, nodes):
    model = quantized(make(name), images(2, size=size))
    for opset in (17, 19):
        path = qat.export_onnx(model, tmp_path / f"{opset}.onnx", images(1, size=size), opset=opset)
        assert len(quantized_nodes(path)) == nodes
        assert not_int8(path) == []
        report = qat.parity(model, path, images(2, size=size, seed=2), segments=True)
        assert report.segments_exact, report
        assert not report.unmatched


def test_swin_runs_in_int8(tmp_path):
    model = quantized(make("swin_t"), images(2, size=64))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(1, size=64), opset=17)
    assert quantized_nodes(path)
    assert not_int8(path) == []
    assert qat.parity(model, path, images(2, size=64, seed=2), segments=True).segments_exact


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detector(tmp_path, name):
    torch.manual_seed(0)
    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval()
    qat.prepare(detector, example_inputs=([torch.rand(3, 320, 320)],))
    part = BackboneAndHead(detector.backbone, detector.head)
    qat.calibrate(part, [images(1, size=320)], method="max", progress=False)
    path = qat.export_onnx(part, tmp_path / "m.onnx", images(1, size=320), dynamic_batch=False)
    assert quantized_nodes(path)
    assert not_int8(path) == []
    report = qat.parity(part, path, images(1, size=320, seed=2), segments=True)
    assert {output.name for output in report.outputs} == {"cls_logits", "bbox_regression"}
    assert report.segments_exact
