"""The networks behind tests/recorded/v0.1, which are named in its pickles: keep their names, layers and arguments."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4


class Residual(nn.Module):
    """A convolution with batch norm around which the input is added; one gate for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)) + x)
        return y * torch.sigmoid(self.gate(self.squeeze(y)))


class Attention(nn.Module):
    """Self-attention around which the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Net(nn.Module):
    """``(N, 3, 6, 6)`` to ``(N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.block = Residual()
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.attention = Attention()
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.hidden, self.fc = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.depthwise(self.block(self.relu(self.stem(x))))
        x = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 3))
        return self.fc(torch.relu(self.hidden(self.up(x).mean((2, 3)))))


class Lit(pl.LightningModule):
    """Trains a :class:`Net`."""

    def __init__(self, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Net()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate, momentum=0.9)


def loader():
    """Batches of 4 in a fixed order."""
    return DataLoader(TensorDataset(IMAGES, LABELS), 4)


def trainer(callback, epochs, folder=None):
    """A quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu", devices=1, default_root_dir=folder, **quiet)


# The settings of the networks that were saved.
SETTINGS = {
    "default": {},
    "learned": {"learn_scales": True},
    "frozen": {},
    "int4": {"weight_format": "int4", "add_inputs": "residual"},
    "tensor": {
        "weight_granularity": "tensor",
        "weight_range": "frozen",
        "conv_transpose": True,
        "head": (),
        "module_inputs": ["relu"],
        "rules": [
            {"match": "depthwise", "quantize": False},
            {"match": "block.conv", "weight_granularity": "channel", "weight_format": "int4"},
        ],
    },
}


def is_weight(path):
    """Whether a site quantizes a weight."""
    return path.endswith("weight_quantizer")


def quantized_codes(site, x):
    """What a site makes of a tensor, as int8 codes, and its scale as (channels,) or (1,)."""
    with torch.no_grad():
        y, scale = site(x).to(torch.float64), site.scale.detach().to(torch.float64)
        if site.axis is not None:
            shape = [1] * x.ndim
            shape[site.axis] = -1
            scale = scale.reshape(shape)
        codes = y / scale
    # A float32 product of a code and a scale, divided by the scale.
    assert bool((codes - codes.round()).abs().max() < 1e-4)
    return codes.round().to(torch.int8), site.scale.detach().reshape(-1).clone()
