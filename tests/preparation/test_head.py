"""Which layer prepare takes for the classifier head, and how it finds it."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from prepare_nets import NO_HEAD, Block, Net, conv, images, snapshot
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.config import QuantConfig
from qat.errors import QATError

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
