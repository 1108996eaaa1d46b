"""Ranges that stop, and ranges that the optimizer trains."""

import pytest
import torch
from prepare_nets import Net, images
from torch.optim import lr_scheduler as S

import qat
from qat.core.quantizer import WeightQuantizer, quantizers
from qat.training.ranges import clip_rates, freeze_ranges, learned_ranges, range_drift, recorded_ranges, separate_ranges


def prepared(**settings):
    torch.manual_seed(0)
    model = Net()
    qat.prepare(model, qat.QuantConfig(**settings))
    qat.calibrate(model, [images()], progress=False)
    return model


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()


def weight_ranges(model):
    return {path: site.amax.detach().clone() for path, site in quantizers(model) if isinstance(site, WeightQuantizer)}


def test_ranges_of_weights_stay_what_they_are_at_that_moment():
    model = prepared()
    train(model)
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "weight_quantizer")}
    expected = {path: layer.weight.detach().abs().amax((1, 2, 3)) for path, layer in layers.items()}
    stopped = freeze_ranges(model)
    assert set(stopped) == set(weight_ranges(model))
    before = model(images()).detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    for path, site in quantizers(model):
        if isinstance(site, WeightQuantizer):
            assert torch.equal(site.amax, expected[path.removesuffix(".weight_quantizer")])
    model.load_state_dict(state)
    assert torch.equal(model(images()), before)


def test_a_weight_beyond_its_frozen_range_is_clipped():
    model = prepared()
    freeze_ranges(model)
    amax = model.stem.weight_quantizer.amax.clone()
    with torch.no_grad():
        model.stem.weight.mul_(3)
    assert (model.stem.weight_quantizer(model.stem.weight).abs().amax((1, 2, 3)) <= amax * 128 / 127 * 1.0001).all()


def test_without_refreshing_the_recorded_ranges_stay():
    model = prepared()
    recorded = weight_ranges(model)
    train(model)
    freeze_ranges(model, refresh=False)
    assert all(torch.equal(value, recorded[path]) for path, value in weight_ranges(model).items())


def test_learned_ranges_no_longer_train():
    model = prepared(learn_scales=True)
    freeze_ranges(model)
    before = {path: site.amax.detach().clone() for path, site in quantizers(model)}
    train(model)
    assert all(torch.equal(site.amax, before[path]) for path, site in quantizers(model))
    assert freeze_ranges(model) == []


def groups_of(model, optimizer):
    ranges = {id(p) for p in learned_ranges(model)}
    return [
        (len(g["params"]), {id(p) in ranges for p in g["params"]}, g["weight_decay"], g["lr"]) for g in optimizer.param_groups
    ]


def two_groups(model):
    convs = [p for p in model.parameters() if p.ndim == 4]
    rest = [p for p in model.parameters() if p.ndim != 4]
    return [{"params": convs, "weight_decay": 0.3}, {"params": rest, "lr": 0.01, "weight_decay": 0.2}]


@pytest.mark.parametrize("lr_factor", [1.0, 10.0])
def test_each_range_is_held_once_without_weight_decay(lr_factor):
    model = prepared(learn_scales=True)
    optimizer = torch.optim.AdamW(two_groups(model), lr=0.1)
    held = sorted(id(p) for group in optimizer.param_groups for p in group["params"])
    assert separate_ranges(model, [optimizer], lr_factor=lr_factor) == []
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == held
    convs, rest, ranges = groups_of(model, optimizer)
    assert convs[1:] == ({False}, 0.3, 0.1)
    assert rest[1:] == ({False}, 0.2, 0.01)
    assert ranges == (len(learned_ranges(model)), {True}, 0.0, pytest.approx(0.01 * lr_factor))


def test_a_group_of_ranges_alone_is_kept():
    model = prepared(learn_scales=True)
    ranges = learned_ranges(model)
    others = [p for p in model.parameters() if all(p is not r for r in ranges)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": ranges}], 0.1, weight_decay=0.5)
    separate_ranges(model, [optimizer])
    assert groups_of(model, optimizer) == [(len(others), {False}, 0.5, 0.1), (len(ranges), {True}, 0.0, 0.1)]


def test_ranges_that_no_optimizer_has_are_named():
    model = prepared(learn_scales=True)
    optimizer = torch.optim.SGD(model.stem.parameters(), 0.1)
    assert set(separate_ranges(model, [optimizer])) == {
        path for path, site in quantizers(model) if not path.startswith("stem.") and site is not model.stem.input_quantizer
    }


SCHEDULERS = {
    "step": lambda o: S.StepLR(o, 2, 0.5),
    "multi step": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "lambda": lambda o: S.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: S.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: S.OneCycleLR(o, [0.3, 0.03], total_steps=8),
    "cyclic": lambda o: S.CyclicLR(o, [0.1, 0.01], [0.3, 0.03], 2),
    "warm-up": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=2), S.ExponentialLR(o, 0.5)], [2]),
    "chained": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: S.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3, 1e-4]),
}


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_move_the_rate_of_the_ranges_with_that_of_their_old_group(kind, factor):
    model = prepared(learn_scales=True)
    optimizer = torch.optim.SGD(two_groups(model), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[kind](optimizer)
    separate_ranges(model, [optimizer], [scheduler], lr_factor=factor)
    rates = []
    for step in range(6):
        optimizer.step()
        scheduler.step(*([1.0 + step] if kind == "plateau" else []))
        _, rest, ranges = (group["lr"] for group in optimizer.param_groups)
        assert ranges == pytest.approx(rest * factor)
        rates.append(ranges)
    assert len(set(rates)) > 1
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)


def test_a_model_without_learned_ranges_is_left_alone():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    assert separate_ranges(model, [optimizer]) == []
    assert len(optimizer.param_groups) == 1


def test_clip_rates_are_fractions_beyond_the_range():
    model = prepared()
    site = model.body.conv1.input_quantizer
    site.set_range(torch.tensor(1.0))
    seen = []
    handle = site.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    rates = clip_rates(model, lambda m: [m(images(1)), m(images(2))])
    handle.remove()
    values = torch.cat([x.flatten() for x in seen]).double() * 127
    expected = ((values > 127.5) | (values < -128.5)).double().mean().item()
    path = next(path for path, found in quantizers(model) if found is site)
    assert 0 < expected < 1
    assert rates[path] == pytest.approx(expected, abs=1e-9)
    assert all(rates[name] == 0 for name, found in quantizers(model) if isinstance(found, WeightQuantizer))
    assert not site._forward_pre_hooks


def test_drift_is_the_largest_relative_change_of_a_channel():
    model = prepared()
    before = recorded_ranges(model)
    assert set(range_drift(model, before).values()) == {0.0}
    with torch.no_grad():
        model.stem.weight[2] *= 1.5
    drift = range_drift(model, before)
    assert drift.pop("stem.weight_quantizer") == pytest.approx(0.5, rel=1e-5)
    assert set(drift.values()) == {0.0}
