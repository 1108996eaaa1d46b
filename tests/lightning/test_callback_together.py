"""QATCallback next to loaders, optimizers, hooks and callbacks that do something of their own."""

import copy
import csv
import re

import pytest
import torch
from lightning_nets import (
    IMAGES,
    LABELS,
    Block,
    Lit,
    Order,
    Spy,
    Whole,
    callback,
    checkpoints,
    fit,
    loader,
    make_net,
    make_trainer,
    outputs,
    ranges,
)
from lightning_package import callbacks as C
from lightning_package import pl
from ort import open_as_written
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat import QATCallback
from qat.core.quantizer import State, quantizers


def states(model):
    return {site.state for _, site in quantizers(model)}


# Data


def make_persistent():
    return DataLoader(TensorDataset(IMAGES, LABELS), 8, num_workers=2, persistent_workers=True)


def make_named():
    return {"a": loader(generator=torch.Generator().manual_seed(1))}


class OwnOrder(torch.utils.data.Sampler):
    """Batches in an order of its own generator."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(2)

    def __iter__(self):
        return iter(torch.randperm(48, generator=self.generator).split(8))

    def __len__(self):
        return 6


def make_batched():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_sampler=OwnOrder())


@pytest.mark.parametrize(
    ("make", "options"),
    [(make_persistent, {}), (make_persistent, {"reestimate_bn": 2}), (make_named, {}), (make_batched, {"reestimate_bn": 2})],
)
def test_training_sees_the_batches_that_it_would_see_without_the_callback(make, options):
    def run_named(module, batch):
        return module(batch["a"][0] if isinstance(batch, dict) else batch[0])

    found = []
    for callbacks in ([], [callback(forward=run_named, **options)]):
        lit = Order()
        make_trainer(*callbacks, epochs=2).fit(lit, make())
        found.append(lit.order)
    assert len(found[0]) == 12
    assert found[0] == found[1]


def test_calibration_data_may_be_a_list_of_batches():
    data = [IMAGES[:8], 3 * IMAGES[8:16]]
    lit, seen = Lit(), {}
    alone = copy.deepcopy(lit.model)
    qat.prepare(alone)
    qat.calibrate(alone, data, progress=False)
    spy = Spy("on_train_start", lambda trainer, module: seen.update(ranges(module.model)))
    fit(lit, QATCallback(calibration={"progress": False}, calibration_data=data), spy)
    assert all(torch.equal(seen[path], value) for path, value in ranges(alone).items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"fast_dev_run": True}, 1), ({"limit_train_batches": 2}, 2), ({"overfit_batches": 3}, 3), ({}, 32)],
)
def test_calibration_takes_no_more_batches_than_an_epoch_is_limited_to(options, expected):
    calls = []

    def run(module, batch):
        calls.append(1)
        return module(batch[0])

    cb = QATCallback(forward=run, calibration={"progress": False}, log_ranges=None)
    make_trainer(cb, **options).fit(Lit(), DataLoader(TensorDataset(IMAGES, LABELS), 1))
    assert len(calls) == expected


def test_given_calibration_data_are_not_cut_to_an_epoch_of_training():
    calls = []
    cb = QATCallback(
        forward=lambda module, batch: calls.append(1) or module(batch), log_ranges=None, calibration={"progress": False},
        calibration_data=(IMAGES[i : i + 2] for i in range(0, 40, 2)),
    )  # fmt: skip
    make_trainer(cb, limit_train_batches=2).fit(Lit(), loader())
    assert len(calls) == 20


def test_training_data_that_can_be_read_once_need_others_to_calibrate_from():
    def stream():
        return iter([(IMAGES[i : i + 8], LABELS[i : i + 8]) for i in range(0, 48, 8)])

    with pytest.raises(qat.QATError, match=r"read only once.*calibration_data="):
        make_trainer(callback()).fit(Lit(), stream())
    lit = Lit()
    make_trainer(callback(calibration_data=[IMAGES])).fit(lit, stream())
    assert len(lit.seen) == 6


@pytest.mark.parametrize("batches", [0, -1, 1.5])
def test_invalid_number_of_calibration_batches(batches):
    with pytest.raises(qat.QATError, match=f"batches={batches}: must be a number from 1"):
        QATCallback(calibration={"batches": batches})


class Transferred(Lit):
    """Makes of a mapping what its steps take, behind the transfer to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch["picture"] - 0.5) * 0.01, batch["label"]


def make_mappings():
    return DataLoader([{"picture": x, "label": y} for x, y in zip(IMAGES, LABELS, strict=True)], 8)


def test_a_batch_goes_through_the_hooks_of_its_transfer_once():
    trainer = make_trainer(callback())
    trainer.fit(Transferred(), make_mappings())
    by_hand = make_trainer(callback())
    by_hand.fit(Lit(), DataLoader(TensorDataset((IMAGES - 0.5) * 0.01, LABELS), 8))
    found, expected = ({k: float(v) for k, v in t.callback_metrics.items() if "clip" in k} for t in (trainer, by_hand))
    assert found == expected
    assert found["qat/clip_rate/max"] > 0


def test_a_model_calibrated_by_hand_trains_on_batches_that_only_its_steps_know(recwarn):
    class Mappings(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch["picture"]), batch["label"])

    lit = Mappings()
    qat.prepare(lit.model)
    qat.calibrate(lit.model, [IMAGES], progress=False)
    trainer = make_trainer(QATCallback())
    trainer.fit(lit, make_mappings())
    assert any("log_ranges: no clip rates" in str(w.message) for w in recwarn)
    assert "qat/range_drift/max" in trainer.callback_metrics


# Several sub-models


class Pair(Lit):
    def __init__(self):
        super().__init__()
        self.second = make_net()

    def forward(self, x):
        return self.model(x) + self.second(x)


def test_only_the_sub_models_without_ranges_are_calibrated():
    lit = Pair()
    qat.prepare(lit.model)
    qat.calibrate(lit.model, [5 * IMAGES], progress=False)
    before, seen = ranges(lit.model), {}
    spy = Spy("on_train_start", lambda trainer, module: seen.update(ranges(module)))
    fit(lit, callback(target=("model", "second")), spy)
    assert states(lit) == {State.QUANTIZING}
    assert all(torch.equal(seen[f"model.{path}"], value) for path, value in before.items())


def test_a_sub_model_that_stays_float_keeps_its_batch_norm():
    lit = Pair()
    fit(lit, callback(target="model", reestimate_bn=2))
    assert lit.second[2].bn.num_batches_tracked == 6  # the steps of an epoch
    assert not torch.equal(lit.second[2].bn.running_mean, torch.zeros(8))


class Head(Lit):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))

    def setup(self, stage):
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.model(x).mean((2, 3)))


def test_a_head_that_is_made_in_lightning_setup_is_refused():
    with pytest.raises(qat.QATError, match=r"head was made in LightningModule\.setup"):
        fit(Head(), callback())


def test_layers_without_a_forward_that_uses_them_are_refused():
    class Loose(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    with pytest.raises(qat.QATError, match=r"layers of its own \(a, b\) and no forward"):
        callback().setup(make_trainer(), Loose(), "fit")


def test_only_the_sub_models_without_ranges_are_calibrated_from_data_that_are_there_once():
    class Three(Pair):
        def __init__(self):
            super().__init__()
            self.third = make_net()

        def forward(self, x):
            return super().forward(x) + self.third(x)

    lit = Three()
    qat.prepare(lit.model)
    qat.calibrate(lit.model, [IMAGES], progress=False)
    fit(lit, callback(target=("model", "second", "third"), calibration_data=iter([IMAGES] * 3)))
    assert states(lit) == {State.QUANTIZING}


def test_a_frozen_network_may_be_made_in_lightning_setup():
    class Judged(Lit):
        def setup(self, stage):
            self.judge = make_net().requires_grad_(False)

    lit = Judged()
    fit(lit, callback())
    assert states(lit) == {State.QUANTIZING}


# Checkpoints


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class WeightStandardized(Lit):
    def __init__(self):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), Block())
        super().__init__(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


@pytest.mark.parametrize(
    ("kind", "options", "weights_only"),
    [
        (Whole, {}, False),
        (WeightStandardized, {"freeze_ranges_epoch": 0}, False),
        (Lit, {"freeze_ranges_epoch": 0}, True),
        (Lit, {}, True),
    ],
)
def test_a_loaded_model_gives_the_outputs_of_the_one_that_was_saved(kind, options, weights_only, tmp_path):
    lit = kind()
    fit(lit, callback(**options), epochs=2).save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    loaded = qat.load_from_checkpoint(kind, tmp_path / "end.ckpt")
    tested = kind()
    make_trainer(callback(**options)).test(tested, loader(False), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert torch.equal(outputs(loaded), outputs(lit))
    assert torch.equal(outputs(tested), outputs(lit))
    # What follows the weights goes on to do so.
    follows = [[getattr(site, "follow", None) for _, site in quantizers(m)] for m in (lit, loaded, tested)]
    assert follows[0] == follows[1] == follows[2]


def test_resuming_with_a_layer_whose_range_cannot_be_frozen(tmp_path):
    straight, resumed = WeightStandardized(), WeightStandardized()
    options = {"freeze_ranges_epoch": 0}
    make_trainer(callback(**options), checkpoints(tmp_path), epochs=3, enable_checkpointing=True).fit(straight, loader(False))
    make_trainer(callback(**options), epochs=3).fit(resumed, loader(False), ckpt_path=tmp_path / "epoch=0.ckpt")
    expected = straight.state_dict()
    assert [name for name, value in resumed.state_dict().items() if not torch.equal(value, expected[name])] == []


def test_changes_of_ranges_are_logged_relative_to_the_first_epoch_after_resuming(tmp_path):
    found = []
    for folder, path in ((tmp_path, None), (tmp_path / "resumed", tmp_path / "epoch=0.ckpt")):
        trainer = make_trainer(callback(), checkpoints(folder), epochs=3, enable_checkpointing=True)
        trainer.fit(Lit(), loader(False), ckpt_path=path)
        found.append(trainer.callback_metrics["qat/range_drift/max"].item())
    assert found[0] == found[1]
    assert found[0] > 0


# Other callbacks


def test_validation_of_an_average_that_starts_late_quantizes(tmp_path):
    calibrated, seen = {}, []
    spy = Spy("on_train_start", lambda trainer, module: calibrated.update(ranges(module)))
    look = Spy("on_validation_batch_start", lambda trainer, module: seen.append(ranges(module)))
    late = C.EMAWeightAveraging(decay=0.9, update_starting_at_step=14)
    trainer = make_trainer(callback(), late, spy, look, checkpoints(tmp_path), epochs=1, enable_checkpointing=True)
    trainer.fit(Lit(), loader(False), loader(False))
    assert all(torch.equal(seen[-1][path], value) for path, value in calibrated.items())
    loaded = qat.load_from_checkpoint(Lit, tmp_path / "epoch=0.ckpt")
    assert states(loaded) == {State.QUANTIZING}


def test_an_average_keeps_frozen_ranges(tmp_path):
    lit = Lit()
    cb = callback(freeze_ranges_epoch=1)
    trainer = fit(lit, cb, C.EMAWeightAveraging(decay=0.9), checkpoints(tmp_path), epochs=3, enable_checkpointing=True)
    loaded = qat.load_from_checkpoint(Lit, tmp_path / "epoch=2.ckpt")
    assert torch.equal(outputs(loaded), outputs(lit))
    assert trainer.current_epoch == 3


def test_averaged_weights_are_exported(tmp_path):
    lit = Lit()
    lit.example_input_array = IMAGES[:1]
    fit(lit, callback(export=tmp_path / "model.onnx"), C.EMAWeightAveraging(decay=0.9), epochs=3)
    session = open_as_written(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(lit.model), rtol=0, atol=1e-6)


class Tuned(Lit):
    def __init__(self):
        super().__init__()
        self.learning_rate, self.batch_size = 0.01, 8

    def train_dataloader(self):
        return DataLoader(loader().dataset, self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    "finder", [lambda: C.LearningRateFinder(num_training_steps=8), lambda: C.BatchSizeFinder(max_trials=1)], ids=["lr", "batch"]
)
def test_a_teacher_is_asked_in_steps_of_training_only(finder, tmp_path):
    lit, asked = Tuned(), []
    lit.configure_optimizers = lambda: torch.optim.SGD(lit.parameters(), lit.learning_rate)
    teacher = make_net()
    teacher.register_forward_hook(lambda *_: asked.append(1))
    trainer = make_trainer(callback(distill_from=teacher), finder(), default_root_dir=tmp_path)
    trainer.fit(lit)
    assert len(asked) == trainer.global_step > 0


class Failing(Lit):
    def training_step(self, batch, batch_idx):
        if getattr(self, "fails", False) and batch_idx == 2:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_a_run_that_failed_leaves_nothing_in_the_module(tmp_path):
    fit(Lit()).save_checkpoint(tmp_path / "float.ckpt")
    lit, asked = Failing(), []
    lit.fails = True
    teacher = make_net()
    teacher.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(lit, callback(distill_from=teacher))
    asked.clear()
    lit.fails = False
    hooks = len(lit.model._forward_hooks)
    fit(lit, callback())
    assert not asked
    assert len(lit.model._forward_hooks) == hooks
    other = Lit()
    with pytest.raises(qat.QATError, match="a checkpoint of the float model"):
        fit(other, callback(), ckpt_path=tmp_path / "float.ckpt")
    # What the message asks for.
    other.load_state_dict(torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"], strict=False)


# Optimization


class ByType(Lit):
    """Gives the optimizer weights and biases by the type of their layer."""

    def configure_optimizers(self):
        decayed, other = [], []
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                decayed.append(module.weight)
                other.append(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                other += [module.weight, module.bias]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0, "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups, 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def decays(trainer, lit):
    names = {id(site.amax): path for path, site in quantizers(lit)}
    groups = trainer.optimizers[0].param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"] if id(p) in names}


def test_ranges_that_no_group_names_learn_without_weight_decay():
    lit, before = ByType(), {}
    spy = Spy("on_train_start", lambda trainer, module: before.update(ranges(module)))
    trainer = fit(lit, callback(learn_scales=True), spy, epochs=2)
    assert decays(trainer, lit) == {path: 0.0 for path, _ in quantizers(lit)}
    assert all(not torch.equal(before[path], value) for path, value in ranges(lit).items())
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(lit.parameters()))


def test_ranges_of_a_frozen_layer_join_no_optimizer():
    class Partly(ByType):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model[2].parameters(), 0.1)

    lit = Partly()
    trainer = fit(lit, callback(learn_scales=True))
    assert {path.split(".")[1] for path in decays(trainer, lit)} == {"2"}


def test_ranges_of_layers_that_another_callback_unfreezes_have_no_weight_decay(tmp_path):
    class Parts(Lit):
        def __init__(self):
            super().__init__()
            self.backbone, self.head, self.model = self.model[:3], self.model[3:], None

        def forward(self, x):
            return self.head(self.backbone(x))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2, weight_decay=0.3)

    lit = Parts()
    unfreeze = C.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    trainer = make_trainer(unfreeze, callback(learn_scales=True), checkpoints(tmp_path), epochs=3, enable_checkpointing=True)
    trainer.fit(lit, loader(False))
    assert decays(trainer, lit) == {path: 0.0 for path, _ in quantizers(lit)}
    # To the bit it does not resume a float model either: the rate that it gives the backbone starts again.
    resumed, unfreeze = Parts(), C.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    trainer = make_trainer(unfreeze, callback(learn_scales=True), epochs=3)
    trainer.fit(resumed, loader(False), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert decays(trainer, resumed) == {path: 0.0 for path, _ in quantizers(resumed)}
    with pytest.raises(qat.QATError, match=r"BackboneFinetuning could not resume.*list it before QATCallback"):
        make_trainer(callback(learn_scales=True), unfreeze).fit(Parts(), loader(False))


class Manual(Lit):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]).sqrt())
        optimizer.step()


def test_manual_optimization():
    lit = Manual()
    fit(lit, callback(learn_scales=True))
    assert states(lit) == {State.QUANTIZING}


@pytest.mark.parametrize("options", [{"distill_from": "float"}, {"dampen_oscillations": 0.1}])
def test_what_is_added_to_the_loss_needs_automatic_optimization(options):
    with pytest.raises(qat.QATError, match="manual_backward itself, add"):
        fit(Manual(), callback(**options))


def test_a_model_in_half_precision_is_exported_in_single(tmp_path):
    lit = Lit()
    lit.example_input_array = IMAGES[:1]
    fit(lit, callback(export=tmp_path / "model.onnx"), precision="bf16-true")
    session = open_as_written(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(copy.deepcopy(lit.model).float()), rtol=0, atol=1e-6)
    assert next(lit.model.parameters()).dtype == torch.bfloat16


def test_a_missing_folder_is_said_before_training(tmp_path):
    lit = Lit()
    lit.example_input_array = IMAGES[:1]
    with pytest.raises(qat.QATError, match=r"is no folder to write model\.onnx into"):
        fit(lit, callback(export=tmp_path / "missing" / "model.onnx"))
    assert not lit.seen


@pytest.mark.parametrize("kind", [pl.plugins.precision.BitsandbytesPrecision, pl.plugins.precision.TransformerEnginePrecision])
def test_precision_plugins_with_layers_of_their_own_are_refused(kind):
    trainer = make_trainer()
    # Without their packages, which must be installed to make one.
    trainer.strategy._precision_plugin = kind.__new__(kind)
    with pytest.raises(qat.QATError, match=f"precision plugin {kind.__name__}: not supported"):
        callback().setup(trainer, Lit(), "fit")


def test_a_whole_module_cannot_learn_from_a_teacher_with_ddp():
    with pytest.raises(qat.QATError, match="prepared as a whole, and DDP calls its training_step"):
        callback(distill_from="float").setup(make_trainer(strategy="ddp"), Whole(), "fit")


# Logs


def test_max_steps_in_the_middle_of_an_epoch_end_it():
    lit = Lit()
    trainer = make_trainer(callback(reestimate_bn=2), max_steps=3)
    trainer.fit(lit, loader(False))
    assert {"qat/clip_rate/max", "qat/clip_rate/mean", "qat/range_drift/max"} <= set(trainer.callback_metrics)
    assert lit.model[2].bn.num_batches_tracked == 2


@pytest.mark.parametrize("kind", ["summary", "sites", None])
def test_what_a_logger_writes(kind, tmp_path):
    lit = Lit()
    trainer = make_trainer(callback(log_ranges=kind), epochs=2, logger=pl.loggers.CSVLogger(tmp_path, name="", version=""))
    trainer.fit(lit, loader(False))
    path = tmp_path / "metrics.csv"
    if kind is None:
        assert not path.exists()
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if any(row[name] for name in row if name.startswith("qat/"))]
    assert len(rows) == 2
    found = {name for row in rows for name in row if name.startswith("qat/")}
    summary = {"qat/clip_rate/max", "qat/clip_rate/mean", "qat/range_drift/max"}
    sites = {f"qat/{of}/{path}" for of in ("range", "clip_rate", "range_drift") for path, _ in quantizers(lit)}
    assert found == (summary if kind == "summary" else summary | sites)
    if kind == "sites":
        for path, amax in ranges(lit).items():
            if re.search("input|quant_add", path):
                assert float(rows[-1][f"qat/range/{path}"]) == pytest.approx(amax.max().item(), rel=1e-6)
