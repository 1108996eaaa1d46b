"""Small models for the tests of the export stage, and their preparation."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

import qat


class Block(nn.Module):
    """A residual block: two convolutions, and a third one on the shortcut if it is a downsampling block."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        stride = 1 if c_in == c_out else 2
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.downsample = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class TinyResNet(nn.Module):
    """Stem, an identity block, a downsampling block, pooling, head: 6 convolutions, 2 residual Adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = Block(16, 16)
        self.block2 = Block(16, 32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        return self.fc(torch.flatten(self.pool(self.block2(self.block1(self.stem(images)))), 1))


class Recurrent(nn.Module):
    """One convolution called twice, on different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.head(torch.relu(self.conv(torch.relu(self.conv(x)))))


class TwoHeads(nn.Module):
    """Dict output, as segmentation models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.a = nn.Conv2d(8, 2, 1)
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        features = self.features(x)
        return OrderedDict(out=self.a(features), aux=(self.b(features), features))


def images(batch: int = 4, size: int = 16, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """One batch of ``(batch, channels, size, size)``."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, example: torch.Tensor, **settings) -> nn.Module:
    """``model``, prepared, calibrated on ``example``, in eval mode; batch norms with statistics that differ."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 4)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    qat.prepare(model, qat.QuantConfig(**settings), example_inputs=(example,))
    qat.calibrate(model, [example], method="max", progress=False)
    return model.eval()


def tiny(**settings) -> nn.Module:
    """A quantized :class:`TinyResNet`; the same at every call."""
    torch.manual_seed(0)
    return quantized(TinyResNet(), images(), **settings)


def exporter(model, folder, batch):
    """A function that gives the model's file for some options; each is exported once."""
    files = {}

    def export(**options):
        key = str(sorted(options.items()))
        if key not in files:
            files[key] = qat.export_onnx(model, folder / f"{len(files)}.onnx", batch, **options)
        return files[key]

    return export
