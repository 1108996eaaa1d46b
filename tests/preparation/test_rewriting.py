"""Rewriting the Adds of a forward: whatever else the forward does stays as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qat
from qat.nn import QuantAdd


class Block(nn.Module):
    """A residual block with an attribute that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.alpha = 1.0

    def forward(self, x):
        return F.relu(self.conv(x) * self.alpha + x)


class SideEffects(Block):
    """Counts its calls, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        out = self.conv(x)
        out += x
        return out


class Dropping(Block):
    def forward(self, x):
        return x + F.dropout(self.conv(x), 0.5, self.training)


class CallsSuper(Block):
    def forward(self, x):
        return super().forward(x) * 2


class CallsMethod(Block):
    def body(self, x):
        return torch.add(self.conv(x), x)

    def forward(self, x):
        return self.body(x)


class Checkpointed(Block):
    def body(self, x):
        return self.conv(x) + x

    def forward(self, x):
        if self.training:
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)


class PrivateName(Block):
    def __init__(self) -> None:
        super().__init__()
        self.__scale = 3.0

    def forward(self, x):
        return self.conv(x) * self.__scale + x


class AddsInPlaceMethod(Block):
    def forward(self, x):
        y = self.conv(x)
        y.add_(x)
        return y


class TwoOnOneLine(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return (self.conv(x) + x) + self.other(x)


def make_closure_block(factor):
    class Closure(Block):
        def forward(self, x):
            return factor * self.conv(x) + x

    return Closure()


def network(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def adds(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantAdd)]


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    qat.prepare(model)
    qat.calibrate(model, [x], method="max", progress=False)
    return model


BLOCKS = [
    Block,
    SideEffects,
    Dropping,
    CallsSuper,
    CallsMethod,
    Checkpointed,
    PrivateName,
    AddsInPlaceMethod,
    lambda: make_closure_block(0.5),
]


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_one_add_found_and_output_unchanged_before_calibration(make, training, x):
    model = network(make()).train(training)
    torch.manual_seed(1)
    expected = model(x)
    qat.prepare(model)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert adds(model) == ["1.quant_add0"]


@pytest.mark.parametrize("make", BLOCKS)
def test_quantized_add_equals_the_formula(make, x):
    """The block's output, when calibrated, is what two quantizers in front of the addition give."""
    model = calibrated(network(make()), x).eval()
    block, seen = model[1], {}
    block.quant_add0.register_forward_hook(lambda m, args, out: seen.update(a=args[0], b=args[1], out=out))
    model(x)
    site_a, site_b = block.quant_add0.a_quantizer, block.quant_add0.b_quantizer

    def fake(t, amax):
        scale = amax / 127
        return torch.clamp(torch.round(t / scale), -128, 127) * scale

    assert torch.equal(seen["out"], fake(seen["a"], site_a.amax) + fake(seen["b"], site_b.amax))


def test_two_adds_on_one_line_are_two_sites(x):
    model = network(TwoOnOneLine())
    qat.prepare(model)
    assert adds(model) == ["1.quant_add0", "1.quant_add1"]


def test_attribute_changed_after_prepare_takes_effect(x):
    model, reference = network(Block()), None
    qat.prepare(model)
    model[1].alpha = 0.25
    reference = qat.restore(copy.deepcopy(model))
    assert reference[1].alpha == 0.25
    assert torch.equal(model(x), reference(x))


def test_side_effects_happen_once_a_call_and_not_while_preparing(x):
    model = network(SideEffects())
    qat.prepare(model)
    assert (model[1].calls, model[1].seen) == (0, [])
    model(x)
    assert model[1].calls == 1
    assert torch.equal(model[1].seen[0], model[0](x))


def test_dropout_follows_the_training_flag(x):
    model = network(Dropping())
    qat.prepare(model)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, model(x))


def test_forward_hooks_survive(x):
    model, calls = network(Block()), []
    model[1].register_forward_hook(lambda *a: calls.append("post"))
    model[1].register_forward_pre_hook(lambda *a: calls.append("pre"))
    qat.prepare(model)
    model(x)
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(reentrant, x):
    model = calibrated(network(Block()), x)

    def gradients(run):
        model.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    saved = gradients(lambda t: model[3](model[2](checkpoint(model[1], model[0](t), use_reentrant=reentrant))))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


@pytest.mark.parametrize("make", [Block, CallsSuper, PrivateName])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_equal(make, duplicate, x):
    model = calibrated(network(make()), x)
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x))
    assert type(twin[1]) is type(model[1])
    with torch.no_grad():
        twin[1].conv.weight.zero_()
    assert not torch.equal(twin(x), model(x))


def test_shared_quantizers_stay_shared_in_a_copy(x):
    model = calibrated(network(Block()), x)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].conv.input_quantizer is twin[1].quant_add0.b_quantizer


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training, x):
    model = calibrated(network(Block()), x).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_data_parallel_training_step(x, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = calibrated(network(Block()), x)
        alone = copy.deepcopy(model)
        alone(x).square().sum().backward()
        nn.parallel.DistributedDataParallel(model)(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
    finally:
        torch.distributed.destroy_process_group()


class AliasedInPlace(Block):
    def forward(self, x):
        y = self.conv(x)
        alias = y
        y += x
        return y, alias


class Untraceable(Block):
    def forward(self, x):
        if x.sum() > 0:
            return self.conv(x) + x
        return self.conv(x)


@pytest.mark.parametrize(
    ("block", "why"), [(AliasedInPlace(), "read again later"), (Untraceable(), "cannot be traced")], ids=["alias", "branch"]
)
def test_what_cannot_be_rewritten_is_left_alone_and_listed(block, why, x):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), block)
    expected = model(x)
    report = qat.prepare(model, qat.QuantConfig(head=()))
    assert adds(model) == []
    assert any(item.path == "1" and why in item.why and "qat.nn.Add()" in item.why for item in report.left)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class UntraceableTwice(Block):
    def forward(self, x):
        y = self.conv(x) + x
        return y + x if x.sum() > 0 else torch.add(y, x, alpha=2)


@pytest.mark.parametrize(("block", "count"), [(AliasedInPlace, 1), (Untraceable, 1), (UntraceableTwice, 2)])
def test_every_addition_left_alone_is_a_row_of_its_own(block, count, x):
    """Whatever keeps it in float, ``what`` is one word that a program can look for; an Add with alpha is none."""
    report = qat.prepare(nn.Sequential(nn.Conv2d(3, 4, 1), block()), qat.QuantConfig(head=()))
    rows = [item for item in report.left if item.path == "1"]
    assert [item.what for item in rows] == ["addition"] * count
    assert len({item.why for item in rows}) == count


class UntraceableInPlace(Block):
    def forward(self, x):
        y = self.conv(x)
        if x.sum() > 0:
            y += x
        return y


@pytest.mark.parametrize(("block", "expected"), [(Untraceable, ["1.quant_add0"]), (UntraceableInPlace, [])])
def test_untraceable_forward_is_observed_with_example_inputs(block, expected, x):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), block())
    nn.init.constant_(model[0].bias, 10.0)  # the branch with the Add runs
    state, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    before = model(x)
    report = qat.prepare(model, qat.QuantConfig(head=()), example_inputs=x)
    assert adds(model) == expected
    assert torch.equal(model(x), before)
    notes = [site.note for site in report.sites if site.what == "add a"]
    assert notes == ["fusable into its layer"] * len(expected)
    assert any("in place" in item.why for item in report.left) == (not expected)
    qat.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == state


def test_add_module_is_the_remedy(x):
    class Remedied(Untraceable):
        def __init__(self) -> None:
            super().__init__()
            self.add = qat.nn.Add()

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.add(self.conv(x), x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Remedied())
    state = list(model.state_dict())
    qat.prepare(model, qat.QuantConfig(head=()))
    assert adds(model) == ["1.add"]
    qat.restore(model)
    assert type(model[1].add) is qat.nn.Add
    assert list(model.state_dict()) == state


class Masked(Block):
    def forward(self, x, mask):
        return self.conv(x) + mask


class Polynomial(Block):
    def forward(self, x):
        y = self.conv(x)
        return y + y * y * 0.1


class Bias(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 4, 6, 6))

    def forward(self, x):
        return self.conv(x) + self.table


@pytest.mark.parametrize("block", [Masked(), Polynomial(), Bias()], ids=lambda b: type(b).__name__)
def test_additions_that_are_no_residuals_get_no_site(block):
    model = nn.Module()
    model.stem, model.block, model.last = nn.Conv2d(3, 4, 1), block, nn.Conv2d(4, 2, 1)
    takes_mask = isinstance(block, Masked)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.last = nn.Conv2d(3, 4, 1), block, nn.Conv2d(4, 2, 1)

        def forward(self, x, mask):
            y = self.stem(x)
            return self.last(self.block(y, mask) if takes_mask else self.block(y))

    net = Net()
    qat.prepare(net)
    assert adds(net) == []


def test_traceback_shows_the_line_of_the_user_source():
    class Raises(Block):
        def forward(self, x):
            y = self.conv(x) + x
            return y.view(-1, 7)  # fails for this shape

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Raises())
    qat.prepare(model, qat.QuantConfig(head=()))
    with pytest.raises(RuntimeError) as info:
        model(torch.zeros(1, 3, 2, 2))
    assert any(entry.path.name == "test_rewriting.py" and "view(-1, 7)" in str(entry.statement) for entry in info.traceback)
