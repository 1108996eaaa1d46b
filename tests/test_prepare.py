"""``prepare`` and ``restore``: what goes where on small nets counted by hand, and what is refused."""

import copy
import dataclasses
import pickle
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.ops import StochasticDepth

import qat
from qat.config import QuantConfig
from qat.errors import QATError
from qat.nn import Add, QuantAdd
from qat.quantizer import Quantizer, State, quantizers

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
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calibrated(model: nn.Module, config: QuantConfig | None = None) -> nn.Module:
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
    return [site.what for site in report.sites if site.path == path]


def why(report, path: str) -> str:
    return "; ".join(item.why for item in report.left if item.path == path)


# The report.


def test_report_counts_by_hand():
    """3 convs (input and weight each), one Add (a, b), one pooling; block input is read by conv1 and the Add."""
    report = qat.prepare(Net())
    assert len(report.sites) == 3 * 2 + 2 + 1
    assert report.quantizers == len(report.sites) - 1
    assert [report.count(kind) for kind in ("conv", "linear", "attention", "add", "pool")] == [3, 0, 0, 1, 1]
    assert report.head == ("fc",)
    assert [(item.path, item.what) for item in report.left] == [("fc", "Linear")]
    assert report.summary() == "9 sites, 8 quantizers: 3 conv, 1 add, 1 pool; 1 left in float"


def test_report_prints_every_site_and_everything_left():
    text = str(qat.prepare(Net()))
    for line in ("stem", "body.conv1", "body.conv2", "body.quant_add0", "pool", "per-channel", "per-tensor", "int8"):
        assert line in text
    for line in ("add a", "add b", "fusable into its layer", "classifier head", "Head (found by tracing): fc", "9 sites"):
        assert line in text


def test_report_escapes_markup_in_paths():
    model = nn.Sequential()
    model.add_module("[bold]", nn.Linear(2, 2))
    assert "[bold]" in str(qat.prepare(model, NO_HEAD))


def test_report_names_existing_quantizers():
    model = Net()
    report = qat.prepare(model)
    for site in report.sites:
        quantizer = model.get_submodule(site.quantizer)
        assert isinstance(quantizer, Quantizer)
        assert (quantizer.axis is None) == (site.granularity == "per-tensor")
    assert {site.quantizer for site in report.sites} == {name for name, _ in quantizers(model)}


def test_nothing_is_computed_differently_before_calibration():
    model, x = Net(), images()
    expected = model(x)
    qat.prepare(model)
    assert torch.equal(model(x), expected)
    assert all(site.state is State.OFF for _, site in quantizers(model))


@pytest.mark.parametrize("training", [False, True])
def test_new_modules_take_the_mode_of_the_model(training):
    model = Net().train(training)
    qat.prepare(model)
    assert {m.training for m in model.modules()} == {training}


# The head.

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


class Plain:
    """An output that is no container PyTorch knows."""

    def __init__(self, logits):
        self.logits = logits


class Headed(nn.Module):
    """A stem, two candidates for the head, and a function that makes the output."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(), conv()
        self.act = nn.Softmax(1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.run = forward

    def forward(self, x):
        return self.run(self, self.stem(x))


class Branching(Headed):
    """Its own forward depends on values: only a run can show the head."""

    def forward(self, x):
        y = self.stem(x)
        return self.run(self, y if y.sum() > 0 else -y)


OUTPUTS = {
    "plain": (lambda m, y: m.a(m.b(y)), {"a"}),
    "pooled": (lambda m, y: m.pool(m.a(m.b(y))).flatten(1), {"a"}),
    "activation": (lambda m, y: m.act(m.a(m.b(y))), {"a"}),
    "functional activation": (lambda m, y: F.log_softmax(m.a(m.b(y)), 1), {"a"}),
    "interpolated": (lambda m, y: F.interpolate(m.a(m.b(y)), scale_factor=2.0), {"a"}),
    "interpolated to input size": (lambda m, y: F.interpolate(m.a(m.b(y)), size=y.shape[-2:]), {"a"}),
    "two": (lambda m, y: (m.a(y), m.b(y)), {"a", "b"}),
    "sum": (lambda m, y: m.a(y) + m.b(y), {"a", "b"}),
    "concatenated": (lambda m, y: torch.cat([m.a(y), m.b(y)], 1), {"a", "b"}),
    "list": (lambda m, y: [m.a(y), m.b(y)], {"a", "b"}),
    "dict": (lambda m, y: {"out": m.a(y), "aux": m.b(y).relu()}, {"a", "b"}),
    "namedtuple": (lambda m, y: Pair(m.a(y), m.b(y)), {"a", "b"}),
    "dataclass": (lambda m, y: Output(m.a(y), m.b(y)), {"a", "b"}),
    "nested": (lambda m, y: {"x": [m.a(y), (m.b(y), 3)]}, {"a", "b"}),
    "features too": (lambda m, y: (m.a(m.b(y)), y), {"a", "stem"}),
}


@pytest.mark.parametrize(("forward", "head"), OUTPUTS.values(), ids=OUTPUTS)
def test_head_is_found_by_tracing(forward, head):
    report = qat.prepare(Headed(forward))
    assert set(report.head) == head
    assert report.head_source == "found by tracing"
    assert {item.path for item in report.left if item.why == "classifier head"} == head


@pytest.mark.parametrize(("forward", "head"), OUTPUTS.values(), ids=OUTPUTS)
def test_head_is_found_by_running(forward, head):
    report = qat.prepare(Branching(forward), example_inputs=images())
    assert set(report.head) == head
    assert report.head_source == "found by running example_inputs"


def test_head_is_found_in_an_output_of_unknown_class():
    report = qat.prepare(Headed(lambda m, y: Plain(m.a(m.b(y)))), example_inputs=images())
    assert report.head == ("a",)


class Auxiliary(Headed):
    def forward(self, x):
        y = self.stem(x)
        if self.training:
            return self.a(y), self.b(y)
        return self.a(y)


@pytest.mark.parametrize("training", [False, True])
def test_auxiliary_head_of_training_is_a_head(training):
    report = qat.prepare(Auxiliary(None).train(training))
    assert set(report.head) == {"a", "b"}


def test_head_inside_a_container_that_ends_with_other_layers():
    model = nn.Sequential(conv(3), nn.Sequential(nn.ReLU(), nn.Sequential(conv(), nn.ReLU()), nn.Flatten()), nn.Softmax(1))
    assert qat.prepare(model).head == ("1.1.0",)


@pytest.mark.parametrize(
    ("globs", "head"),
    [
        ((), ()),
        (("fc",), ("fc",)),
        (("f*",), ("fc",)),
        (("body",), ("body.conv1", "body.conv2")),
        (("*.conv2", "fc"), ("body.conv2", "fc")),
    ],
)
def test_configured_head(globs, head):
    report = qat.prepare(Net(), QuantConfig(head=globs))
    assert report.head == head
    assert report.head_source == "as configured"
    assert {item.path for item in report.left} == set(head)


class Keywords(Branching):
    def forward(self, x, *, double=None):
        return super().forward(x) if double is None else super().forward(double * 2)


@pytest.mark.parametrize("inputs", [images(), (images(),), {"x": images()}, {"x": images(), "double": images()}])
def test_example_inputs_in_every_form(inputs):
    report = qat.prepare(Keywords(OUTPUTS["plain"][0]), example_inputs=inputs)
    assert report.head == ("a",)


def test_untraceable_model_asks_for_the_head_and_is_unchanged():
    model = Branching(OUTPUTS["plain"][0])
    before = snapshot(model)
    with pytest.raises(
        QATError, match=r"head was not found: .*TraceError.*Pass example_inputs=, or name it: QuantConfig\(head="
    ):
        qat.prepare(model)
    assert snapshot(model) == before
    assert qat.prepare(model, QuantConfig(head=("a",))).head == ("a",)


def test_failing_example_inputs_leave_the_model_unchanged():
    model = Branching(OUTPUTS["plain"][0]).train()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="expected input"):
        qat.prepare(model, example_inputs=torch.zeros(1, 7, 4, 4))
    assert snapshot(model) == before


def test_observing_a_run_restores_mode_and_random_state():
    model = Branching(lambda m, y: F.dropout(m.a(m.b(y)), 0.5, True)).train()
    model.act.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    qat.prepare(model, example_inputs=images())
    assert torch.equal(torch.get_rng_state(), state)
    qat.restore(model)
    assert [m.training for m in model.modules()] == modes


class Random(Block):
    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return super().forward(x) + F.dropout(x, 0.5, True)


class MonteCarlo(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, True)


class EndsRandomly(Block):
    def __init__(self) -> None:
        super().__init__()
        self.noise = MonteCarlo()

    def forward(self, x):
        return self.noise(self.conv1(x)) + x


@pytest.mark.parametrize("body", [Random, EndsRandomly])
def test_random_state_is_what_it_was(body):
    model, state = Net(body()), torch.get_rng_state()
    qat.prepare(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_alone_is_its_own_head():
    model = nn.Linear(3, 2)
    with pytest.raises(QATError, match=r"Nothing to quantize(.|\n)*classifier head"):
        qat.prepare(model)
    assert type(model) is nn.Linear


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.MultiheadAttention(4, 2)], ids=lambda m: type(m).__name__
)
def test_a_layer_alone_can_be_prepared_without_a_head(layer):
    float_class = type(layer)
    report = qat.prepare(layer, NO_HEAD)
    assert {site.path for site in report.sites} == {""}
    qat.restore(layer)
    assert type(layer) is float_class


# One tensor, one quantizer.


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv())
        self.pool = nn.AvgPool2d(1)
        self.d = conv()

    def forward(self, x):
        return self.a(x) + x + self.b(x) + self.c(x) + self.pool(x) + self.d(F.relu(x))


def test_all_readers_of_a_tensor_share_one_quantizer():
    model = Net(Branches())
    qat.prepare(model)
    body = model.body
    readers = [body.a, body.b, body.c[0][0], body.pool]
    assert len({id(layer.input_quantizer) for layer in readers}) == 1
    assert body.quant_add0.b_quantizer is body.a.input_quantizer
    assert body.d.input_quantizer is not body.a.input_quantizer  # reads relu(x)
    assert body.c[1].input_quantizer is not body.a.input_quantizer


def test_readers_with_different_settings_do_not_share():
    model = Net(Branches())
    report = qat.prepare(model, QuantConfig(rules=[{"match": "body.b", "learn_scales": True}]))
    body = model.body
    assert body.b.input_quantizer is not body.a.input_quantizer
    assert body.b.input_quantizer.learned
    assert not body.a.input_quantizer.learned
    assert body.a.input_quantizer is body.c[0][0].input_quantizer
    assert len(report.sites) > report.quantizers


def test_shared_input_of_self_attention():
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + self.attn(x, x, x)[0])

    model = SelfAttention()
    report = qat.prepare(model)
    attn = model.attn
    assert attn.query_quantizer is attn.key_quantizer is attn.value_quantizer is model.quant_add0.a_quantizer
    assert whats(report, "attn") == ["query", "key", "value", "out", "in_weight", "out_weight"]
    qat.restore(model)
    assert list(model.attn._modules) == ["out_proj"]


# Residual Adds.


@pytest.mark.parametrize(("add_inputs", "expected"), [("both", ["add a", "add b"]), ("residual", ["add b"]), ("none", [])])
def test_add_inputs(add_inputs, expected):
    model = Net()
    report = qat.prepare(model, QuantConfig(add_inputs=add_inputs))
    assert whats(report, "body.quant_add0") == expected
    assert hasattr(model.body, "quant_add0") == bool(expected)
    assert report.count("conv") == 3


class Sum(nn.Module):
    """``left(x) + right(x)``, where ``None`` is the identity."""

    def __init__(self, left: nn.Module | None, right: nn.Module | None) -> None:
        super().__init__()
        self.left, self.right = left or nn.Identity(), right or nn.Identity()

    def forward(self, x):
        return self.left(x) + self.right(x)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x):
        return x + self.gamma * self.conv1(x)


class Dropped(Block):
    def forward(self, x):
        return F.dropout(self.conv1(x), 0.1, self.training) + x


class Activated(Block):
    def forward(self, x):
        return F.gelu(self.conv1(x)) + x


class Upsampled(Block):
    def forward(self, x):
        small = F.max_pool2d(self.conv1(x), 2)
        return F.interpolate(small, scale_factor=2.0) + F.avg_pool2d(self.conv2(x), 3, 1, 1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return (y + self.attn(y, y, y)[0]).transpose(1, 2).reshape(x.shape)


def two() -> nn.Module:
    return nn.Sequential(conv(), nn.ReLU(), conv())


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
    "activation": (lambda: Sum(nn.Sequential(conv(), nn.ReLU()), None), None),
    "functional activation": (Activated, None),
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


class WithAdd(Block):
    """An addition that its author made a module."""

    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x):
        return self.add(self.conv1(x), x)


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


# Average pooling.


class FunctionalPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.pooled(self.conv(x)).flatten(1))


class Adaptive(FunctionalPool):
    def pooled(self, x):
        return F.adaptive_avg_pool2d(x, (1, 1))


class Kernel6(FunctionalPool):
    def pooled(self, x):
        return nn.functional.avg_pool2d(x, kernel_size=6)


@pytest.mark.parametrize(("cls", "pooling"), [(Adaptive, nn.AdaptiveAvgPool2d(1)), (Kernel6, nn.AvgPool2d(6))])
def test_functional_pooling_gets_a_site(cls, pooling):
    model, x = cls(), images()
    report = qat.prepare(model)
    assert whats(report, "quant_pool0") == ["input"]
    model.quant_pool0.set_range(torch.tensor(1.27))
    features = F.conv2d(x, model.conv.weight, model.conv.bias)
    quantized = torch.clamp(torch.round(features / (torch.tensor(1.27) / 127)), -128, 127) * (torch.tensor(1.27) / 127)
    assert torch.equal(model(x), model.fc(pooling(quantized).flatten(1)))


@pytest.mark.parametrize("model", [Net(), Adaptive()])
def test_pool_inputs_off(model):
    state = list(model._modules)
    assert qat.prepare(model, QuantConfig(pool_inputs=False)).count("pool") == 0
    assert list(model._modules)[: len(state)] == state


class PadsAndPools(nn.AvgPool2d):
    """As timm's AvgPool2dSame: a pooling module with a functional pooling in its forward."""

    def forward(self, x):
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), self.kernel_size, self.stride)


def test_pooling_subclass_gets_one_site():
    model, x = Net(nn.Sequential(conv(), PadsAndPools(2, 2), conv())), images()
    before, expected = snapshot(model), model(x)
    report = qat.prepare(model)
    assert whats(report, "body.1") == ["input"]
    assert report.count("pool") == 2
    qat.calibrate(model, [x], method="max", progress=False)
    qat.restore(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


# Rules.


def test_rules_reach_layers_adds_and_pools():
    rules = [
        {"match": "body.conv1", "quantize": False},
        {"match": "body.quant_add0", "quantize": False},
        {"match": "pool", "quantize": False},
        {"match": "fc", "quantize": True},
        {"match": "stem", "weight_format": "int4", "weight_granularity": "tensor"},
    ]
    model = Net()
    report = qat.prepare(model, QuantConfig(rules=rules))
    assert {site.path for site in report.sites} == {"stem", "body.conv2", "fc"}
    for path in ("body.conv1", "body.quant_add0", "pool"):
        assert why(report, path) == "excluded by a rule"
    assert not hasattr(model.body, "quant_add0")
    weight = next(site for site in report.sites if site.path == "stem" and site.what == "weight")
    assert (weight.format, weight.granularity) == ("int4", "per-tensor")
    other = next(site for site in report.sites if site.path == "fc" and site.what == "weight")
    assert (other.format, other.granularity) == ("int8", "per-channel")


def test_rule_on_a_functional_pooling():
    report = qat.prepare(Adaptive(), QuantConfig(rules=[{"match": "quant_pool0", "quantize": False}]))
    assert why(report, "quant_pool0") == "excluded by a rule"
    assert report.count("pool") == 0


def test_an_add_without_a_quantized_layer_before_it_gets_no_site():
    rules = [
        {"match": "stem", "quantize": False},
        {"match": "body.conv*", "quantize": False},
        {"match": "fc", "quantize": True},
    ]
    assert qat.prepare(Net(), QuantConfig(rules=rules)).count("add") == 0


def test_transposed_conv_is_left_unless_asked_for():
    def make():
        return nn.Sequential(conv(3), nn.ConvTranspose2d(4, 4, 2), conv())

    report = qat.prepare(make())
    assert "QuantConfig(conv_transpose=True)" in why(report, "1")
    for config in (QuantConfig(conv_transpose=True), QuantConfig(rules=[{"match": "1", "quantize": True}])):
        report = qat.prepare(make(), config)
        assert [site.granularity for site in report.sites if site.path == "1"] == ["per-tensor", "per-tensor"]


# What is missed or does not run.


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.used, self.idle, self.train_only, self.fc = conv(3), conv(), conv(), conv(), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = F.conv2d(self.stem(x), self.used.weight, self.used.bias)
        if self.training:
            y = self.train_only(y)
        y = F.linear(y.mean([2, 3]), self.weight)
        return self.fc(y)


def test_what_is_missed_or_does_not_run_is_listed():
    report = qat.prepare(Functional())
    assert {site.path for site in report.sites} == {"stem"}
    assert "weight is used by a function call in the forward of the model: missed" in why(report, "used")
    assert why(report, "idle") == "no forward calls it"
    assert "runs in training only" in why(report, "train_only")
    assert {item.what for item in report.left if item.path == ""} == {"F.conv2d", "F.linear"}
    assert "use a module" in why(report, "")


@pytest.mark.parametrize("kind", ["linear", "pool"])
def test_forward_set_on_an_instance_is_left_and_listed(kind):
    model = nn.Sequential(conv(3), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(4 * 36, 4), nn.Linear(4, 2))
    position = {"pool": 1, "linear": 3}[kind]
    layer = model[position]
    layer.forward = layer.forward  # as libraries do that wrap it
    report = qat.prepare(model)
    assert "set on the instance" in why(report, str(position))
    assert type(layer) in (nn.AvgPool2d, nn.Linear)
    qat.calibrate(model, [images()], method="max", progress=False)  # every site sees data


# Shared weights and modules.


def test_attention_runs_with_other_tensors_in_place_of_its_parameters():
    for module in (nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=4, vdim=6)):
        x, value = torch.randn(3, 1, 4), torch.randn(3, 1, module.vdim)
        qat.prepare(module, NO_HEAD)
        qat.calibrate(module, lambda m, x=x, value=value: m(x, x, value), method="max", progress=False)
        plain = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        assert torch.equal(torch.func.functional_call(module, plain, (x, x, value))[0], module(x, x, value)[0])


def test_modules_that_share_a_weight_share_its_quantizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    report = qat.prepare(model, QuantConfig(rules=[{"match": "2", "quantize": True}]))
    assert model[0].weight_quantizer is model[2].weight_quantizer
    assert model[0].input_quantizer is not model[2].input_quantizer
    assert (len(report.sites), report.quantizers) == (4, 3)
    qat.calibrate(model, [torch.randn(3, 4)], method="max", progress=False)
    twin = copy.deepcopy(model)
    assert twin[0].weight_quantizer is twin[2].weight_quantizer


def test_conv_and_transposed_conv_that_share_a_weight_have_their_own():
    """One scale an output channel for the one, one scale a tensor for the other."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 3), nn.Conv2d(3, 4, 3), conv())
    model[0].weight = model[1].weight
    qat.prepare(model, QuantConfig(conv_transpose=True))
    assert [model[i].weight_quantizer.axis for i in (0, 1)] == [None, 0]


def test_module_that_is_called_twice_has_one_pair_of_sites():
    class Twice(Block):
        def forward(self, x):
            return self.conv2(self.conv1(self.conv1(x)))

    report = qat.prepare(Net(Twice()))
    assert whats(report, "body.conv1") == ["input", "weight"]


def test_module_under_two_names_is_reported_once():
    model = nn.Sequential(conv(3), conv(), nn.ReLU(), conv())
    model.add_module("again", model[1])
    report = qat.prepare(model)
    assert report.head == ("1",)
    assert [site.path for site in report.sites] == ["0", "0", "3", "3"]


# Restore.


def decorate(model: nn.Module) -> nn.Module:
    model.stem.register_forward_hook(lambda *args: None)
    model.body.register_forward_pre_hook(lambda *args: None)
    model.note = "user attribute"
    return model


BODIES = [Block, Attending, Scaled, WithAdd, lambda: Sum(two(), conv()), lambda: nn.Sequential(Upsampled(), PadsAndPools(1))]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(add_inputs="residual", learn_scales=True)])
def test_restore_undoes_prepare(body, config):
    model, x = decorate(Net(body())).eval(), images()
    before, expected = snapshot(model), model(x)
    calibrated(model, config)
    assert not torch.equal(model.eval()(x), expected)
    assert qat.restore(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_restore_after_training_keeps_the_trained_weights():
    model = calibrated(Net())
    model(images()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    qat.restore(model)
    assert {name for name, _ in model.named_parameters()} == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_can_be_restored(duplicate):
    model, x = Net(), images()
    expected, state = model(x), list(model.state_dict())
    twin = duplicate(calibrated(model))
    qat.restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in Net().modules()]
    assert list(twin.state_dict()) == state
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


def test_prepare_after_restore_gives_the_same_sites():
    model = Net()
    first = qat.prepare(model)
    qat.restore(model)
    assert qat.prepare(model) == first


def test_restoring_a_float_model_is_an_error():
    with pytest.raises(QATError, match="Nothing to restore"):
        qat.restore(Net())


def test_a_prepared_part_is_restored_with_the_whole():
    part = Net()
    qat.prepare(part)
    whole = nn.Sequential(part, nn.ReLU())
    qat.restore(whole)
    assert [type(m) for m in part.modules()] == [type(m) for m in Net().modules()]
    assert "_qat_report" not in part.__dict__


# Checkpoints and optimizers.


def test_state_dict_round_trip_between_prepared_models():
    source, target, x = calibrated(Net()), Net(), images()
    qat.prepare(target)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_uncalibrated_checkpoint_switches_a_calibrated_model_off():
    source, target, x = Net(), calibrated(Net()), images()
    expected = source(x)
    qat.prepare(source)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(x), expected)
    assert all(site.state is State.OFF for _, site in quantizers(target))


def test_checkpoint_keys_keep_the_float_keys():
    float_keys = set(Net().state_dict())
    keys = set(calibrated(Net()).state_dict())
    assert float_keys < keys
    assert all(key.endswith(".amax") for key in keys - float_keys)


def test_float_checkpoint_loads_but_for_the_ranges():
    model = Net()
    qat.prepare(model)
    result = model.load_state_dict(Net().state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(key.endswith(".amax") for key in result.missing_keys)


def test_optimizer_built_before_prepare_trains_the_model():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrated(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(images()).square().sum().backward()
    optimizer.step()
    assert list(before) == [name for name, _ in Net().named_parameters()]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# Bad input.


def test_second_prepare_changes_nothing_and_says_so():
    model = Net()
    first = qat.prepare(model)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="prepared before: nothing was changed"):
        second = qat.prepare(model)
    assert snapshot(model) == before
    assert second.sites == first.sites
    assert "nothing was changed" in str(second)
    with pytest.warns(UserWarning, match="nothing was changed"):
        qat.prepare(model, QuantConfig())


def test_other_settings_on_a_prepared_model_are_refused():
    model = Net()
    qat.prepare(model)
    before = snapshot(model)
    with pytest.raises(QATError, match="prepared with other settings"):
        qat.prepare(model, QuantConfig(add_inputs="none"))
    assert snapshot(model) == before


def test_model_with_a_prepared_part_is_refused():
    part = Net()
    qat.prepare(part)
    with pytest.raises(QATError, match="part of this model is prepared already"):
        qat.prepare(nn.Sequential(part, nn.Linear(5, 2)))


def weight_norm_new():
    return nn.utils.parametrizations.weight_norm(conv())


def weight_norm_old():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv())


def pruned():
    layer = conv()
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def attention_with_normed_projection():
    module = Attending()
    nn.utils.parametrizations.weight_norm(module.attn.out_proj)
    return module


LAYERS = {
    "weight norm": (weight_norm_new, r"body: weight is parametrized; call .*remove_parametrizations"),
    "old weight norm": (weight_norm_old, "body: its weight is recomputed before each forward .*remove_weight_norm"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(conv()), "body: weight is parametrized"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(conv()), "body: its weight is recomputed"),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(conv()), "body: weight is parametrized"),
    "pruned": (pruned, "body: its weight is recomputed .*prune.remove"),
    "attention": (attention_with_normed_projection, "body.attn: its weight is recomputed"),
}


@pytest.mark.parametrize(("make", "message"), LAYERS.values(), ids=LAYERS)
def test_layer_with_a_computed_weight_is_refused(make, message):
    model = Net(make())
    before = snapshot(model)
    with pytest.raises(QATError, match=message):
        qat.prepare(model)
    assert snapshot(model) == before
    glob = message.partition(":")[0]
    report = qat.prepare(model, QuantConfig(rules=[{"match": glob, "quantize": False}]))
    assert why(report, glob) == "excluded by a rule"


def test_head_with_a_computed_weight_is_left_alone():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.fc)
    assert qat.prepare(model).head == ("fc",)


def compiled():
    return torch.compile(Net(), backend="eager")


def lazy():
    model = Net()
    model.fc = nn.LazyLinear(3)
    return model


def on_meta():
    with torch.device("meta"):
        return Net()


def partly_on_meta():
    return Net(conv().to("meta"))


WHOLE = {
    "not a module": (lambda: Net().forward, "model is a method, not a torch.nn.Module"),
    "nothing": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "Nothing to quantize: looked for Conv1d, Conv2d"),
    "only a head": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), r"Nothing to quantize(.|\n)*1: classifier head"),
    "data parallel": (lambda: nn.DataParallel(Net()), "the model is wrapped by DataParallel: prepare the model first"),
    "inner data parallel": (lambda: Net(nn.DataParallel(Block())), "body is wrapped by DataParallel"),
    "compiled": (compiled, r"the model is compiled: prepare the original \(model._orig_mod\)"),
    "inner compiled": (lambda: Net(torch.compile(Block(), backend="eager")), "body is compiled"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(conv(3), conv())), "the model is a TorchScript module"),
    "inner traced": (lambda: Net(torch.jit.trace(conv(), torch.zeros(1, 4, 2, 2))), "body is a TorchScript module"),
    "lazy": (lazy, "fc is a lazy LazyLinear without shapes yet: run one forward pass first"),
    "meta": (on_meta, "stem.weight is on the meta device and has no values: load the weights first"),
    "partly meta": (partly_on_meta, "body.weight is on the meta device"),
}


def classes(model: nn.Module) -> list:
    return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(("make", "message"), WHOLE.values(), ids=WHOLE)
def test_model_that_cannot_be_prepared_is_refused(make, message):
    model = make()
    is_module = isinstance(model, nn.Module)
    before = classes(model) if is_module else None
    with pytest.raises(QATError, match=message):
        qat.prepare(model)
    assert not is_module or classes(model) == before


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrappers_are_refused(one_process):
    model = nn.parallel.DistributedDataParallel(Net())
    with pytest.raises(QATError, match="the model is wrapped by DistributedDataParallel: prepare the model first, then wrap"):
        qat.prepare(model)
    assert type(model.module.stem) is nn.Conv2d


def test_sharded_model_is_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model.body, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(QATError, match="body is wrapped by FSDPBlock: prepare the model first, then wrap it"):
        qat.prepare(model)
    assert type(model.stem) is nn.Conv2d


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(head=("classifier",)), "head: 'classifier' matches no convolution, linear or attention layer"),
        (QuantConfig(head=("fc", "aux")), "head: 'aux' matches no"),
        (QuantConfig(head=("pool",)), "head: 'pool' matches no"),
        (QuantConfig(rules=[{"match": "layer9", "quantize": False}]), "rules: 'layer9' matches no layer, Add or pooling"),
        (QuantConfig(rules=[{"match": "stem"}, {"match": "*.conv9"}]), r"rules: '\*.conv9' matches no layer"),
        (QuantConfig(rules=[{"match": "*", "quantize": False}]), r"Nothing to quantize(.|\n)*stem: excluded by a rule"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    model = decorate(Net()).train()
    before = snapshot(model)
    with pytest.raises(QATError, match=message):
        qat.prepare(model, config)
    assert snapshot(model) == before
    assert qat.prepare(model).count("conv") == 3
