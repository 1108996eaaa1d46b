"""Layers that quantize their input again in the backward pass, against the same layers that keep it."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.core.quantizer import WeightQuantizer, quantizers
from qat.nn import recompute

CONVS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d": (nn.Conv2d(3, 6, 3, padding=(1, 0), dilation=2, groups=3), (2, 3, 9, 11)),
    "3d": (nn.Conv3d(2, 4, 2, bias=False), (2, 2, 4, 5, 6)),
    "without batch": (nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "padding by name": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 8, 8)),
    "circular padding": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 8)),
    "linear": (nn.Linear(5, 4), (2, 3, 5)),
    "linear of a vector": (nn.Linear(5, 4, bias=False), (5,)),
}


def prepared(layer, x, learn_scales=False):
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    qat.prepare(model, qat.QuantConfig(head=(), learn_scales=learn_scales))
    qat.calibrate(model, [x], method="max", progress=False)
    return model


def gradients(model, x, grad_seed=1):
    x = x.clone().requires_grad_()
    y = model(x * 1)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(grad_seed)).to(y.dtype)
    found = torch.autograd.grad(y, [x, *model.parameters()], grad)
    return [y.detach(), *found]


@pytest.fixture
def always(monkeypatch):
    """Recompute on the CPU, too, and inputs of every size."""
    monkeypatch.setattr(recompute, "pays", lambda x: torch.is_grad_enabled() and not qat.core.kernels.is_transformed())
    monkeypatch.setattr(recompute, "_KEPT", 0)


def images(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kept", [0, 2**25])
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("layer", "shape"), CONVS.values(), ids=CONVS)
def test_outputs_and_gradients_are_the_same(layer, shape, autocast, learn_scales, kept, monkeypatch):
    monkeypatch.setattr(recompute, "_KEPT", kept)
    x = images(shape)
    model = prepared(layer, x, learn_scales)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(model, x)
        monkeypatch.setattr(recompute, "pays", lambda x: True)
        found = gradients(model, x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        if autocast:
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def saved_bytes(model, x):
    """Of what the backward pass keeps, each storage once; parameters and the input left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


def test_a_chain_keeps_no_quantized_activation(always, monkeypatch):
    chain = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)))
    x = images((4, 8, 16, 16))
    model = prepared(chain, x)
    recomputed = saved_bytes(model, x)
    monkeypatch.setattr(recompute, "pays", lambda x: False)
    kept = saved_bytes(model, x)
    # One activation less for every layer that a ReLU feeds; nothing else keeps the input of the first.
    assert kept - recomputed == 3 * x.nbytes


def test_small_inputs_are_kept(always, monkeypatch):
    x = images((4, 8, 16, 16))
    model = prepared(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), x)
    sizes = []
    for kept in (x.nbytes, x.nbytes - 1):
        monkeypatch.setattr(recompute, "_KEPT", kept)
        sizes.append(saved_bytes(model, x))
    # One beside the ReLU's; that of the first layer is kept instead of the image.
    assert sizes[0] - sizes[1] == x.nbytes


def test_checkpointing_saves_what_it_is_asked_to(always):
    chain = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)))
    x = images((4, 8, 16, 16))
    model = prepared(chain, x)
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    for a, b in zip(gradients(Checkpointed(), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_quantized_tensor_serves_two_layers(always):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    x = images((2, 3, 6, 6))
    model = prepared(Two(), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "pays", lambda x: False)
        expected = gradients(model, x)
    for a, b in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_recomputed(always):
    layer, shape = CONVS["2d"]
    x = images(shape)
    model = prepared(layer, x)
    with torch.no_grad():
        assert model(x).grad_fn is None
    assert model(x.requires_grad_()).grad_fn.name().startswith("_Layer")


def test_per_sample_gradients_equal_a_loop(always):
    layer, _ = CONVS["linear"]
    x = images((4, 5))
    model = prepared(layer, x)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(parameters, row):
        return torch.func.functional_call(model, (parameters, buffers), row[None]).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        alone = torch.func.grad(loss)(parameters, row)
        for name, value in alone.items():
            torch.testing.assert_close(found[name][i], value)


def test_a_tensor_with_several_readers_is_quantized_once(monkeypatch):
    """Though no layer keeps the result for its backward pass."""
    monkeypatch.setattr(recompute, "pays", lambda x: torch.is_grad_enabled())
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    qat.prepare(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qat.calibrate(model, [x], method="max", progress=False)
    calls = []
    original = qat.core.quantizer.fake_quantize_range
    monkeypatch.setattr(
        qat.core.quantizer, "fake_quantize_range", lambda t, amax, **settings: calls.append(1) or original(t, amax, **settings)
    )
    sites = [site for _, site in quantizers(model) if not isinstance(site, WeightQuantizer)]
    model.train()(x)
    assert len(calls) == len(sites)
    assert sum(site.readers for site in sites) > len(sites)
