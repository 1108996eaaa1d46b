"""QATCallback is a callback of the Lightning that the program uses: the one that tests run with."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning_nets import IMAGES, Lit, callback, checkpoints, fit, loader, make_net, make_trainer
from lightning_package import NAME, OTHER, part, pl
from torch import nn

import qat
from qat.callbacks import QATCallback
from qat.core.quantizer import is_prepared, quantizers
from qat.lightning.package import lightning_of
from qat.lightning.resuming import IntactCheckpointIO


class Counting(qat.QATCallback):
    """A user's own, with hooks that the callback has and hooks that only Lightning has."""

    def __init__(self, *args, start: int = 0, **options):
        super().__init__(*args, **options)
        self.count = start

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.count += 1

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Sequence(pl.LightningModule):
    """A model with annotated arguments, for a command line."""

    def __init__(self, rate: float = 0.05):
        super().__init__()
        self.rate = rate
        self.model = make_net()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def test_nothing_imports_the_other_package(tmp_path):
    lit = Lit()
    fit(lit, callback(), checkpoints(tmp_path), enable_checkpointing=True)
    assert sys.modules.get(OTHER.partition(".")[0]) is None


def test_it_is_a_callback_of_the_package():
    assert issubclass(qat.QATCallback, pl.Callback)
    assert QATCallback is qat.QATCallback
    assert callback().state_key == "QATCallback"


def test_alone_it_needs_no_list():
    lit = Lit()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    pl.Trainer(callbacks=callback(), accelerator="cpu", devices=1, fast_dev_run=True, **options).fit(lit, loader())
    assert is_prepared(lit.model)


def test_a_subclass_trains_and_keeps_its_state_in_checkpoints(tmp_path):
    lit, mine = Lit(), Counting(calibration={"batches": 3, "progress": False})
    fit(lit, mine, checkpoints(tmp_path), epochs=2, enable_checkpointing=True)
    assert mine.count == 12
    resumed, again = Counting(calibration={"batches": 3, "progress": False}), Lit()
    fit(again, resumed, epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.count == 12
    assert isinstance(mine, pl.Callback)
    assert mine.state_key == "Counting"


@pytest.mark.parametrize("kind", [qat.QATCallback, Counting])
def test_it_can_be_copied_and_pickled(kind):
    made = kind({"learn_scales": True}, target="model", freeze_ranges_epoch=3)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is kind
        assert vars(twin) == vars(made)


@pytest.mark.parametrize("path", ["qat.QATCallback", "qat.callbacks.QATCallback", f"{__name__}.Counting"])
def test_lightning_cli_builds_it(path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    arguments = [f"--trainer.callbacks={path}", "--trainer.callbacks.target=model", "--trainer.callbacks.log_ranges=null"]
    cli = part("cli").LightningCLI(Sequence, args=arguments, run=False, save_config_callback=None)
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, qat.QATCallback)]
    assert (made.target, made.log_ranges) == (("model",), None)


def test_stages_validate_test_and_predict_after_training():
    lit = Lit()
    trainer = make_trainer(callback())
    trainer.fit(lit, loader(), loader(False))
    expected = lit.eval()(IMAGES)
    assert "val" in trainer.validate(lit, loader(False), verbose=False)[0]
    assert "test" in trainer.test(lit, loader(False), verbose=False)[0]
    assert torch.equal(torch.cat(trainer.predict(lit, loader(False))), expected)
    assert all(site.has_range for _, site in quantizers(lit))


def test_the_package_of_a_trainer_of_a_module_and_of_a_class():
    assert lightning_of(make_trainer()) is lightning_of(Lit()) is lightning_of(Lit) is sys.modules[NAME]


def test_what_belongs_to_no_lightning_is_refused():
    with pytest.raises(qat.QATError, match=r"SimpleNamespace: neither from lightning\.pytorch nor from pytorch_lightning"):
        lightning_of(SimpleNamespace())


def test_reading_checkpoints_by_name_can_be_copied_and_pickled(tmp_path):
    plugin = IntactCheckpointIO(pl.plugins.io.TorchCheckpointIO())
    for twin in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        twin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
        assert twin.load_checkpoint(tmp_path / "x.ckpt") == {"a": 1}
        twin.remove_checkpoint(tmp_path / "x.ckpt")
        assert not (tmp_path / "x.ckpt").exists()
        twin.teardown()
