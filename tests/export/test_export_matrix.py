"""Every model of the zoo in FP16: exports, passes the checks, and TensorRT-RTX runs all its quantized layers in INT8.

No exceptions: every convolution and linear layer behind two Q/DQ pairs multiplies INT8 by INT8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from export_nets import images, quantized, tiny
from onnx import TensorProto
from rtx import TARGETS, needs_rtx, not_int8, quantized_nodes
from torch import nn
from zoo import ZOO, Expected

import qat
from qat.export import BackboneAndHead, check_onnx

pytestmark = needs_rtx
on_targets = pytest.mark.parametrize("target", TARGETS)
# Large enough for every layer to see more than one value, or what the model insists on.
SIZES = {"vit_b_16": 224, "timm_vit_tiny": 224, "inception_v3": 139, "ssdlite320": 320, "retinanet": 320}
# Nodes beyond one a layer. RetinaNet's two towers of 4 convolutions run on each of 5 feature levels.
REPEATED = {"retinanet": 2 * 4 * (5 - 1)}


def prepared(expected: Expected, size: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = expected.make().eval()
    x = images(2, size=size)
    if not expected.detector:
        return quantized(model, x), x
    qat.prepare(model, example_inputs=expected.inputs())
    part = BackboneAndHead(model.backbone, model.head).eval()
    x = images(1, size=size)
    qat.calibrate(part, [x], method="max", progress=False)
    return part, x


def assert_half_and_int8(model: nn.Module, x: torch.Tensor, folder: Path, nodes: int, target: str, **options: Any) -> None:
    path = qat.export_onnx(model, folder / "m.onnx", x, precision="fp16", **options)
    assert [str(finding) for finding in check_onnx(path) if finding.level != "note"] == []
    proto = onnx.load(path)
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert {kinds[node.output[0]] for node in layers} == {TensorProto.FLOAT16}
    assert len(quantized_nodes(path)) == nodes
    assert not_int8(path, target) == []
    report = qat.parity(model, path, x)
    assert report.within_drift(), report


@on_targets
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "resnet18" else pytest.mark.slow) for name in ZOO], ids=list(ZOO)
)
# Some untrained models put out zeros only; that is reported, and no matter here.
@pytest.mark.filterwarnings("ignore:.*only zeros were seen")
def test_zoo(tmp_path, name, target):
    expected = ZOO[name]
    model, x = prepared(expected, SIZES.get(name, 64))
    # Attention has two nodes: the packed projection of query, key and value, and that of the output.
    nodes = expected.conv + expected.linear + 2 * expected.attention + REPEATED.get(name, 0)
    assert_half_and_int8(model, x, tmp_path, nodes, target, dynamic_batch=not expected.detector)


@on_targets
def test_blocks_of_mobilenet(tmp_path, target):
    """One of each kind: without expansion, of stride 2, residual."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]).eval()
    x = images(2, size=64)
    assert_half_and_int8(quantized(model, x), x, tmp_path, 1 + 2 + 2 * 3 + 1, target, dynamic_batch=True)


@on_targets
def test_layer_normalization_and_attention(tmp_path, target):
    torch.manual_seed(0)
    model = quantized(torchvision.models.VisionTransformer(32, 8, 2, 4, 256, 512, num_classes=10), images(2, size=32))
    assert_half_and_int8(model, images(2, size=32), tmp_path, 1 + 2 * 4, target)


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    return quantized(torchvision.models.VisionTransformer(32, 8, 1, 4, 64, 128, num_classes=10), images(2, size=32))


@on_targets
def test_attention_operator_of_opset_23(tmp_path, target):
    """There the pairs have ``output_dtype`` instead of Casts, and attention is one node."""
    assert_half_and_int8(vision_transformer(), images(2, size=32), tmp_path, 1 + 4, target, opset=23)


@on_targets
@pytest.mark.parametrize("opset", [19, 23])
def test_weights_as_codes_and_fused_additions(tmp_path, opset, target):
    assert_half_and_int8(tiny(), images(2), tmp_path, 6, target, opset=opset, int8_weights=True, fuse_adds=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_packed_projection_with_weights_as_codes_is_lost(tmp_path, precision):
    """The one loss known: TensorRT-RTX 1.7 splits it into heads and then dequantizes stored codes. A limit of int8_weights.

    Float weights with Q and DQ, the default, are not affected.
    """
    path = qat.export_onnx(
        vision_transformer(), tmp_path / "m.onnx", images(2, size=32), precision=precision, int8_weights=True
    )
    assert not_int8(path) == ["encoder.layers.encoder_layer_0.self_attention/MatMul"]
