"""The networks of the classification recipes."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QATError

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet20")


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


def build(arch: str, num_classes: int, *, small_stem: bool = False) -> nn.Module:
    """A network with random weights that takes images ``(N, 3, H, W)``.

    Args:
        arch: One of ``ARCHS``.
        num_classes: Size of the output.
        small_stem: For torchvision's ResNets on images of at most 64 pixels: a 3x3 convolution of stride 1 and no max
            pooling, instead of the stem that divides the resolution by four.

    Raises:
        QATError: For an unknown architecture, or a stem option where there is none.
    """
    if arch not in ARCHS:
        raise QATError(f"arch={arch!r}: choose one of {', '.join(ARCHS)}")
    if arch == "resnet20":
        if small_stem:
            raise QATError("small_stem: resnet20 has a stem for small images already")
        return CifarResNet(3, num_classes)
    model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    if small_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model
