"""``prepare`` on real architectures, against counts that do not come from ``prepare``.

The continuous run takes the models that have a reason in ``zoo.Expected.ci``; all of them: ``pytest -m slow``.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Expected

import qat
from qat.support.inputs import call, tensors

ATEN = torch.ops.aten
NAMES = [pytest.param(name, marks=[] if expected.ci else [pytest.mark.slow]) for name, expected in ZOO.items()]


class CountAdds(TorchDispatchMode):
    """Counts additions of two feature maps of the same shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.constants = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (ATEN.add.Tensor, ATEN.add_.Tensor) and isinstance(args[1], torch.Tensor):
            a, b = args[:2]
            own = self.constants & {id(a), id(b)}
            self.count += a.shape == b.shape and a.dim() >= 3 and a.is_floating_point() and not own
        return func(*args, **(kwargs or {}))


class Case:
    """A model before and after ``prepare``, with what was counted while the float model ran."""

    def __init__(self, expected: Expected) -> None:
        torch.manual_seed(0)
        self.expected = expected
        self.model = expected.make().eval()
        for path in expected.head:  # some architectures start with a head of zeros: nothing would reach the output
            nn.init.normal_(self.model.get_submodule(path).weight, std=0.05)
        self.inputs = expected.inputs()
        self.state = list(self.model.state_dict())
        self.classes = [type(m) for m in self.model.modules()]
        self.parameters = [id(p) for p in self.model.parameters()]
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
        self.called: set[str] = set()
        self.attention = 0
        handles = [m.register_forward_hook(lambda m, a, o, name=n: self.called.add(name)) for n, m in self.layers.items()]
        with torch.no_grad(), CountAdds(self.model) as counter:
            self.float_out = tensors(call(self.model, self.inputs))
        for handle in handles:
            handle.remove()
        self.adds = counter.count
        self.report = qat.prepare(self.model, example_inputs=self.inputs if expected.detector else None)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(ZOO[request.param])


def test_sites_are_as_published(case):
    expected, report = case.expected, case.report
    counts = {kind: report.count(kind) for kind in ("conv", "linear", "attention", "add", "gate")}
    assert counts == {
        "conv": expected.conv,
        "linear": expected.linear,
        "attention": expected.attention,
        "add": expected.add,
        "gate": expected.gate,
    }


def test_head_is_as_published(case):
    assert set(case.report.head) == set(case.expected.head)


def test_sites_equal_the_layers_that_ran(case):
    expected = case.expected
    sites = {site.path for site in case.report.sites if site.kind in ("conv", "linear")}
    assert sites == case.called - set(expected.head)
    inside_attention = sum(path.endswith("self_attention.out_proj") for path in case.layers)
    assert len(case.layers) - len(case.called) - inside_attention == expected.idle


def test_add_sites_equal_the_additions_that_ran(case):
    assert case.report.count("add") == case.adds - case.expected.extra_adds


def test_every_layer_is_a_site_or_has_a_reason(case):
    placed = {site.path for site in case.report.sites}
    attention = tuple(f"{site.path}." for site in case.report.sites if site.kind == "attention")
    missing = {p for p in case.layers if not p.startswith(attention or "\0")} - placed - {i.path for i in case.report.left}
    assert missing == set()


def test_float_until_calibrated(case):
    with torch.no_grad():
        out = tensors(call(case.model, case.inputs))
    assert all(torch.equal(a, b) for a, b in zip(out, case.float_out, strict=True))


def test_parameters_and_keys_survive(case):
    float_modules = len(case.classes)
    assert [id(p) for p in case.model.parameters()] == case.parameters
    assert set(case.state) <= set(case.model.state_dict())
    assert float_modules == len(case.classes)
    assert all(isinstance(case.model.get_submodule(path), nn.Linear | nn.modules.conv._ConvNd) for path in case.layers)


def test_calibrates_quantizes_and_restores(case):
    model = copy.deepcopy(case.model)
    qat.calibrate(model, lambda m: call(m, case.inputs), method="max", progress=False)
    with torch.no_grad():
        out = tensors(call(model, case.inputs))
    if not case.expected.detector:  # a detector's number of boxes changes with its scores
        assert all(o.isfinite().all() for o in out)
        assert any(not torch.equal(a, b) for a, b in zip(out, case.float_out, strict=True))
    qat.restore(model)
    assert [type(m) for m in model.modules()] == case.classes
    assert list(model.state_dict()) == case.state
    with torch.no_grad():
        restored = tensors(call(model, case.inputs))
    assert all(torch.equal(a, b) for a, b in zip(restored, case.float_out, strict=True))
