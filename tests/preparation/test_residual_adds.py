"""Which additions get sites, which of their inputs is the fusable one, and where the Add module goes."""

import pytest
import torch
from prepare_nets import Attending, Block, LayerScale, Net, Scaled, Sum, Upsampled, WithAdd, conv, images, two, whats, why
from torch import nn
from torch.nn import functional as F
from torchvision.ops import Permute, StochasticDepth

import qat
from qat.core.config import QuantConfig
from qat.nn import Add, QuantAdd

# Residual Adds.


@pytest.mark.parametrize(("add_inputs", "expected"), [("both", ["add a", "add b"]), ("residual", ["add b"]), ("none", [])])
def test_add_inputs(add_inputs, expected):
    model = Net()
    report = qat.prepare(model, QuantConfig(add_inputs=add_inputs))
    assert whats(report, "body.quant_add0") == expected
    assert hasattr(model.body, "quant_add0") == bool(expected)
    assert report.count("conv") == 3


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


class Dropped(Block):
    def forward(self, x):
        return F.dropout(self.conv1(x), 0.1, self.training) + x


class Activated(Block):
    def forward(self, x):
        return F.gelu(self.conv1(x)) + x


def channels_last_linear(*after):
    return nn.Sequential(Permute([0, 2, 3, 1]), nn.Linear(4, 4), *after, Permute([0, 3, 1, 2]))


class Permuting(Block):
    def forward(self, x):
        return self.conv1(x).permute(0, 2, 3, 1).contiguous().transpose(1, 3).transpose(-1, -2) + x


class ActivatedInPlace(Block):
    def forward(self, x):
        return self.conv1(x).relu_() + x


class ActivatedInPlaceByFunction(Block):
    def forward(self, x):
        return F.relu(self.conv1(x), inplace=True) + x


class Reshaping(Block):
    def forward(self, x):
        return (self.conv1(x).flatten(2) + x.flatten(2)).unflatten(2, x.shape[2:])


FUSABLE = {
    "identity": (lambda: Sum(conv(), None), "a"),
    "identity first": (lambda: Sum(None, conv()), "b"),
    "downsample": (lambda: Sum(two(), conv()), "a"),
    "downsample first": (lambda: Sum(conv(), two()), "b"),
    "batch norm": (lambda: Sum(nn.Sequential(conv(), nn.BatchNorm2d(4)), None), "a"),
    "nested": (lambda: Sum(nn.Sequential(nn.Sequential(conv()), nn.Sequential(nn.Identity())), None), "a"),
    "dropout": (lambda: Sum(None, nn.Sequential(conv(), nn.Dropout(0.5))), "b"),
    "stochastic depth": (lambda: Sum(nn.Sequential(conv(), StochasticDepth(0.5, "row")), None), "a"),
    "drop path": (lambda: Sum(nn.Sequential(conv(), nn.BatchNorm2d(4), DropPath()), None), "a"),
    "layer scale": (lambda: Sum(nn.Sequential(conv(), LayerScale(), DropPath()), None), "a"),
    "layer scale in the forward": (Scaled, "b"),
    "functional dropout": (Dropped, "a"),
    "attention": (Attending, "b"),
    "permutation": (lambda: Sum(channels_last_linear(), None), "a"),
    "permutations in the forward": (Permuting, "a"),
    "activation before a permutation": (lambda: Sum(channels_last_linear(nn.ReLU()), None), None),
    "another shape": (Reshaping, None),
    "activation": (lambda: Sum(nn.Sequential(conv(), nn.ReLU()), None), None),
    "functional activation": (Activated, None),
    "activation in place": (lambda: Sum(nn.Sequential(conv(), nn.ReLU(inplace=True)), None), None),
    "method in place": (ActivatedInPlace, None),
    "functional activation in place": (ActivatedInPlaceByFunction, None),
    "wide clamp": (lambda: Sum(nn.Sequential(conv(), nn.Hardtanh(-100.0, 100.0)), None), None),
    "group norm": (lambda: Sum(nn.Sequential(conv(), nn.GroupNorm(2, 4)), None), None),
    "pooling and interpolation": (Upsampled, None),
    "activation on the longer": (lambda: Sum(nn.Sequential(two(), nn.ReLU()), conv()), "b"),
}


@pytest.mark.parametrize(("make", "expected"), FUSABLE.values(), ids=FUSABLE)
def test_fusable_input(make, expected):
    model = Net(make())
    report = qat.prepare(model)
    adds = [m for m in model.modules() if isinstance(m, QuantAdd)]
    assert [("a", "b", None)[-1 if add.fusable is None else add.fusable] for add in adds] == [expected]
    noted = [site.what for site in report.sites if site.note == "fusable into its layer"]
    assert noted == ([f"add {expected}"] if expected else [])


@pytest.mark.parametrize("add_inputs", ["residual", "both"])
def test_without_a_fusable_input_both_are_quantized(add_inputs):
    report = qat.prepare(Net(Activated()), QuantConfig(add_inputs=add_inputs))
    assert whats(report, "body.quant_add0") == ["add a", "add b"]


class Looks(nn.Module):
    """A leaf with a side effect: remembers what passed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x


def test_looking_through_a_leaf_has_no_side_effects():
    model = Net(Sum(nn.Sequential(conv(), Looks()), None))
    qat.prepare(model)
    assert model.body.left[1].seen == []
    assert model.body.quant_add0.fusable == 0


def test_add_module_is_one_site_pair():
    model = Net(WithAdd())
    report = qat.prepare(model)
    assert [name for name, m in model.named_modules() if isinstance(m, QuantAdd)] == ["body.add"]
    assert whats(report, "body.add") == ["add a", "add b"]
    assert model.body.add.fusable == 0
    assert model.body.add.b_quantizer is model.body.conv1.input_quantizer


class IdleAdd(WithAdd):
    def forward(self, x):
        return self.conv1(x)


class TrainsAdd(WithAdd):
    def forward(self, x):
        return self.add(self.conv1(x), x) if self.training else self.conv1(x)


@pytest.mark.parametrize(("body", "reason"), [(IdleAdd, "no forward calls it"), (TrainsAdd, "runs in training only")])
def test_add_module_that_does_not_run_is_left(body, reason):
    model = Net(body())
    report = qat.prepare(model)
    assert type(model.body.add) is Add
    assert reason in why(report, "body.add")
    qat.calibrate(model, [images()], method="max", progress=False)  # every site sees data


# Forwards that go through their children: a further child would be called like the others.


class ResidualSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


class ResidualLoop(nn.Sequential):
    def forward(self, x):
        y = x
        for layer in self:
            y = layer(y)
        return F.avg_pool2d(y, 1) + x


class ResidualChildren(Block):
    def forward(self, x):
        y = x
        for layer in self.children():
            y = layer(y)
        return y + x


class ResidualDict(nn.ModuleDict):
    def forward(self, x):
        y = x
        for layer in self.values():
            y = layer(y) + x
        return y


ITERATING = [
    lambda: ResidualSequential(conv(), nn.ReLU(), conv()),
    lambda: ResidualLoop(conv(), nn.ReLU(), conv()),
    ResidualChildren,
    lambda: ResidualDict({"a": conv(), "b": conv()}),
]


@pytest.mark.parametrize("make", ITERATING)
def test_forward_that_goes_through_its_children_gets_no_further_child(make):
    model, x = Net(make()), images()
    expected = model(x)
    children = list(model.body._modules)
    report = qat.prepare(model)
    assert torch.equal(model(x), expected)
    assert list(model.body._modules) == children
    assert "goes through its children" in why(report, "body.quant_add0")
    assert report.count("conv") == 3


class NamedSequential(nn.Sequential):
    """A Sequential that calls its children by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("first", conv())

    def forward(self, x):
        return self.first(x) + x


def test_container_that_names_its_children_is_rewritten():
    model, x = Net(NamedSequential()), images()
    expected = model(x)
    report = qat.prepare(model)
    assert whats(report, "body.quant_add0") == ["add a", "add b"]
    assert torch.equal(model(x), expected)
