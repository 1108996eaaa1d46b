"""A training step of a prepared model: it waits for nothing, and compiles in every mode."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import qat
from qat.core.quantizer import quantizers

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.cuda.set_sync_debug_mode("default") if torch.cuda.is_available() else None


def images(device, seed=0):
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x.to(device, memory_format=torch.channels_last)


def network(device, **settings):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).to(device, memory_format=torch.channels_last)
    qat.prepare(model, qat.QuantConfig(**settings))
    qat.calibrate(model, [images(device)], method="max", progress=False)
    return model.train()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 8, 3, stride=4), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        return self.head(self.linear(self.relu(x + self.conv2(x)).mean((2, 3))))


def small_network(device, **settings):
    """All kinds of sites and no more: what tries many versions of each kernel takes minutes for a ResNet."""
    torch.manual_seed(0)
    model = Residual().to(device, memory_format=torch.channels_last)
    qat.prepare(model, qat.QuantConfig(**settings))
    qat.calibrate(model, [images(device)], method="max", progress=False)
    return model.train()


def loss_of(model, x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return F.cross_entropy(model(x), torch.arange(8, device=x.device) % 5)


class NothingIsRead(TorchDispatchMode):
    """Fails where a value would be copied to the host to decide about something."""

    READERS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not name.startswith(self.READERS), f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_is_read():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        bool(torch.ones(2).sum() > 1)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_not_wait_for_the_device(device, learn_scales):
    model, batches = network(device, learn_scales=learn_scales), [images(device, seed) for seed in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def step(x):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    step(batches[0])
    before = [p.detach().clone() for p in model.parameters()]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for x in batches:
            step(x)
        torch.cuda.set_sync_debug_mode("default")
    else:
        with NothingIsRead():
            for x in batches:
                step(x)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("mode", "make"), [("default", network), ("reduce-overhead", network), ("max-autotune", small_network)]
)
@pytest.mark.parametrize("learn_scales", [False, True])
def test_compiles_in_every_mode(mode, make, learn_scales):
    model, x = make("cuda", learn_scales=learn_scales), images("cuda")
    parameters, learned = list(model.parameters()), {site.amax for _, site in quantizers(model)}
    assert learned.isdisjoint(parameters) != learn_scales
    model.eval()  # batch norm by stored statistics: the same function at each call
    compiled = torch.compile(model, options=qat.compile_options(mode), fullgraph=True)
    for factor in (1.0, 0.5):
        if factor != 1:
            for _, site in quantizers(model):
                site.set_range(site.amax.detach() * factor)
        found = []
        for run in (model, compiled):
            y = run(x)
            grads = [g.clone() for g in torch.autograd.grad(y.logsumexp(1).sum(), parameters)]
            # The gradient of a range is a sum of terms of both signs, and may end anywhere near zero: all of them together.
            ranges = [g.reshape(-1) for g, p in zip(grads, parameters, strict=True) if p in learned]
            weights = [g for g, p in zip(grads, parameters, strict=True) if p not in learned]
            found.append([y.detach().clone(), *weights, *([torch.cat(ranges)] if ranges else [])])
        for eager, fused in zip(*found, strict=True):
            # Convolutions sum in another order, which moves codes: as a whole, not element by element.
            assert (fused - eager).float().norm() <= 0.05 * eager.float().norm() + 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_calibrating_again_compiles_nothing(train):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(x)
    qat.prepare(model)
    qat.calibrate(model, [x], progress=False)
    model.train(train)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = compiled(x)
    qat.calibrate(compiled, [2 * x, 3 * x], method="entropy", progress=False)
    after = compiled(x)
    assert counter.frame_count == 1
    assert not torch.equal(before, after), "the new ranges count"
