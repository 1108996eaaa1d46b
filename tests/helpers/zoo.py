"""The models that must work unmodified, with the counts of their sites.

Where a comment derives a count from the paper, that is its source. The conv counts of inception_v3 and timm_mobilenetv4 and
the Add counts of the EfficientNets and MobileNets were read off a run and are backed by the hooks and the dispatcher alone.

``conv``, ``linear`` and ``attention`` count the layers that get sites, ``add`` the residual Adds, ``gate`` the
products of squeeze-and-excitation, ``head`` names the classifier layers. The tests compare layers and Adds with two
independent counts: hooks on every layer, and additions seen by PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation


@dataclass(frozen=True)
class Expected:
    """What ``prepare`` must find in one model.

    ``extra_adds`` are additions of two activations of one shape that run and are no residual Adds with sites; ``why_extra``
    says what they are. ``idle`` counts convolution and linear layers that do not run as modules in evaluation.
    """

    make: Callable[[], nn.Module]
    conv: int
    linear: int
    attention: int
    add: int
    head: tuple[str, ...]
    size: int = 224
    detector: bool = False
    gate: int = 0
    extra_adds: int = 0
    why_extra: str = ""
    idle: int = 0
    ci: str = ""

    def inputs(self) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        if self.detector:
            return ([torch.rand(3, self.size, self.size, generator=generator)],)
        return (torch.randn(1, 3, self.size, self.size, generator=generator),)


def tv(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(weights=None, **kwargs)


def seg(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(segmentation, name)(weights=None, weights_backbone=None, **kwargs)


def det(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(detection, name)(weights=None, weights_backbone=None)


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm", reason="needs timm: pip install -e '.[test]'")
        return timm.create_model(name)

    return make


_SSD_HEAD = tuple(f"head.{kind}_head.module_list.{i}.1" for kind in ("classification", "regression") for i in range(6))

ZOO = {
    # He et al. 2015: 2 convs a basic block, 3 a bottleneck, one Add a block; 3 or 4 downsampling convs and the stem.
    "resnet18": Expected(tv("resnet18"), 1 + 8 * 2 + 3, 0, 0, 8, ("fc",), ci="the main job: basic blocks"),
    "resnet50": Expected(tv("resnet50"), 1 + 16 * 3 + 4, 0, 0, 16, ("fc",)),
    "resnext50": Expected(tv("resnext50_32x4d"), 1 + 16 * 3 + 4, 0, 0, 16, ("fc",)),
    "wide_resnet50": Expected(tv("wide_resnet50_2"), 1 + 16 * 3 + 4, 0, 0, 16, ("fc",)),
    # Sandler et al. 2018, table 2: 17 blocks, the first without expansion, 10 of them residual; stem and last conv.
    "mobilenet_v2": Expected(tv("mobilenet_v2"), 2 + 2 + 16 * 3, 0, 0, 10, ("classifier.1",), ci="depthwise, functional pool"),
    # Howard et al. 2019, table 1: 15 blocks, the first without expansion, 8 with squeeze-excitation (2 convs each).
    "mobilenet_v3_large": Expected(tv("mobilenet_v3_large"), 2 + 2 + 14 * 3 + 8 * 2, 1, 0, 10, ("classifier.3",), gate=8),
    # Tan and Le 2019, table 1: 16 blocks with squeeze-excitation (5 convs; 4 without expansion), 9 residual.
    "efficientnet_b0": Expected(tv("efficientnet_b0"), 2 + 4 + 15 * 5, 0, 0, 9, ("classifier.1",), gate=16),
    # Tan and Le 2021, table 4: 10 fused blocks, of which 2 have one conv, and 30 with squeeze-excitation (5 convs).
    "efficientnet_v2_s": Expected(tv("efficientnet_v2_s"), 2 + 2 + 8 * 2 + 30 * 5, 0, 0, 35, ("classifier.1",), gate=30),
    # Radosavovic et al. 2020: 16 blocks of 3 convs and squeeze-excitation, 4 projections, the stem.
    "regnet_y_400mf": Expected(tv("regnet_y_400mf"), 1 + 16 * 5 + 4, 0, 0, 16, ("fc",), gate=16),
    # Liu et al. 2022: 18 blocks (depthwise conv, two linear), 4 downsampling convs.
    "convnext_tiny": Expected(tv("convnext_tiny"), 18 + 4, 36, 0, 18, ("classifier.2",)),
    # Huang et al. 2017: 58 dense layers of 2 convs, 3 transitions, the stem; concatenation, no Add.
    "densenet121": Expected(tv("densenet121"), 1 + 58 * 2 + 3, 0, 0, 0, ("classifier",)),
    # Szegedy et al. 2015: 3 stem convs and 9 inception modules of 6; two auxiliary heads (conv, linear, head).
    "googlenet": Expected(
        tv("googlenet", init_weights=False), 3 + 9 * 6, 0, 0, 0, ("aux1.fc2", "aux2.fc2", "fc"), idle=6, ci="auxiliary heads"
    ),
    # 94 convs counted by hooks, not derived from Szegedy et al. 2016; the auxiliary head has two convs and a linear layer.
    "inception_v3": Expected(tv("inception_v3", init_weights=False), 94, 0, 0, 0, ("AuxLogits.fc", "fc"), size=299, idle=3),
    # Ma et al. 2018: 13 stride-1 units of 3 convs, 3 of stride 2 with 5; stem and last conv.
    "shufflenet_v2": Expected(tv("shufflenet_v2_x1_0"), 2 + 13 * 3 + 3 * 5, 0, 0, 0, ("fc",)),
    # Iandola et al. 2016: 8 fire modules of 3 convs and the stem; the head is a conv.
    "squeezenet1_1": Expected(tv("squeezenet1_1"), 1 + 8 * 3, 0, 0, 0, ("classifier.1",), ci="the head is a conv"),
    "vgg11_bn": Expected(tv("vgg11_bn"), 8, 2, 0, 0, ("classifier.6",)),
    # Tan et al. 2019: as MobileNetV2.
    "mnasnet": Expected(tv("mnasnet1_0"), 1 + 2 + 16 * 3 + 1, 0, 0, 10, ("classifier.1",)),
    # Dosovitskiy et al. 2021: 12 layers with attention, two linear layers, two Adds; patch conv.
    "vit_b_16": Expected(tv("vit_b_16"), 1, 24, 12, 24, ("heads.head",), ci="nn.MultiheadAttention"),
    # Liu et al. 2021: 12 blocks with two linear layers and two Adds, 3 patch mergings; the attention's two linear layers
    # are functional calls.
    "swin_t": Expected(
        tv("swin_t"),
        1,
        24 + 3,
        0,
        24,
        ("head",),
        extra_adds=2,
        why_extra="the position bias has the shape of the attention scores where there is one window",
        idle=24,
        ci="functional linear calls",
    ),
    # Long et al. 2015 on ResNet-50 (53 convs): one conv and the head, twice (auxiliary classifier).
    "fcn_resnet50": Expected(seg("fcn_resnet50", aux_loss=True), 53 + 2, 0, 0, 16, ("classifier.4", "aux_classifier.4")),
    # Chen et al. 2017: ASPP has 5 convs and a projection, then one conv and the head.
    "deeplabv3_resnet50": Expected(
        seg("deeplabv3_resnet50", aux_loss=True), 53 + 5 + 1 + 1 + 1, 0, 0, 16, ("classifier.4", "aux_classifier.4")
    ),
    # Howard et al. 2019, figure 10, on MobileNetV3-large's 62 convs: two convs and two heads. Its own gate averages another
    # tensor than the one it scales.
    "lraspp": Expected(
        seg("lraspp_mobilenet_v3_large"),
        62 + 2,
        0,
        0,
        10,
        ("classifier.low_classifier", "classifier.high_classifier"),
        gate=8,
        extra_adds=1,
        why_extra="the sum of the two heads",
        ci="dict output, two heads",
    ),
    # MobileNetV3-large to its last conv (62), 4 extra blocks of 3 convs, a depthwise conv before each of the 12 heads.
    "ssdlite320": Expected(
        det("ssdlite320_mobilenet_v3_large"),
        62 + 4 * 3 + 12,
        0,
        0,
        10,
        _SSD_HEAD,
        gate=8,
        size=320,
        detector=True,
        ci="a detector, untraceable",
    ),
    # Lin et al. 2017: ResNet-50, FPN with 6 convs besides two of P6 and P7, two towers of 4 convs and their heads. The
    # FPN's one addition runs for two levels.
    "retinanet": Expected(
        det("retinanet_resnet50_fpn"),
        53 + 6 + 2 + 8,
        0,
        0,
        16 + 1,
        ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
        size=320,
        detector=True,
        extra_adds=1,
        why_extra="the FPN's addition is one expression in a loop over two levels",
    ),
    "timm_resnet50": Expected(timm_model("resnet50"), 1 + 16 * 3 + 4, 0, 0, 16, ("fc",)),
    # EfficientNet-B0 without squeeze-excitation.
    "timm_efficientnet_lite0": Expected(
        timm_model("tf_efficientnet_lite0"), 2 + 2 + 15 * 3, 0, 0, 9, ("classifier",), ci="Conv2dSame, a conv subclass"
    ),
    "timm_convnext_tiny": Expected(timm_model("convnext_tiny"), 18 + 4, 36, 0, 18, ("head.fc",)),
    # Two linear layers for attention (packed qkv, projection) and two for the MLP in each of 12 blocks.
    "timm_vit_tiny": Expected(timm_model("vit_tiny_patch16_224"), 1, 48, 0, 24, ("head",)),
    # Counted by hooks, not derived from Qin et al. 2024.
    "timm_mobilenetv4": Expected(timm_model("mobilenetv4_conv_small"), 46, 0, 0, 10, ("classifier",)),
}
