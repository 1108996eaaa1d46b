"""Small models for the tests of ``prepare``, an input of theirs, and what to ask of model and report."""

import torch
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.config import QuantConfig
from qat.nn import Add

NO_HEAD = QuantConfig(head=())


def conv(channels: int = 4, out: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1)


class Net(nn.Module):
    """Stem, body, pooling and classifier."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = Block() if body is None else body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.pool(self.body(self.stem(x))).flatten(1))


class Block(nn.Module):
    """Two convolutions and the Add of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


def images(seed: int = 0) -> torch.Tensor:
    """One batch for :class:`Net`, ``(2, 3, 6, 6)``."""
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calibrated(model: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """``model``, prepared and calibrated on that batch."""
    qat.prepare(model, config)
    qat.calibrate(model, [images()], method="max", progress=False)
    return model


def snapshot(model: nn.Module) -> dict:
    """All that ``prepare`` may not change when it fails and ``restore`` must give back."""
    return {
        "modules": [(name, type(m), sorted(m.__dict__), m.training) for name, m in model.named_modules()],
        "children": [list(m._modules) for m in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "state": [(key, id(tensor)) for key, tensor in model.state_dict(keep_vars=True).items()],
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
    }


def whats(report, path: str) -> list[str]:
    """What the sites at ``path`` quantize."""
    return [site.what for site in report.sites if site.path == path]


def why(report, path: str) -> str:
    """Why there is no site at ``path``."""
    return "; ".join(item.why for item in report.left if item.path == path)


class Sum(nn.Module):
    """``left(x) + right(x)``, where ``None`` is the identity."""

    def __init__(self, left: nn.Module | None, right: nn.Module | None) -> None:
        super().__init__()
        self.left, self.right = left or nn.Identity(), right or nn.Identity()

    def forward(self, x):
        return self.left(x) + self.right(x)


class LayerScale(nn.Module):
    """A learned factor a channel, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x):
        return x * self.gamma


class Scaled(Block):
    """The factor in the addition itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x):
        return x + self.gamma * self.conv1(x)


class Upsampled(Block):
    """An addition of two tensors that come out of functions."""

    def forward(self, x):
        small = F.max_pool2d(self.conv1(x), 2)
        return F.interpolate(small, scale_factor=2.0) + F.avg_pool2d(self.conv2(x), 3, 1, 1)


class Attending(nn.Module):
    """Attention over the pixels, with its Add."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return (y + self.attn(y, y, y)[0]).transpose(1, 2).reshape(x.shape)


def two() -> nn.Module:
    """Two convolutions in a row."""
    return nn.Sequential(conv(), nn.ReLU(), conv())


class WithAdd(Block):
    """An addition that its author made a module."""

    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x):
        return self.add(self.conv1(x), x)


def decorate(model: nn.Module) -> nn.Module:
    """Give :class:`Net` hooks and an attribute, as a user may have."""
    model.stem.register_forward_hook(lambda *args: None)
    model.body.register_forward_pre_hook(lambda *args: None)
    model.note = "user attribute"
    return model


class Routed(nn.Module):
    """A router that sends what it is given another way once it quantizes; while calibrating, all layers run."""

    def __init__(self, where):
        super().__init__()
        self.router, self.left, self.right, self.top = (nn.Linear(4, 4) for _ in range(4))
        self.where, self.calibrating = where, True

    def forward(self, x):
        if self.calibrating:
            return self.top(self.left(x) + self.right(x) + self.router(x))
        exact = F.linear(x, self.router.weight, self.router.bias)
        quantized = not torch.allclose(self.router(x), exact, atol=1e-5)
        if self.where == "fewer rows":
            return self.top(self.left(x[quantized:]).mean(0, keepdim=True))
        if self.where == "more often":
            return self.top(self.left(self.left(x)) if quantized else self.left(x))
        if self.where == "less often":
            return self.top(self.left(x) if quantized else self.left(self.left(x)))
        return self.top(self.right(x) if quantized else self.left(x))


def routed(where):
    """Such a model, calibrated, and a batch on which the quantized one goes another way."""
    torch.manual_seed(0)
    model, batch = Routed(where).eval(), torch.randn(8, 4)
    qat.prepare(model, NO_HEAD, example_inputs=batch)
    qat.calibrate(model, [batch], method="max", progress=False)
    model.calibrating = False
    return model, batch
