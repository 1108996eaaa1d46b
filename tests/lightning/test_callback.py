"""QATCallback: what Lightning sees, when, and what survives checkpoints."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from lightning_nets import IMAGES, LABELS, Lit, Spy, callback, fit, loader, make_net, make_trainer, ranges
from lightning_package import callbacks as C
from lightning_package import pl
from ort import open_as_written
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import qat
from qat.core.quantizer import State, WeightQuantizer, is_prepared, quantizers
from qat.lightning.callback import QATCallback
from qat.lightning.targets import prepare_module
from qat.training.batchnorm import freeze_batch_norm, reestimate_batch_norm
from qat.training.nonfinite import first_non_finite

# Insertion


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
def test_every_stage_prepares(stage):
    lit = Lit()
    getattr(make_trainer(callback()), stage)(lit, loader(False))
    assert is_prepared(lit.model)


def test_without_ranges_a_stage_other_than_fit_computes_the_float_model():
    lit = Lit()
    expected = make_trainer().predict(lit, loader(False))
    actual = make_trainer(callback()).predict(lit, loader(False))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_model_is_prepared_before_the_optimizer_exists():
    lit, found = Lit(), []
    lit.configure_optimizers = lambda: found.append(is_prepared(lit)) or torch.optim.SGD(lit.parameters(), 0.1)
    fit(lit, callback())
    assert found == [True]


@pytest.mark.parametrize("learned", [False, True])
def test_optimizer_holds_every_parameter_once(learned):
    lit = Lit()
    before = [id(p) for p in lit.parameters()]
    trainer = fit(lit, callback(qat.QuantConfig(learn_scales=learned)))
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    scales = [id(site.amax) for _, site in quantizers(lit)] if learned else []
    assert sorted(held) == sorted(before + scales)


def test_second_fit_with_the_same_callback_changes_no_site():
    lit, cb = Lit(), callback()
    fit(lit, cb)
    names = [name for name, _ in quantizers(lit)]
    fit(lit, cb)
    assert [name for name, _ in quantizers(lit)] == names


def test_model_made_in_configure_model_is_found():
    class Late(Lit):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if isinstance(self.model, nn.Identity):
                self.model = make_net()

    lit = Late()
    fit(lit, callback())
    assert all(site.has_range for _, site in quantizers(lit.model))


def test_model_made_in_lightning_setup_raises():
    class TooLate(Lit):
        def __init__(self):
            super().__init__(nn.Identity())

        def setup(self, stage):
            self.model = make_net()

    with pytest.raises(qat.QATError, match=r"nothing to quantize.*Conv2d.*setup is too late"):
        fit(TooLate(), callback())


def test_frozen_teacher_and_metric_stay_float():
    lit = Lit()
    lit.teacher = make_net().requires_grad_(False)
    fit(lit, callback())
    assert is_prepared(lit.model)
    assert not is_prepared(lit.teacher)


def test_target_chooses_the_sub_model():
    lit = Lit()
    lit.other = make_net()
    fit(lit, callback(target="model"))
    assert is_prepared(lit.model)
    assert not is_prepared(lit.other)


def test_unknown_target_raises():
    with pytest.raises(qat.QATError, match=r"target='net'.*its children: model, accuracy"):
        fit(Lit(), callback(target="net"))


class Parts(Lit):
    """Layers and sub-models that one forward chains, next to a frozen teacher."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        self.head = nn.Linear(8, 4)
        self.teacher = make_net().requires_grad_(False)

    def forward(self, x):
        return self.head(self.model(x).mean((2, 3)))


def test_parts_that_one_forward_chains_have_one_head():
    lit = Parts()
    fit(lit, callback())
    sites = [name for name, site in quantizers(lit) if isinstance(site, WeightQuantizer)]
    assert sites == ["model.0.weight_quantizer", "model.2.weight_quantizer"]


def test_forward_is_not_needed_when_there_is_one_sub_model():
    class NoForward(Lit):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    lit = NoForward()
    make_trainer(callback()).fit(lit, loader())
    assert lit.model[0].input_quantizer.has_range


def test_nothing_is_left_half_prepared_after_an_error():
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.good = make_net()
            self.bad = nn.Sequential(nn.Linear(4, 4))

    lit = Two()
    with pytest.raises(qat.QATError, match="Nothing to quantize"):
        prepare_module(lit, qat.QuantConfig())
    assert not is_prepared(lit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_bn_epoch": -1}, "freeze_bn_epoch=-1"),
        ({"freeze_ranges_epoch": -2}, "freeze_ranges_epoch=-2"),
        ({"range_lr_factor": 0.0}, "range_lr_factor=0.0"),
        ({"reestimate_bn": 0}, "reestimate_bn=0"),
        ({"log_ranges": "all"}, "log_ranges='all'"),
        ({"export": {"file": "m.onnx"}}, "export: unknown key 'file'"),
        ({"export": {"opset": 19}}, "export: a mapping needs 'path'"),
        ({"calibration": {"batch": 3}}, "calibration: unknown key 'batch'"),
        ({"config": {"add_input": "both"}}, "unknown key 'add_input'"),
    ],
)
def test_invalid_argument_raises_at_once(options, message):
    with pytest.raises(qat.QATError, match=message):
        QATCallback(**options)


# Calibration


def test_ranges_equal_those_of_calibrating_the_model_by_hand():
    by_hand = make_net()
    by_hand.load_state_dict(Lit().model.state_dict())
    qat.prepare(by_hand)
    qat.calibrate(by_hand, [IMAGES[:8], IMAGES[8:16], IMAGES[16:24]], method="max", progress=False)

    lit, found = Lit(), {}
    cb = QATCallback(calibration={"method": "max", "batches": 3, "progress": False}, calibration_data=loader(False))
    fit(lit, cb, Spy("on_train_start", lambda trainer, module: found.update(ranges(module.model))))
    expected = ranges(by_hand)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_order_is_that_of_training_without_the_callback(workers):
    orders = []
    for callbacks in ([], [callback()]):
        lit = Lit()
        make_trainer(*callbacks, epochs=2).fit(lit, loader(num_workers=workers))
        orders.append(lit.seen)
    assert orders[0] == orders[1]


def test_batch_order_is_unchanged_with_a_generator_of_the_loaders_own():
    orders = []
    for callbacks in ([], [callback()]):
        lit = Lit()
        make_trainer(*callbacks).fit(lit, loader(generator=torch.Generator().manual_seed(1)))
        orders.append(lit.seen)
    assert orders[0] == orders[1]


def test_existing_ranges_are_kept():
    lit, found = Lit(), {}
    qat.prepare(lit.model)
    qat.calibrate(lit.model, [10 * IMAGES], progress=False)
    expected = ranges(lit.model)
    fit(lit, callback(), Spy("on_train_start", lambda trainer, module: found.update(ranges(module.model))))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("calibration", "bar", "shown"), [({}, False, False), ({}, True, True), ({"progress": True}, False, True)]
)
def test_calibration_shows_progress_as_the_trainer_does(capsys, calibration, bar, shown):
    fit(Lit(), QATCallback(calibration={"batches": 3, **calibration}), enable_progress_bar=bar)
    assert ("Calibrating" in capsys.readouterr().out) == shown


class Ending(IterableDataset):
    """Promises more than it gives."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(IMAGES)

    def __iter__(self):
        yield from zip(IMAGES[: self.images], LABELS[: self.images], strict=True)


def test_a_loader_that_ends_before_the_batches_that_were_asked_for_is_reported():
    lit = Lit()
    with pytest.warns(UserWarning, match="calibration: the loader ended after 2 of 3 batches"):
        make_trainer(callback()).fit(lit, DataLoader(Ending(16), 8))
    expected = Lit()
    qat.prepare(expected.model)
    qat.calibrate(expected.model, [IMAGES[:8], IMAGES[8:16]], progress=False)
    # The activations': weights have been trained since.
    own = {path: site for path, site in quantizers(expected) if not isinstance(site, WeightQuantizer)}
    assert own
    assert all(torch.equal(ranges(lit)[path], site.amax) for path, site in own.items())


def test_a_loader_without_batches_trains_nothing():
    lit = Lit()
    with pytest.raises(qat.QATError, match=r"no layer of the model was run\. Is the loader empty\?"):
        make_trainer(callback()).fit(lit, DataLoader(Ending(0), 8))
    assert not any(site.has_range for _, site in quantizers(lit))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_activation_ranges_are_frozen_after_calibration(stage):
    lit, found = Lit(), {}
    trainer = fit(lit, callback(), Spy("on_train_start", lambda trainer, module: found.update(ranges(module))), epochs=2)
    getattr(trainer, stage)(lit, loader(False))
    now = {name: site for name, site in quantizers(lit) if not isinstance(site, WeightQuantizer)}
    assert all(torch.equal(site.amax, found[name]) for name, site in now.items())


def test_all_sites_quantize_while_training():
    states = []
    spy = Spy("on_train_batch_end", lambda trainer, module: states.extend(site.state for _, site in quantizers(module)))
    fit(Lit(), callback(), spy)
    assert set(states) == {State.QUANTIZING}


def test_dict_batch_calibrates_through_forward_argument():
    class DictLit(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["picture"], batch["label"]), batch_idx)

    data = [{"picture": IMAGES[i : i + 8], "label": LABELS[i : i + 8]} for i in range(0, 48, 8)]
    lit = DictLit()
    cb = callback(forward=lambda module, batch: module(batch["picture"]))
    make_trainer(cb).fit(lit, DataLoader(data, batch_size=None))
    assert all(site.has_range for _, site in quantizers(lit))


def test_half_precision_training_keeps_float32_ranges():
    dtypes = set()
    spy = Spy("on_train_start", lambda trainer, module: dtypes.update(site.amax.dtype for _, site in quantizers(module)))
    fit(Lit(), callback(), spy, precision="bf16-true")
    assert dtypes == {torch.float32}


# Batch norm


def statistics(model):
    return [b.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for b in (m.running_mean, m.running_var)]


def record_statistics():
    history = []
    return history, Spy("on_train_epoch_end", lambda trainer, module: history.append(statistics(module)))


@pytest.mark.parametrize("first_frozen", [0, 2])
def test_statistics_move_until_the_epoch_and_never_after(first_frozen):
    lit = Lit()
    history, spy = record_statistics()
    history.append(statistics(lit))
    fit(lit, callback(freeze_bn_epoch=first_frozen), spy, epochs=4)
    moved = [any(not torch.equal(a, b) for a, b in zip(old, new, strict=True)) for old, new in pairwise(history)]
    assert moved == [epoch < first_frozen for epoch in range(4)]


def test_statistics_stay_frozen_when_the_module_calls_train():
    class Trains(Lit):
        def on_train_epoch_start(self):
            self.train()

    lit = Trains()
    before = statistics(lit)
    fit(lit, callback(), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(lit), strict=True))


def test_none_never_freezes():
    lit = Lit()
    before = statistics(lit)
    fit(lit, callback(freeze_bn_epoch=None))
    assert not torch.equal(before[0], statistics(lit)[0])


def test_freeze_batch_norm_finds_synchronised_layers():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train())
    assert freeze_batch_norm(model) == ["1"]
    assert not model[1].training


def average_statistics(model, batches):
    """Mean of the batches' means and of their unbiased variances, before each batch-norm layer, in float64."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].detach().double()))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    means = {m: torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0) for m, xs in seen.items()}
    return {m: (means[m], torch.stack([x.var((0, 2, 3)) for x in xs]).mean(0)) for m, xs in seen.items()}


def test_statistics_are_averages_over_the_batches():
    model = make_net().eval()
    batches = [IMAGES[:8], IMAGES[8:16] + 1, 2 * IMAGES[16:24]]
    expected = average_statistics(model, batches)
    model.train()
    model[0].eval()
    assert reestimate_batch_norm(model, lambda m: [m(batch) for batch in batches]) == ["2.bn"]
    for norm, (mean, variance) in expected.items():
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
        assert norm.momentum == 0.1
    assert model[2].bn.training
    assert not model[0].training


def test_statistics_stay_when_showing_fails_or_misses_a_layer():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    model = Sometimes()
    for buffer in model.buffers():
        buffer.add_(3)
    before = [b.clone() for b in model.buffers()]

    def fail(m):
        m(IMAGES)
        raise ValueError("no more data")

    with pytest.raises(ValueError, match="no more data"):
        reestimate_batch_norm(model, fail)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert reestimate_batch_norm(model, lambda m: m(IMAGES)) == ["used"]
    assert all(torch.equal(a, b) for a, b in zip(before[3:], model.idle.buffers(), strict=True))


def test_statistics_are_estimated_anew_before_each_validation():
    found = []

    def look(trainer, module):
        if not trainer.sanity_checking:
            expected = average_statistics(copy.deepcopy(module.model).eval(), [IMAGES[:8], IMAGES[8:16]])
            found.append([(m.running_mean.double() - mean).abs().max().item() for m, (mean, _) in expected.items()])

    lit = Lit()
    trainer = make_trainer(callback(reestimate_bn=2), Spy("on_validation_start", look), epochs=2)
    trainer.fit(lit, loader(False), loader(False))
    assert len(found) == 2
    assert max(value for values in found for value in values) < 1e-6


@pytest.mark.parametrize("workers", [0, 2])
def test_estimating_anew_draws_no_random_numbers(workers):
    orders = []
    for callbacks in ([], [callback(reestimate_bn=2)]):
        lit = Lit()
        make_trainer(*callbacks, epochs=3).fit(lit, loader(num_workers=workers))
        orders.append(lit.seen)
    assert orders[0] == orders[1]


# Export


def test_fit_ends_with_a_file_that_computes_the_same(tmp_path):
    lit = Lit()
    lit.example_input_array = IMAGES[:1]
    fit(lit, callback(export=tmp_path / "m.onnx"))
    assert is_prepared(lit.model)
    session = open_as_written(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        # A code that another order of sums moves is worth 1e-3 here.
        np.testing.assert_allclose(found, lit.model.eval()(IMAGES).numpy(), atol=2e-3)


def test_export_with_arguments(tmp_path):
    fit(Lit(), callback(export={"path": tmp_path / "m.onnx", "opset": 17, "example_inputs": IMAGES[:1]}))
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 17


def test_export_without_inputs_is_refused_before_training():
    lit = Lit()
    with pytest.raises(qat.QATError, match="export: set example_input_array"):
        fit(lit, callback(export="m.onnx"))
    assert lit.seen == []


def test_a_full_disk_leaves_no_file_and_the_trained_model(tmp_path, monkeypatch):
    lit = Lit()
    lit.example_input_array = IMAGES[:1]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(qat.QATError, match=r"m\.onnx: cannot be written: No space left on device"):
        fit(lit, callback(export=tmp_path / "m.onnx"))
    assert list(tmp_path.iterdir()) == []
    assert all(site.has_range for _, site in quantizers(lit))


# Ranges


def weight_ranges(module):
    return {path: site.amax.clone() for path, site in quantizers(module) if isinstance(site, WeightQuantizer)}


@pytest.mark.parametrize("learned", [False, True])
def test_ranges_move_until_the_epoch_and_never_after(learned):
    history = []

    def record(trainer, module):
        module.state_dict()  # refreshes what follows the weights
        history.append(weight_ranges(module))

    lit = Lit()
    cb = callback(qat.QuantConfig(learn_scales=learned), freeze_ranges_epoch=2)
    fit(lit, cb, Spy("on_train_start", record), Spy("on_train_epoch_end", record), epochs=4)
    moved = [any(not torch.equal(old[name], new[name]) for name in old) for old, new in pairwise(history)]
    assert moved == [True, True, False, False]


def test_learned_ranges_have_no_weight_decay():
    class Decayed(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.5)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    lit, found = Decayed(), []

    def look(trainer, module):
        found.append([(g["weight_decay"], round(g["lr"], 6)) for g in trainer.optimizers[0].param_groups])

    fit(lit, callback({"learn_scales": True}, range_lr_factor=10.0), Spy("on_train_epoch_start", look), epochs=3)
    assert found == [[(0.5, 0.01), (0.0, 0.1)], [(0.5, 0.005), (0.0, 0.05)], [(0.5, 0.0025), (0.0, 0.025)]]


@pytest.mark.parametrize("what", ["summary", "sites", None])
def test_logs_of_ranges(what):
    lit = Lit()
    trainer = fit(lit, callback(log_ranges=what), epochs=2)
    found = {name for name in trainer.callback_metrics if name.startswith("qat/")}
    summary = {"qat/clip_rate/max", "qat/clip_rate/mean", "qat/range_drift/max"}
    paths = {path for path, _ in quantizers(lit)}
    sites = {f"qat/{kind}/{path}" for kind in ("clip_rate", "range_drift", "range") for path in paths}
    assert found == {"summary": summary, "sites": summary | sites, None: set()}[what]
    if what == "sites":
        values = [float(trainer.callback_metrics[f"qat/clip_rate/{path}"]) for path in paths]
        assert float(trainer.callback_metrics["qat/clip_rate/max"]) == pytest.approx(max(values))
        # Weights have moved, activations' ranges have not.
        drift = {path: float(trainer.callback_metrics[f"qat/range_drift/{path}"]) for path in paths}
        assert all((value > 0) is path.endswith("weight_quantizer") for path, value in drift.items())


class Noisy(Lit):
    """Draws random numbers in evaluation, too."""

    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("module", [Lit, Noisy])
def test_logging_changes_no_weight(module):
    models = []
    for what in ("sites", None):
        lit = module()
        fit(lit, callback(log_ranges=what), epochs=2)
        models.append(lit.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_learned_ranges_that_no_optimizer_has_are_named():
    class Head(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model[5].parameters(), 0.05)

    with pytest.warns(UserWarning, match=r"no optimizer has the learned ranges of \d+ sites.*model\.0\.input_quantizer"):
        fit(Head(), callback({"learn_scales": True}))


# Checkpoints


def fit_in_order(lit, epochs, ckpt_path=None, learned=False):
    cb = callback({"learn_scales": learned}, freeze_bn_epoch=2, freeze_ranges_epoch=2)
    trainer = make_trainer(cb, epochs=epochs)
    trainer.fit(lit, loader(False), loader(False), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("stop", [1, 3])
def test_resume_is_bit_equal(stop, learned, tmp_path):
    straight, resumed = Lit(), Lit()
    fit_in_order(straight, 4, learned=learned)
    trainer = fit_in_order(Lit(), stop, learned=learned)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit_in_order(resumed, 4, tmp_path / "half.ckpt", learned=learned)
    expected, actual = straight.state_dict(), resumed.state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_test_with_checkpoint_path_restores_the_quantized_model(tmp_path):
    lit = Lit()
    trainer = fit(lit, callback())
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    expected = lit.model.eval()(IMAGES)
    fresh = Lit(make_net())
    make_trainer(callback()).test(fresh, loader(False), ckpt_path=tmp_path / "qat.ckpt", verbose=False)
    assert torch.equal(fresh.model.eval()(IMAGES), expected)


def test_frozen_ranges_stay_frozen_where_a_checkpoint_is_loaded(tmp_path):
    lit = Lit()
    trainer = fit(lit, callback(freeze_ranges_epoch=0), epochs=2)
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    expected = lit.model.eval()(IMAGES)
    fresh = Lit(make_net())
    make_trainer(callback()).test(fresh, loader(False), ckpt_path=tmp_path / "qat.ckpt", verbose=False)
    assert torch.equal(fresh.model.eval()(IMAGES), expected)
    assert torch.equal(qat.load_from_checkpoint(Lit, tmp_path / "qat.ckpt").model.eval()(IMAGES), expected)
    # The frozen ranges are not those that the weights have now, or this test would prove nothing.
    layer = fresh.model[0]
    assert not torch.equal(layer.weight_quantizer.amax, layer.weight.detach().abs().amax((1, 2, 3)))


def test_checkpoint_holds_plain_values_only(tmp_path):
    fit(Lit(), callback(qat.QuantConfig(add_inputs="residual"))).save_checkpoint(tmp_path / "qat.ckpt")
    loaded = torch.load(tmp_path / "qat.ckpt", weights_only=True)
    assert loaded["qat"]["configs"]["model"]["add_inputs"] == "residual"


@pytest.mark.parametrize(
    "change", [{"add_inputs": "none"}, {"weight_range": "frozen"}, {"rules": [{"match": "0", "quantize": False}]}]
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_checkpoint_of_another_config_names_the_key(change, stage, tmp_path):
    fit(Lit(), callback()).save_checkpoint(tmp_path / "qat.ckpt")
    trainer = make_trainer(callback(change), epochs=2)
    with pytest.raises(
        qat.QATError, match=rf"model: the checkpoint was saved with another configuration: {next(iter(change))} "
    ):
        getattr(trainer, stage)(Lit(), loader(False), ckpt_path=tmp_path / "qat.ckpt")


def test_float_checkpoint_says_how_to_start_from_it(tmp_path):
    fit(Lit()).save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(qat.QATError, match=r"checkpoint of the float model\. Load it into the LightningModule before fit"):
        fit(Lit(), callback(), epochs=2, ckpt_path=tmp_path / "float.ckpt")


def test_prepared_model_with_another_config_raises():
    lit = Lit()
    qat.prepare(lit.model, qat.QuantConfig(add_inputs="none"))
    with pytest.raises(qat.QATError, match="model is prepared already, with another add_inputs"):
        fit(lit, callback(qat.QuantConfig()))


# Combination


def test_averaging_listed_before_raises():
    with pytest.raises(qat.QATError, match="list QATCallback before EMAWeightAveraging"):
        fit(Lit(), C.EMAWeightAveraging(), callback())


def test_averaging_listed_after_trains():
    lit = Lit()
    fit(lit, callback(), C.EMAWeightAveraging())
    assert all(site.has_range for _, site in quantizers(lit))


def test_stochastic_weight_averaging_with_frozen_statistics_raises():
    with pytest.raises(qat.QATError, match=r"resets the batch-norm statistics.*freeze_bn_epoch=None"):
        fit(Lit(), callback(), C.StochasticWeightAveraging(0.01))


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "model_parallel"])
def test_sharding_strategies_are_refused(strategy):
    name = {"fsdp": "FSDPStrategy", "deepspeed": "DeepSpeedStrategy", "model_parallel": "ModelParallelStrategy"}[strategy]
    cls = getattr(pl.strategies, name)
    trainer = make_trainer()
    # Constructing one needs its own packages and devices; only its class matters here.
    trainer.strategy.__class__ = type("Fake", (cls,), {})
    with pytest.raises(qat.QATError, match=r"strategy .*not supported.*single device or DDP"):
        callback().setup(trainer, Lit(), "fit")


def test_deep_copy_of_a_trained_module_computes_the_same():
    lit = Lit()
    fit(lit, callback())
    assert torch.equal(copy.deepcopy(lit).eval()(IMAGES), lit.eval()(IMAGES))


# Non-finite losses


def test_nan_in_the_data_names_the_first_site():
    images = IMAGES.clone()
    images[-1] = torch.nan  # the last batch; calibration sees the first three
    data = DataLoader(TensorDataset(images, LABELS), 8)
    with pytest.raises(
        qat.QATError, match=r"loss is nan in epoch 0, first seen by model\.0\.input_quantizer \(NaN in its input\)"
    ):
        make_trainer(callback()).fit(Lit(), data)


class Unmoved(Lit):
    """Weights stay what they are, whatever the gradients."""

    def on_before_optimizer_step(self, optimizer):
        optimizer.zero_grad()


def test_ruined_weight_is_named():
    def ruin(trainer, module):
        with torch.no_grad():
            module.model[2].conv.weight[0] = torch.inf

    with pytest.raises(qat.QATError, match=r"first seen by model\.2\.conv\.weight_quantizer \(infinity in its weight\)"):
        fit(Unmoved(), callback(), Spy("on_train_batch_start", ruin))


def test_loss_function_is_suspected_when_all_sites_are_finite():
    class BadLoss(Unmoved):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(qat.QATError, match="every site saw finite values only"):
        fit(BadLoss(), callback())


def test_training_steps_do_not_read_the_loss():
    # Reading a tensor on the meta device raises, as an unwanted synchronisation would only cost time.
    within = SimpleNamespace(is_last_batch=False, max_steps=-1, global_step=1)
    callback().on_train_batch_end(within, None, {"loss": torch.ones((), device="meta")}, None, 0)


def test_first_non_finite_is_none_for_finite_values():
    net = make_net()
    qat.prepare(net)
    assert first_non_finite(net, lambda model: model(IMAGES)) is None


def test_first_non_finite_names_the_layer_after_an_overflow():
    net = make_net()
    qat.prepare(net)
    with torch.no_grad():
        net[0].bias.fill_(float(np.finfo(np.float32).max))
        net[0].weight.fill_(float(np.finfo(np.float32).max))
    assert first_non_finite(net, lambda model: model(IMAGES.abs())) == "2.conv.input_quantizer (infinity in its input)"
