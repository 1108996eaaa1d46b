"""Errors, sensitivity, mixed precision and ranges: against plain loops over complete evaluations."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from analysis_nets import MODELS, made, states, unchanged
from prepare_nets import NO_HEAD, Block, Net, calibrated, images, routed
from torch import nn
from torch.nn import functional as F

import qat
from qat import analysis
from qat.analysis.layers import quantized_layers, switching
from qat.core.quantizer import State, quantizers, switched_off
from qat.tensorrt import Inspection
from qat.tensorrt.layers import EngineLayer


def off(model):
    for _, site in quantizers(model):
        site.set_state(State.OFF)
    return model


# Switching.


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_on_is_the_quantized_model_and_none_the_float_model(name):
    model = made(name).eval()
    with torch.no_grad():
        quantized = analysis.metrics.output_tensors(model(images()))
        with switching(model, quantized_layers(model).values()) as switches:
            on = analysis.metrics.output_tensors(model(images()))
            switches.on = ()
            none = analysis.metrics.output_tensors(model(images()))
        plain = analysis.metrics.output_tensors(off(model)(images()))
    assert all(map(torch.equal, on, quantized))
    assert all(map(torch.equal, none, plain))
    assert not all(map(torch.equal, on, none))


def test_layers_that_share_a_quantizer_are_switched_apart():
    model = made("shared quantizer").eval()
    assert model.left.input_quantizer is model.right.input_quantizer
    with torch.no_grad(), switching(model, quantized_layers(model).values()) as switches:
        switches.on = {"right"}
        x = F.relu(model.stem(images()))
        floating = F.conv2d(x, model.left.weight, model.left.bias)
        assert torch.equal(model.left(x), floating)
        assert not torch.equal(model.right(x), F.conv2d(x, model.right.weight, model.right.bias))


# Sensitivity.


def plain_loop(model, batch, metric, switch):
    """One complete evaluation a layer, with nothing kept from another."""
    layers = quantized_layers(model)
    model.eval()
    with torch.no_grad(), switching(model, layers.values()) as switches:
        switches.on = ()
        reference = model(batch)
        start = frozenset() if switch == "on" else frozenset(layers)
        found = {}
        for path in layers:
            switches.on = start ^ {path}
            found[path] = float(metric(model(batch), reference, batch))
        return found


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_one_evaluation_a_layer(name, switch):
    model = made(name)
    before = states(model)
    result = analysis.sensitivity(model, [images()], switch=switch)
    assert unchanged(model, before)
    expected = plain_loop(model, images(), analysis.relative_error, switch)
    assert {layer.path: layer.value for layer in result.layers} == expected
    assert any(value > 0 for value in expected.values())
    changes = [layer.change for layer in result.layers]
    assert changes == sorted(changes, reverse=switch == "on")
    assert result.base == 0 if switch == "on" else result.base > 0


def test_only_what_a_change_reaches_is_computed():
    model = made()
    convolutions = []
    weights = {id(m.weight): path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    compute = analysis.replay.Recording.compute

    class Counting(analysis.replay.Recording):
        def compute(self, func, args, kwargs, *, recorded):
            if func is torch.ops.aten.convolution.default and not recorded:
                convolutions.append(weights.get(id(args[1]), "the switched one"))
            return compute(self, func, args, kwargs, recorded=recorded)

    with torch.no_grad(), switching(model.eval(), quantized_layers(model).values()) as switches:
        recording, switches.on = Counting(), ()
        with recording.record():
            model(x := images())
        switches.on = {"body.conv2"}
        with recording.replay():
            model(x)
    assert convolutions == ["the switched one"]


def test_a_metric_of_the_user_sees_outputs_reference_and_labels_and_is_averaged_over_samples():
    model = made()
    batches = [(images(0), torch.tensor([0, 1])), (images(1)[:1], torch.tensor([2]))]

    def cross_entropy(outputs, reference, batch):
        assert reference.shape == outputs.shape
        return F.cross_entropy(outputs, batch[1], reduction="none")

    result = analysis.sensitivity(model, batches, metric=cross_entropy, switch="off")
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(model.eval()(x), y, reduction="none") for x, y in batches])
    assert result.base == pytest.approx(float(losses.double().mean()), rel=1e-6)
    assert result.metric == "cross_entropy"


def test_kl_divergence_is_that_of_its_definition():
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    found = analysis.kl_divergence(torch.tensor(q).log() + 3, torch.tensor(p).log() - 1, None)
    np.testing.assert_allclose(found.numpy(), (p * np.log(p / q)).sum(1), rtol=1e-12)


def test_estimates_come_near_the_values_and_leave_the_model_as_it_was():
    model = made()
    before = states(model)
    data = [torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(7))]
    exact = {layer.path: layer.value for layer in analysis.sensitivity(model, data).layers}
    result = analysis.estimate_sensitivity(model, data, draws=16)
    assert unchanged(model, before)
    assert not result.exact
    assert all(p.grad is None for p in model.parameters())
    # 16 * 64 draws: a standard deviation of 5 %, and what ReLUs make of it.
    for layer in result.layers:
        assert layer.value == pytest.approx(exact[layer.path], rel=0.3)


def test_an_estimate_of_a_linear_model_converges_to_the_value():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    qat.prepare(model, NO_HEAD)
    data = [torch.randn(512, 6)]
    qat.calibrate(model, data, method="max", progress=False)
    exact = {layer.path: layer.value for layer in analysis.sensitivity(model, data).layers}
    for layer in analysis.estimate_sensitivity(model, data, draws=32).layers:
        assert layer.value == pytest.approx(exact[layer.path], rel=0.06)  # five standard deviations


# Errors of layers.


def sqnr(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 10 * math.log10((a**2).sum() / ((a - b) ** 2).sum())


def test_layer_errors_are_those_of_outputs_taken_by_hand():
    model = made()
    before = states(model)
    result = analysis.layer_errors(model, [images(0), (images(1), None)])
    assert unchanged(model, before)
    outputs = {}

    def run(mode):
        with torch.no_grad():
            for seed in (0, 1):
                model(images(seed))
        found, outputs[mode] = torch.cat(taken), None
        taken.clear()
        return found

    model.eval()
    taken = []
    handle = model.body.conv2.register_forward_hook(lambda m, args, out: taken.append(out.clone()))
    quantized = run("quantized")
    off(model)
    floating = run("float")
    for site in (model.body.conv2.input_quantizer, model.body.conv2.weight_quantizer):
        site.set_state(State.QUANTIZING)
    alone = run("alone")
    handle.remove()
    entry = next(e for e in result.layers if e.path == "body.conv2")
    assert entry.sqnr == pytest.approx(sqnr(floating, alone), abs=1e-3)
    assert entry.sqnr_accumulated == pytest.approx(sqnr(floating, quantized), abs=1e-3)
    cosine = F.cosine_similarity(floating.flatten().double(), quantized.flatten().double(), dim=0)
    assert entry.cosine_accumulated == pytest.approx(float(cosine), abs=1e-7)
    assert [e.path for e in result.layers] == ["stem", "body.conv1", "body.conv2", "body.quant_add0", "pool"]
    assert entry.sqnr > entry.sqnr_accumulated
    first = result.layers[0]
    assert first.sqnr == first.sqnr_accumulated  # nothing before it


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_finite_errors(name):
    for error in analysis.layer_errors(made(name), [images()]).layers:
        assert 5 < error.sqnr < 80
        assert 0.9 < error.cosine_accumulated < 1


def test_batches_may_be_mappings():
    result = analysis.layer_errors(made(), [{"x": images(), "label": torch.zeros(2)}])
    assert result == analysis.layer_errors(made(), [images()])


# Mixed precision.


def chain():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    qat.prepare(model, NO_HEAD)
    data = [torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)]
    qat.calibrate(model, data, progress=False)
    return model, data


def test_the_fewest_layers_are_left_in_float_and_the_value_is_that_of_the_model_with_them():
    model, data = chain()
    before = states(model)
    everything = analysis.mixed_precision(model, data, budget=1.0)
    assert everything.layers == ()
    assert everything.met
    assert everything.value == everything.quantized
    budget = everything.quantized * 0.5
    result = analysis.mixed_precision(model, data, budget=budget)
    assert unchanged(model, before)
    assert result.met
    assert 0 < len(result.layers) < 4
    layers = quantized_layers(model)

    def value(left):
        with torch.no_grad(), switching(model.eval(), layers.values()) as switches:
            total = 0.0
            for x in data:
                switches.on = ()
                reference = model(x)
                switches.on = set(layers) - set(left)
                total += float(analysis.relative_error(model(x), reference, x))
        return total / len(data)

    paths = [layer.path for layer in result.layers]
    assert result.value == value(paths) <= budget < result.quantized
    assert all(value([p for p in paths if p != path]) > budget for path in paths)


def test_rules_give_a_model_of_that_value():
    model, data = chain()
    result = analysis.mixed_precision(model, data, budget=analysis.mixed_precision(model, data, budget=1.0).quantized / 2)
    assert result.to_rules() == tuple(qat.Rule(**rule) for rule in result.rules)
    state = model.state_dict()
    qat.restore(model)
    with torch.no_grad():
        reference = [model.eval()(x) for x in data]
    report = qat.prepare(model, NO_HEAD.replace(rules=result.rules))
    assert {item.path for item in report.left} == {layer.path for layer in result.layers}
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    with torch.no_grad():
        values = [float(analysis.relative_error(model(x), r, x)) for x, r in zip(data, reference, strict=True)]
    assert sum(values) / len(values) == pytest.approx(result.value, rel=1e-9)


def test_an_add_may_be_what_is_left_in_float():
    model = made()
    paths = list(quantized_layers(model))
    fast = profile(**dict.fromkeys(paths, 1.0))
    slow = profile(**{path: 1.0 + (path not in ("body.quant_add0", "pool")) for path in paths})
    result = analysis.mixed_precision(model, [images()], latency=float(len(paths)), profiles=(fast, slow))
    assert {(layer.path, layer.kind) for layer in result.layers} == {("body.quant_add0", "add"), ("pool", "pool")}
    report = qat.prepare(Net(), qat.QuantConfig(rules=result.rules))
    assert (report.count("add"), report.count("pool"), report.count("conv")) == (0, 0, 3)
    everything = analysis.mixed_precision(model, [images()], budget=0.0)
    assert everything.met
    assert {layer.path for layer in everything.layers} == set(paths)


class TwoAdds(Block):
    def forward(self, x):
        x = self.conv1(x) + x
        return self.conv2(x) + x


def test_a_budget_that_no_set_meets_is_said_to_be_missed():
    # A rule cannot rely on the numbers of two Adds in one forward: they stay quantized.
    torch.manual_seed(0)
    model = calibrated(Net(TwoAdds()))
    assert {"body.quant_add0", "body.quant_add1"} <= set(quantized_layers(model))
    result = analysis.mixed_precision(model, [images()], budget=0.0)
    assert not result.met
    assert not any(layer.kind == "add" for layer in result.layers)
    assert result.value > 0
    assert "NOT MET" in str(result)
    assert json.loads(result.to_json())["met"] is False


def profile(**times):
    layers = [EngineLayer(path, "CaskConvolution", onnx_nodes=(f"{path}/Conv",), time_ms=ms) for path, ms in times.items()]
    return Inspection(tuple(layers), None)


def profiles():
    fast = Inspection((*profile(stem=1.0).layers, _fused("body.conv1/Conv", "body.conv2/Conv", ms=2.0)), None)
    slow = Inspection((*profile(stem=4.0).layers, _fused("body.conv1/Conv", "body.conv2/Conv", ms=3.0)), None)
    return fast, slow


def _fused(*nodes, ms):
    return EngineLayer("+".join(nodes), "CaskConvolution", onnx_nodes=nodes, time_ms=ms)


def test_a_kernel_of_several_layers_counts_for_each_in_equal_parts():
    assert analysis.layer_times(profiles()[1], ["stem", "body.conv1", "body.conv2"]) == {
        "stem": 4.0,
        "body.conv1": 1.5,
        "body.conv2": 1.5,
    }


def test_a_latency_budget_takes_the_layers_that_fit():
    result = analysis.mixed_precision(made(), [images()], latency=4.0, profiles=profiles())
    assert {layer.path for layer in result.layers} == {"body.conv1", "body.conv2"}
    assert result.latency_ms == pytest.approx(4.0)
    assert result.met
    assert result.value < result.quantized


def test_an_accuracy_and_a_latency_budget_are_met_or_not_together():
    model, data = chain()
    layers = [f"{i}" for i in (0, 2, 4, 6)]
    pair = profile(**dict.fromkeys(layers, 1.0)), profile(**dict.fromkeys(layers, 3.0))
    result = analysis.mixed_precision(model, data, budget=0.0, latency=11.0, profiles=pair)
    assert result.value == 0
    assert result.latency_ms == pytest.approx(12.0)
    assert not result.met
    assert analysis.mixed_precision(model, data, budget=0.0, latency=12.0, profiles=pair).met


def test_a_given_ranking_decides_the_order():
    ranking = analysis.estimate_sensitivity(made(), [images()], draws=1)
    last = [layer for layer in reversed(ranking.layers) if layer.kind == "conv"]
    turned = analysis.Sensitivity(tuple(reversed(ranking.layers)), "on", 0.0, "relative_error", False)
    result = analysis.mixed_precision(made(), [images()], latency=3.5, profiles=profiles(), ranking=turned)
    # The profiles say nothing about the Add and the pooling, which then are not taken for free.
    affordable = [layer.path for layer in last if layer.path != "stem"]
    assert [layer.path for layer in result.layers] == affordable[:1]


# Ranges.


def test_ranges_say_what_reaches_the_sites_and_what_is_clipped():
    model = made()
    model.stem.input_quantizer.set_range(torch.tensor(1.0))
    before = states(model)
    result = analysis.ranges(model, [images(0), images(1)])
    assert unchanged(model, before)
    x = torch.cat([images(0), images(1)]).abs()
    entry = next(site for site in result.sites if site.path == "stem.input_quantizer")
    assert entry.amax == 1.0
    assert entry.largest == float(x.max())
    assert entry.clipped == pytest.approx(float((x > 1).float().mean()), abs=0.005)
    assert result.histograms[entry.path].total == x.numel()
    counts = result.to_dict()["histograms"][entry.path]["counts"]
    assert sum(counts) == x.numel()
    json.loads(result.to_json())


def test_clip_rates_count_exactly():
    model = made()
    model.stem.input_quantizer.set_range(torch.tensor(1.0))
    model.train()
    found = analysis.clip_rates(model, [images(0), {"x": images(1)}])
    assert model.training
    codes = (torch.cat([images(0), images(1)]) * 127).round()
    assert found.rates["stem.input_quantizer"] == float(((codes > 127) | (codes < -128)).double().mean())
    assert next(iter(found.rates)) == "stem.input_quantizer"


def test_compare_tells_what_training_changed():
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.stem.weight[1] *= 3
        model.body.conv1.input_quantizer.amax.mul_(0.5)
    changes = analysis.compare(before, model.state_dict())
    moved = {change.path: (change.smallest, change.largest) for change in changes.ranges}
    assert moved["stem.weight_quantizer"] == pytest.approx((1.0, 3.0))
    assert moved["body.conv1.input_quantizer"] == (0.5, 0.5)
    weights = {change.name: change.sqnr for change in changes.weights}
    assert weights["stem.weight"] == pytest.approx(sqnr(before["stem.weight"], model.stem.weight.detach()), abs=1e-6)
    assert weights["body.conv1.weight"] == math.inf
    assert json.loads(changes.to_json())["weights"][1]["sqnr"] is None
    assert "stem.weight" in str(changes)


# Failures.


class Failing(Net):
    fails = False

    def forward(self, x):
        x = self.stem(x)
        if self.fails:
            raise RuntimeError("out of order")
        return self.fc(self.pool(self.body(x)).flatten(1))


@pytest.mark.parametrize(
    "analyse", [analysis.sensitivity, analysis.estimate_sensitivity, analysis.layer_errors, analysis.ranges]
)
def test_a_model_that_fails_is_left_as_it_was(analyse):
    model = Failing()
    qat.prepare(model)
    qat.calibrate(model, [images()], progress=False)
    model.fails = True
    before = states(model)
    with pytest.raises(RuntimeError, match="out of order"):
        analyse(model, [images()])
    assert unchanged(model, before)


def test_buffers_that_forward_writes_are_as_after_no_run():
    class Counter(Block):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(self.stem(x)) * self.calls

    model = Counter()
    qat.prepare(model, NO_HEAD)
    qat.calibrate(model, [images()], progress=False)
    start = model.calls.clone()
    result = analysis.sensitivity(model, [images()])
    assert torch.equal(model.calls, start)
    assert all(0 < layer.value < 0.1 for layer in result.layers)


@pytest.mark.parametrize("analyse", [analysis.sensitivity, analysis.layer_errors, analysis.ranges, analysis.clip_rates])
def test_uncalibrated_models_and_bad_batches_are_refused(analyse):
    model = Net()
    with pytest.raises(qat.QATError, match=r"qat\.prepare"):
        analyse(model, [images()])
    qat.prepare(model)
    with pytest.raises(qat.QATError, match=r"qat\.calibrate"):
        analyse(model, [images()])
    qat.calibrate(model, [images()], progress=False)
    with pytest.raises(qat.QATError, match="is a Tensor"):
        analyse(model, images())
    with pytest.raises(qat.QATError, match="is empty"):
        analyse(model, [])


def test_bad_arguments_are_refused():
    model, data = made(), [images()]
    with pytest.raises(qat.QATError, match="switch='both'"):
        analysis.sensitivity(model, data, switch="both")
    with pytest.raises(qat.QATError, match="draws=0"):
        analysis.estimate_sensitivity(model, data, draws=0)
    with pytest.raises(qat.QATError, match="budget"):
        analysis.mixed_precision(model, data)
    with pytest.raises(qat.QATError, match="profiles"):
        analysis.mixed_precision(model, data, latency=1.0)
    with pytest.raises(qat.QATError, match="no times"):
        analysis.layer_times(profile(stem=None), ["stem"])
    with pytest.raises(qat.QATError, match="called after 'other'"):
        analysis.layer_times(profile(stem=1.0), ["other"])
    with pytest.raises(qat.QATError, match="metric: returned str"):
        analysis.sensitivity(model, data, metric=lambda *_: "good")
    with pytest.raises(qat.QATError, match="in common"):
        analysis.compare({}, {})
    with pytest.raises(qat.QATError, match="logits"):
        analysis.sensitivity(made("two outputs"), data, metric=lambda o, r, b: analysis.kl_divergence(o["late"], r["late"], b))


class Selects(nn.Module):
    """Returns what is above a threshold, as a detector does: how many that are depends on the rounding."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        return x[x > 0]


@pytest.mark.parametrize("result", [analysis.sensitivity, analysis.layer_errors])
def test_outputs_whose_size_changes_are_refused(result):
    torch.manual_seed(0)
    model, data = Selects(), [torch.randn(8, 3, 16, 16)]
    qat.prepare(model, NO_HEAD)
    qat.calibrate(model, data, progress=False)
    with pytest.raises(qat.QATError, match=r"the outputs have sizes \[\(\d+,\)\] where those of the float model have"):
        result(model, data)
    count = analysis.sensitivity(model, data, metric=lambda o, r, b: abs(len(o) - len(r)) / len(r))
    assert 0 < max(layer.value for layer in count.layers) < 0.1


@pytest.mark.parametrize("result", [analysis.sensitivity, analysis.layer_errors, analysis.ranges, analysis.clip_rates])
def test_results_print_every_path_and_give_json(result):
    found = result(made(), [images()])
    assert "body.conv1" in str(found)
    assert json.loads(found.to_json()) == found.to_dict()


class Gated(nn.Module):
    """Its gate is computed from a mean, whose quantizer the product shares."""

    def __init__(self):
        super().__init__()
        self.a, self.reduce, self.expand, self.b = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 4, 1),
            nn.Conv2d(4, 16, 1),
            nn.Conv2d(16, 8, 1),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.a(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.fc(self.b(x * gate.sigmoid()).flatten(2).amax(2))


@pytest.mark.parametrize(
    ("make", "first", "follow"),
    [
        (Gated, ["a"], {"quant_mean0", "quant_mul0"}),
        (Gated, ["b", "expand"], set()),
        (Net, ["body.conv2", "stem"], {"body.quant_add0"}),
        (lambda: Net(TwoAdds()), ["body.conv1", "stem"], {"body.quant_add0"}),
    ],
)
def test_what_no_quantized_layer_feeds_follows_and_needs_no_rule(make, first, follow):
    torch.manual_seed(0)
    model, batch = make().eval(), torch.randn(16, 3, 10, 10)
    qat.prepare(model, example_inputs=batch)
    qat.calibrate(model, [batch], progress=False)
    # By these profiles only the first ones cost nothing in float.
    paths = list(quantized_layers(model))
    fast, slow = profile(**dict.fromkeys(paths, 1.0)), profile(**{path: 1.0 + (path not in first) for path in paths})
    result = analysis.mixed_precision(model, [batch], latency=float(len(paths)), profiles=(fast, slow))
    assert {layer.path for layer in result.layers if not layer.follows} == set(first)
    assert {layer.path for layer in result.layers if layer.follows} == follow
    assert {rule["match"] for rule in result.rules} == set(first)
    state, plain = model.state_dict(), qat.restore(model)
    again = copy.deepcopy(plain)
    qat.prepare(again, qat.QuantConfig(rules=result.rules), example_inputs=batch)
    # Of two Adds, the second one has the number of the first one now.
    moved = {name: name.replace("add0", "add1") if "body.quant_add1.a_quantizer.amax" in state else name for name in state}
    again.load_state_dict({name: state[moved.get(name, name)] for name in again.state_dict()})
    with torch.no_grad():
        assert result.value == pytest.approx(float(analysis.relative_error(again(batch), plain(batch), batch)), rel=1e-6)


def test_a_mean_that_shares_its_quantizer_with_a_gate_is_told_apart():
    torch.manual_seed(0)
    model, batch = Gated().eval(), torch.randn(64, 3, 10, 10)
    qat.prepare(model, example_inputs=batch)
    qat.calibrate(model, [batch], progress=False)
    assert model.quant_mul0.a_quantizer is model.quant_mean0
    exact = {layer.path: layer.value for layer in analysis.sensitivity(model, [batch]).layers}
    estimated = {layer.path: layer.value for layer in analysis.estimate_sensitivity(model, [batch], draws=64).layers}
    assert estimated == {path: pytest.approx(value, rel=0.1) for path, value in exact.items()}
    # What the mean reads, quantized by hand.
    seen = []
    handle = model.quant_mean0.register_forward_pre_hook(lambda site, args: seen.append(args[0].clone()))
    with switched_off(model), torch.no_grad():
        model(batch)
    handle.remove()
    (errors,) = [e for e in analysis.layer_errors(model, [batch]).layers if e.path == "quant_mean0"]
    assert errors.sqnr == pytest.approx(sqnr(seen[0], qat.fake_quantize(seen[0], model.quant_mean0.scale)), abs=1e-3)


class InPlace(nn.Module):
    """Normalizes what it is given in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(0.3))


def test_a_model_that_changes_its_input_in_place_is_analysed_as_any_other():
    torch.manual_seed(0)
    model, batch = InPlace().eval(), torch.rand(16, 3, 8, 8) + 1
    given = batch.clone()
    qat.prepare(model, example_inputs=batch.clone())
    qat.calibrate(model, [batch.clone()], progress=False)
    found = [analysis.sensitivity(model, [batch], switch=switch) for switch in ("on", "off")]
    errors = analysis.layer_errors(model, [batch])
    assert torch.equal(batch, given)
    with torch.no_grad():
        quantized = model(batch.clone())
        with switched_off(model):
            reference = model(batch.clone())
    assert errors.output_sqnr == pytest.approx(sqnr(reference, quantized), abs=1e-3)
    assert all(layer.value < 1e-3 for result in found for layer in result.layers)


def test_outputs_that_quantization_does_not_reach_count_in_an_estimate_as_in_the_value():
    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return x, self.b(self.a(x)), x + 1

    torch.manual_seed(0)
    model, batch = Passes().eval(), torch.randn(64, 3, 8, 8)
    qat.prepare(model, NO_HEAD, example_inputs=batch)
    qat.calibrate(model, [batch], progress=False)
    exact = {layer.path: layer.value for layer in analysis.sensitivity(model, [batch]).layers}
    estimated = {layer.path: layer.value for layer in analysis.estimate_sensitivity(model, [batch], draws=64).layers}
    assert estimated == {path: pytest.approx(value, rel=0.1) for path, value in exact.items()}


def test_a_learned_range_has_no_sign():
    before, after = {"a.amax": torch.tensor(-2.0)}, {"a.amax": torch.tensor(3.0)}
    (moved,) = analysis.compare(before, after).ranges
    assert (moved.smallest, moved.largest) == (1.5, 1.5)


def compared(model, batch, draws=64):
    """The exact sensitivities and their estimates."""
    exact = {layer.path: layer.value for layer in analysis.sensitivity(model, [batch]).layers}
    return exact, {layer.path: layer.value for layer in analysis.estimate_sensitivity(model, [batch], draws=draws).layers}


class TwoHeads(nn.Module):
    """Two heads without normalization, of which the second one gives zeros."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.z = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
        nn.init.zeros_(self.z.weight)
        nn.init.zeros_(self.z.bias)

    def forward(self, x):
        x = self.a(x)
        return self.c(x), self.z(x)


def test_an_output_of_zeros_counts_as_unchanged_in_an_estimate():
    torch.manual_seed(0)
    model, batch = TwoHeads().eval(), torch.randn(64, 3, 8, 8)
    qat.prepare(model, NO_HEAD, example_inputs=batch)
    qat.calibrate(model, [batch], progress=False)
    exact, estimated = compared(model, batch)
    assert exact["a"] > 0
    assert estimated == {path: pytest.approx(value, rel=0.1) for path, value in exact.items()}


@pytest.mark.parametrize(("value", "match"), [(0.0, "are all zero"), (math.inf, "hold NaN or infinity")])
def test_outputs_without_a_relative_error_are_refused_by_an_estimate(value, match):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), torch.randn(4, 3, 6, 6)
    nn.init.zeros_(model[1].weight)
    qat.prepare(model, NO_HEAD, example_inputs=batch)
    qat.calibrate(model, [batch], progress=False)
    nn.init.constant_(model[1].bias, value)
    with pytest.raises(qat.QATError, match=match):
        analysis.estimate_sensitivity(model, [batch])


class Graph(nn.Module):
    """Layers run on the nodes of a graph, whose neighbours are averaged in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, adjacency):
        x = F.relu(adjacency @ self.a(x))
        return self.o(adjacency @ F.relu(self.b(x)))


class OverTime(nn.Module):
    """A causal sum over the first dimension: outputs depend on the rows before them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.o(F.relu(self.b(self.a(x).cumsum(0))).cumsum(0))


@pytest.mark.parametrize("make", [Graph, OverTime])
def test_an_estimate_does_not_take_rows_apart_that_mix(make):
    torch.manual_seed(0)
    x = torch.randn(32, 6) + 1
    batch = {"x": x, "adjacency": torch.full((32, 32), 1 / 32)} if make is Graph else x
    model = make().eval()
    qat.prepare(model, NO_HEAD, example_inputs=batch)
    qat.calibrate(model, [batch], method="max", progress=False)
    exact, estimated = compared(model, batch, draws=512)
    assert set(exact) == {"a", "b", "o"}
    # One sum a draw: a standard deviation of 6 %.
    assert estimated == {path: pytest.approx(value, rel=0.25) for path, value in exact.items()}


@pytest.mark.parametrize("where", ["elsewhere", "more often", "less often", "fewer rows"])
def test_layers_that_the_quantized_model_does_not_run_as_the_float_one_are_named(where):
    model, batch = routed(where)
    with pytest.raises(qat.QATError, match=r"^(left|right): runs another number of times .* depends on the data"):
        analysis.layer_errors(model, [batch])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(math.nan, 1.0, math.nan), (1.0, math.nan, math.nan), (1.0, math.inf, -math.inf), (0.0, 1.0, -math.inf)],
)
def test_the_sqnr_of_nan_is_nan(before, after, expected):
    found = analysis.compare({"a.weight": torch.full((2, 2), before)}, {"a.weight": torch.full((2, 2), after)})
    assert found.weights[0].sqnr == pytest.approx(expected, nan_ok=True)


def test_a_metric_of_nan_is_refused_rather_than_ranked():
    model = made()
    for analyse in (analysis.sensitivity, functools.partial(analysis.mixed_precision, budget=1e-3)):
        with pytest.raises(qat.QATError, match="metric: is NaN"):
            analyse(model, [images() * math.nan])
