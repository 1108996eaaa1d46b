"""A model that was looked at is what it was: modes, tensors, hooks, random streams."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import qat
from qat.support.modes import assigned, hooked, looking_at


class Counting(nn.Module):
    """Counts its calls in a buffer, keeps its input as an attribute, and merges something when told to evaluate."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last = torch.zeros(1)
        self.merged = 0

    def train(self, mode=True):
        self.merged += not mode
        return super().train(mode)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.last = x
        # Depends on data: only a run shows what there is.
        if x.max() > 5:
            x = x / 2
        return self.second(self.first(x).relu())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counting()


def state(model):
    return model.calls.item(), model.last, model.merged, [module.training for module in model.modules()]


def test_looking_at_a_model_leaves_it_as_it_was(model):
    model.second.eval()
    before = state(model)
    with looking_at(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 4)).requires_grad
        assert model.calls == 1
    after = state(model)
    assert after[1] is before[1]
    assert after == before


def test_tensors_may_be_changed_on_request(model):
    with looking_at(model, keep_tensors=False):
        model(torch.ones(1, 4))
    assert model.calls == 1


@pytest.mark.parametrize("keep", [True, False])
def test_random_streams_are_put_back_on_request(model, keep):
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seed():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

    seed()
    first = draw()
    seed()
    with looking_at(model, keep_random=keep):
        assert draw() == first
    assert all((a == b) == keep for a, b in zip(draw(), first, strict=True))


def test_a_compiled_model_is_not_compiled_for_a_look(model):
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    compiled = torch.compile(model, backend=refuse)
    with looking_at(model):
        compiled(torch.ones(1, 4))


def test_attributes_are_put_back_after_an_error(model):
    def fail():
        with assigned([model.first, model.second], "training", False):
            assert not model.first.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.first.training
    assert model.second.training


def test_no_hook_stays_when_registering_fails(model):
    def register():
        yield model.register_forward_hook(lambda *_: None)
        raise KeyError

    with pytest.raises(KeyError), hooked(register()):
        pass
    assert not model._forward_hooks


def prepare(model, x):
    qat.prepare(model, example_inputs=x)


def calibrate(model, x):
    qat.prepare(model, example_inputs=x)
    qat.calibrate(model, [x], progress=False)


@pytest.mark.parametrize("look", [prepare, calibrate])
def test_a_forward_of_ours_leaves_nothing_behind(model, look):
    before = state(model)
    look(model, torch.ones(2, 4))
    after = [*state(model)[:3], [model.training, model.first.training, model.second.training]]
    assert after[1] is before[1]
    assert after == [*before[:3], [True] * 3]


def test_parity_leaves_the_model_as_it_was(model, tmp_path):
    x = torch.rand(2, 4)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    holder = Holder(plain)
    qat.prepare(holder)
    qat.calibrate(holder, [x], progress=False)
    path = qat.export_onnx(holder, tmp_path / "model.onnx", x)
    told = holder.told
    qat.parity(holder, path, x)
    assert holder.told == told


class Holder(nn.Module):
    """Notes how often it was told to evaluate: a module may do then what cannot be undone, such as merging weights."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.told = inner, 0

    def train(self, mode=True):
        self.told += 1
        return super().train(mode)

    def forward(self, x):
        return self.inner(x)
