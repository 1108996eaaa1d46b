"""QATCallback with LightningModules that do something of their own with batches, modes, optimizers and files."""

import fractions
from random import Random

import numpy as np
import pytest
import torch
from lightning_nets import (
    IMAGES,
    LABELS,
    Lit,
    Order,
    Spy,
    Whole,
    callback,
    checkpoints,
    fit,
    loader,
    make_trainer,
    outputs,
    ranges,
)
from lightning_package import callbacks as C
from lightning_package import pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat import QATCallback
from qat.core.quantizer import quantizers


class Scaled(Lit):
    """Normalizes its batches before they go to the device."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0.01, batch[1]


class ScaledData(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(False)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0.01, batch[1]


@pytest.mark.parametrize("given", [lambda: (Scaled(), loader(False)), lambda: (Lit(), ScaledData())], ids=["module", "data"])
def test_calibration_sees_batches_as_training_does(given):
    found, (lit, data) = {}, given()
    make_trainer(callback(), Spy("on_train_start", lambda trainer, module: found.update(ranges(module)))).fit(lit, data)
    largest = max(float(images.abs().max()) for images in IMAGES[:24].split(8))
    assert float(found["model.0.input_quantizer"]) <= 0.01 * largest * 1.001


def test_partly_frozen_ranges_come_back(tmp_path):
    class Part(Lit):
        def on_train_start(self):
            qat.ranges.freeze_ranges(self.model[0])

    lit = Part()
    fit(lit, callback(), epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    frozen = {path for path, site in quantizers(lit) if getattr(site, "follow", True) is False}
    assert frozen == {"model.0.weight_quantizer"}
    loaded = qat.load_from_checkpoint(Part, tmp_path / "a.ckpt")
    assert {path for path, site in quantizers(loaded) if getattr(site, "follow", True) is False} == frozen
    assert torch.equal(outputs(loaded), outputs(lit))


def test_ranges_that_moved_in_the_checkpoint_and_are_frozen_here_are_refused(tmp_path):
    lit = Lit()
    fit(lit, callback(freeze_ranges_epoch=2), checkpoints(tmp_path), epochs=3, enable_checkpointing=True)
    with pytest.raises(qat.QATError, match="weight_quantizer: its range is frozen here, and moved when"):
        fit(lit, callback(freeze_ranges_epoch=2), epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    # To test it, it need not train on.
    make_trainer(callback()).test(lit, loader(False), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


def test_a_step_that_moves_frozen_statistics_is_refused():
    class Trains(Lit):
        def training_step(self, batch, batch_idx):
            self.model.train()
            return super().training_step(batch, batch_idx)

    lit = Trains()
    with pytest.raises(qat.QATError, match=r"model\.2\.bn: its statistics are frozen, and training_step put it"):
        fit(lit, callback())
    fit(lit, callback(freeze_bn_epoch=None))
    assert lit.model[2].bn.num_batches_tracked > 0


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS, strict=True)


def test_oscillations_are_dampened_where_the_last_step_is_known():
    with pytest.raises(qat.QATError, match="dampen_oscillations: grows towards the last step"):
        make_trainer(callback(dampen_oscillations=1.0)).fit(Lit(), DataLoader(Endless(), 8))
    make_trainer(callback(dampen_oscillations=1.0), max_steps=4).fit(Lit(), DataLoader(Endless(), 8))


@pytest.mark.parametrize(
    "data", [IMAGES, 5, {"x": IMAGES}, lambda model: None], ids=["tensor", "number", "mapping", "function"]
)
def test_calibration_data_that_are_no_batches_are_refused_at_once(data):
    with pytest.raises(qat.QATError, match="data: is"):
        QATCallback(calibration_data=data)


class Trainable(Lit):
    """Its checkpoints hold what trains, as those of adapters do."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: t for name, t in super().state_dict(*args, **kwargs).items() if name in trained}


def test_checkpoints_without_the_ranges_are_refused(tmp_path):
    fit(Trainable(), callback()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(qat.QATError, match=r"a\.ckpt: holds sites without their ranges. Keep '\*\.amax'"):
        make_trainer(callback()).test(Trainable(), loader(False), ckpt_path=tmp_path / "a.ckpt", verbose=False)


class Pops(Lit):
    """Takes its batch apart."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.pop("x"), batch.pop("y")), batch_idx)


def as_dict(samples):
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def test_logging_ranges_and_naming_a_nan_survive_a_batch_that_is_taken_apart():
    data = loader(False, collate_fn=as_dict)
    given = {"forward": lambda module, batch: module(batch["x"])}
    with pytest.warns(UserWarning, match="log_ranges: no clip rates"):
        make_trainer(callback(**given)).fit(Pops(), data)

    class Broken(Pops):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(qat.QATError, match="the training loss is nan in epoch 0, by which site first is not known"):
        make_trainer(callback(log_ranges=None, **given)).fit(Broken(), data)


@pytest.mark.parametrize("generator", [lambda: np.random.default_rng(0), lambda: np.random.RandomState(0), lambda: Random(0)])
def test_calibration_leaves_the_order_of_samplers_with_generators_of_their_own(generator):
    class Shuffles(torch.utils.data.Sampler):
        def __init__(self):
            self.rng = generator()

        def __iter__(self):
            order = list(range(48))
            self.rng.shuffle(order)
            return iter(order)

        def __len__(self):
            return 48

    orders = []
    for callbacks in ([callback()], []):
        lit = Order()
        make_trainer(*callbacks).fit(lit, DataLoader(TensorDataset(IMAGES, LABELS), 8, sampler=Shuffles()))
        orders.append(lit.order)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_teacher_has_the_precision_of_training(precision):
    lit = Lit()
    fit(lit, callback(distill_from="float"), precision=precision)
    assert all(site.amax.dtype == torch.float32 for _, site in quantizers(lit))


class Permutes(Lit):
    """Takes other inputs than its model."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)

    def forward(self, x):
        return self.model(x.permute(0, 3, 1, 2).float() if x.dtype == torch.uint8 else x)


def test_what_cannot_be_exported_is_said_before_training(tmp_path):
    lit = Permutes()
    with pytest.raises(qat.QATError, match="export: the model cannot be run on example_inputs"):
        fit(lit, callback(export=tmp_path / "m.onnx"))
    assert lit.seen == []
    given = {"path": tmp_path / "m.onnx", "example_inputs": IMAGES[:1]}
    fit(Permutes(), callback(export=given))
    assert (tmp_path / "m.onnx").exists()


def test_a_fast_development_run_leaves_the_exported_file_alone(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"of a long training")
    fit(Lit(), callback(export={"path": path, "example_inputs": IMAGES[:1]}), fast_dev_run=True)
    assert path.read_bytes() == b"of a long training"
    assert list(tmp_path.iterdir()) == [path]


def test_a_check_that_fails_leaves_the_module_as_it_was(tmp_path):
    lit = Lit()
    with pytest.raises(qat.QATError, match="example_input_array"):
        fit(lit, callback(export=tmp_path / "m.onnx"))
    assert not list(quantizers(lit))
    fit(lit, callback(qat.QuantConfig(add_inputs="residual")))


class Named(Lit):
    """Its optimizer has a group with a name, or the names of its parameters."""

    def __init__(self, named_parameters):
        super().__init__()
        self.named = named_parameters

    def configure_optimizers(self):
        if self.named:
            return torch.optim.AdamW(self.named_parameters(), 1e-3)
        return torch.optim.SGD([{"params": list(self.parameters()), "name": "body"}], 0.05)


@pytest.mark.parametrize("named", [False, True])
def test_groups_of_learned_ranges_have_names_of_their_own(named, tmp_path):
    lit = Named(named)
    trainer = fit(lit, callback(learn_scales=True), C.LearningRateMonitor(), logger=pl.loggers.CSVLogger(tmp_path))
    groups = trainer.optimizers[0].param_groups
    if named:
        names = {id(p): name for name, p in lit.named_parameters()}
        assert all(group["param_names"] == [names[id(p)] for p in group["params"]] for group in groups)
    else:
        assert [group["name"] for group in groups] == ["body", "body_ranges"]


def test_learned_ranges_with_an_optimizer_of_one_group():
    lit = Lit()
    lit.configure_optimizers = lambda: torch.optim.LBFGS(lit.parameters(), 0.01, max_iter=2)
    found = {}
    spy = Spy("on_train_start", lambda trainer, module: found.update(ranges(module)))
    make_trainer(callback(learn_scales=True), spy).fit(lit, loader(False))
    assert any(not torch.equal(amax, found[path]) for path, amax in ranges(lit).items())


def test_rates_of_averaging_that_are_fewer_than_the_groups_are_refused():
    averaging = C.StochasticWeightAveraging([0.01])
    with pytest.raises(qat.QATError, match="2 parameter groups"):
        fit(Lit(), callback(learn_scales=True, freeze_bn_epoch=None), averaging, epochs=2)


def test_a_run_without_training_batches_ends_as_lightnings_does():
    lit = Lit()
    make_trainer(callback(), limit_train_batches=0).fit(lit, loader(False))
    assert lit.seen == []


def test_checkpoints_with_objects_are_read_as_the_user_allows(tmp_path):
    class Objects(Lit):
        def __init__(self, share=fractions.Fraction(1, 2)):
            super().__init__()
            self.save_hyperparameters()

    lit = Objects()
    fit(lit, callback(freeze_ranges_epoch=0), epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    again, allowed = Objects(), {"ckpt_path": tmp_path / "a.ckpt", "weights_only": False}
    make_trainer(callback()).test(again, loader(False), verbose=False, **allowed)
    assert torch.equal(outputs(again), outputs(lit))
    with pytest.raises(qat.QATError, match="another configuration: add_inputs"):
        make_trainer(callback(qat.QuantConfig(add_inputs="residual"))).test(Objects(), loader(False), **allowed)


def test_weights_that_a_module_loads_by_itself_are_its_own_affair(tmp_path):
    fit(Lit(), callback()).save_checkpoint(tmp_path / "a.ckpt")
    weights = Lit().state_dict()

    class Pretrained(Lit):
        def setup(self, stage):
            self.load_state_dict(weights, strict=False)

    trainer = make_trainer(callback())
    trainer.test(Lit(), loader(False), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer.fit(Pretrained(), loader(False))


class TwoInputs(Lit):
    def forward(self, x, mask):
        return self.model(x * mask)


def test_a_module_that_takes_more_than_a_batchs_first_element_is_told_of_forward():
    class Steps(TwoInputs):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

    with pytest.raises(
        qat.QATError, match=r"Steps cannot be run on a batch as its first element: .*Pass QATCallback\(forward="
    ):
        make_trainer(callback()).fit(Steps(), loader(False))
    make_trainer(callback(forward=lambda module, batch: module(batch[0], 1.0))).fit(Steps(), loader(False))


def test_learn_scales_alone_leaves_the_other_settings_of_a_prepared_model():
    lit = Lit()
    qat.prepare(lit.model, qat.QuantConfig(learn_scales=True, add_inputs="residual"))
    fit(lit, callback(learn_scales=True))
    with pytest.raises(qat.QATError, match="with another learn_scales"):
        fit(lit, callback(learn_scales=False))


def test_rules_of_a_module_prepared_as_a_whole_are_compared(tmp_path):
    rules = [{"match": "a", "quantize": False}]
    fit(Whole(), callback({"rules": rules})).save_checkpoint(tmp_path / "a.ckpt")
    qat.load_from_checkpoint(Whole, tmp_path / "a.ckpt", config={"rules": rules})
    with pytest.raises(qat.QATError, match=r"config: .* holds its own settings"):
        qat.load_from_checkpoint(Whole, tmp_path / "a.ckpt", config={"rules": [{"match": "b", "quantize": False}]})
