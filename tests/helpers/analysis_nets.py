"""Calibrated networks whose forward methods do what analyses could stumble over, and a check that these change nothing."""

import torch
from prepare_nets import NO_HEAD, Net, conv, images
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.quantizer import quantizers


class Shared(nn.Module):
    """Two convolutions read one tensor, so that they share its quantizer."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), conv(), conv()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.fc(F.relu(self.left(x) + self.right(x)).mean((2, 3)))


class Twice(nn.Module):
    """One module called twice, in-place operators, a constant made in forward, two outputs of different dtypes."""

    def __init__(self):
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 4, 1), conv()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)), inplace=True)
        early = x.mul_(2).mean((2, 3))
        x = self.again(x)
        x = self.again(F.silu(x, inplace=True)) * torch.tensor([1.5])
        return {"early": early, "late": x, "top": x.flatten(1).argmax(1)}


class WritesIntoEarlier(nn.Module):
    """What comes from the second layer is added in place to the output of the first one, which is returned."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), conv()

    def forward(self, x):
        kept = F.relu(self.first(x))
        view = kept[:, :2]
        later = self.second(kept)
        kept.add_(later.sigmoid_())
        return kept, view.sum((1, 2, 3))


class PreActivated(nn.Module):
    """A site reads a tensor that is changed in place afterwards."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 4, 1), conv(), conv()

    def forward(self, x):
        x = self.stem(x)
        y = self.inner(x)
        x.neg_()
        return self.last(x) + y


class Encoder(nn.Module):
    """A transformer layer: attention, layer norm, two linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.flatten(2).transpose(1, 2))).mean(1))


MODELS = {
    "residual": (Net, None),
    "shared quantizer": (Shared, None),
    "two outputs": (Twice, NO_HEAD),
    "writes into an earlier tensor": (WritesIntoEarlier, NO_HEAD),
    "changed after it was read": (PreActivated, NO_HEAD),
    "attention": (Encoder, None),
}


def made(name="residual"):
    """One of ``MODELS``, prepared and calibrated; the same at every call."""
    make, config = MODELS[name]
    torch.manual_seed(0)
    model = make()
    qat.prepare(model, config)
    qat.calibrate(model, [images(0), images(1)], progress=False)
    return model


def states(model):
    """All that an analysis may not change."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(site.state, site.observer, "export_scale" in vars(site)) for _, site in quantizers(model)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, m.__class__) for m in model.modules()]
    return tensors, flags, hooks


def unchanged(model, before):
    """Whether ``states`` are those of ``before``."""
    tensors, *rest = states(model)
    return rest == list(before[1:]) and all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
