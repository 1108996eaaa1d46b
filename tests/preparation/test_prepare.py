"""``prepare`` and ``restore``: what goes where on small nets counted by hand."""

import copy
import pickle
import time

import pytest
import torch
from prepare_nets import (
    NO_HEAD,
    Attending,
    Block,
    Net,
    Scaled,
    Sum,
    Upsampled,
    WithAdd,
    calibrated,
    conv,
    decorate,
    images,
    snapshot,
    two,
    whats,
    why,
)
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.config import QuantConfig
from qat.core.quantizer import Quantizer, State, quantizers
from qat.errors import QATError

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


class Marked(Block):
    """Max pooling, and an identity that marks the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.mark = nn.MaxPool2d(3, 1, 1), nn.Identity()

    def forward(self, x):
        return self.conv2(self.pool(self.conv1(x))) + self.mark(x)


def test_module_inputs_quantize_what_other_modules_read():
    config = QuantConfig(head=(), add_inputs="none", pool_inputs=False, module_inputs=["body.pool", "*.mark"])
    model = Net(Marked())
    before = snapshot(model)
    report = qat.prepare(model, config)
    assert [(site.path, site.what) for site in report.sites if site.kind == "other"] == [
        ("body.pool", "input"),
        ("body.mark", "input"),
    ]
    assert "2 other" in report.summary()
    assert model.body.mark.input_quantizer is model.body.conv1.input_quantizer  # they read one tensor
    seen = []
    qat.calibrate(model, [images()], method="max", progress=False)
    model.body.pool.register_forward_hook(lambda m, args, out: seen.append((m.input_quantizer(args[0]), out)))
    model(images())
    assert torch.equal(F.max_pool2d(seen[0][0], 3, 1, 1), seen[0][1])
    qat.restore(model.eval())
    model.body.pool._forward_hooks.clear()
    assert snapshot(model.train())["state"] == before["state"]
    assert type(model.body.mark) is nn.Identity
    assert QuantConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("glob", "message"), [("nowhere", "matches no module"), ("body", "matches only layers"), ("fc", "only")]
)
def test_module_inputs_that_fit_nothing_are_refused(glob, message):
    model = Net(Marked())
    with pytest.raises(QATError, match=message):
        qat.prepare(model, QuantConfig(module_inputs=[glob]))
    assert type(model) is Net


def test_report_names_the_model_itself():
    """A forward without source (typed into an interpreter) is listed; at the root the path is empty."""
    scope = {"nn": nn}
    exec(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x))\n",
        scope,
    )
    report = qat.prepare(scope["Net"]())
    assert [item.path for item in report.left] == ["b", ""]
    assert "(the model)" in str(report)


def test_nested_containers_take_no_time():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    for _ in range(25):
        model = nn.Sequential(model)
    begin = time.perf_counter()
    qat.prepare(model, qat.QuantConfig(head=()))
    # With a doubling at each level it would be some minutes.
    assert time.perf_counter() - begin < 20
