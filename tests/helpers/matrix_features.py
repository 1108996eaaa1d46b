"""What works together with the callback: one run each, the rows of the matrix."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_nets import Lit, callback, loader, make_net, make_trainer
from lightning_package import callbacks as C
from torch import nn

from qat.lightning.targets import prepare_module

EPOCHS = 3


class Late(Lit):
    """Its model is made in configure_model."""

    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.model, nn.Identity):
            torch.manual_seed(0)
            self.model = make_net()


class Several(Lit):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.second = make_net()

    def forward(self, x):
        return self.model(x) + self.second(x)


class Compiled(Lit):
    """Calls its model through torch.compile, which shares parameters and sites with it."""

    def __init__(self):
        super().__init__()
        self.calls = [torch.compile(self.model, backend="aot_eager")]

    def forward(self, x):
        return self.calls[0](x)


class Keywords(Lit):
    """Its forward takes several arguments."""

    def forward(self, x, *, gain):
        return self.model(x) * gain

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].tolist())
        return nn.functional.cross_entropy(self(batch[0], gain=2.0), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0], gain=2.0), batch[1]))

    test_step = validation_step


class Manual(Lit):
    """Steps its optimizer itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]))
        optimizer.step()


class ByName(Lit):
    """Its optimizer is given the parameters that the float model has."""

    def configure_optimizers(self):
        float_ones = [p for name, p in self.named_parameters() if not name.endswith("amax")]
        return torch.optim.AdamW(float_ones, 0.01, weight_decay=0.05)


@dataclass(frozen=True)
class Feature:
    """What is added to a Trainer with a QATCallback."""

    module: type = Lit
    callbacks: Any = tuple
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def fit(self, folder):
        """A run without interruption, which leaves checkpoints of each epoch and of its end; returns the module."""
        module = self.module()
        keep = C.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = self._trainer(keep, enable_checkpointing=True)
        trainer.fit(module, loader(False, **self.data), loader(False))
        trainer.save_checkpoint(folder / "end.ckpt")
        return module

    def resume(self, folder):
        """The module of a run that goes on behind the first epoch."""
        module = self.module()
        self._trainer().fit(module, loader(False, **self.data), loader(False), ckpt_path=folder / "epoch=0.ckpt")
        return module

    def test(self, folder):
        """A module that ``trainer.test`` loaded the end of the run into."""
        module = self.module()
        trainer = make_trainer(callback(**self.callback), **self.trainer)
        trainer.test(module, loader(False), ckpt_path=folder / "end.ckpt", verbose=False)
        return module

    def _trainer(self, *more, **options):
        return make_trainer(callback(**self.callback), *self.callbacks(), *more, epochs=EPOCHS, **{**self.trainer, **options})


class Distributed(Feature):
    """The same in two processes, in which ``matrix_run.py`` has called :meth:`run_here` before."""

    def fit(self, folder):
        said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
        assert (folder / "test-1.pt").exists(), f"did not end\n{said[-3000:]}"
        return self._module("fit", folder)

    def resume(self, folder):
        return self._module("resume", folder)

    def test(self, folder):
        return self._module("test", folder)

    def _module(self, method, folder):
        """With the state that all processes had at the end of ``method``."""
        states = [torch.load(folder / f"{method}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
        assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == [], "processes differ"
        module = self.module()
        prepare_module(module, callback(**self.callback).config)
        module.load_state_dict(states[0])
        return module

    def run_here(self, folder):
        """The states of the modules of each method, in one of the processes."""
        here = replace(Feature(**vars(self)), trainer={"strategy": "ddp", **self.trainer, "devices": PROCESSES})
        return {method: getattr(here, method)(folder).state_dict() for method in ("fit", "resume", "test")}


def run_distributed(folder):
    """Run the rows in two processes, all in one start of them, and in a new one behind a row that fails."""
    left = [name for name, feature in FEATURES.items() if isinstance(feature, Distributed)]
    while left:
        for name in left:
            (folder / name).mkdir(exist_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("matrix_run.py")), str(folder), *left]
        with (folder / "said.txt").open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(600)
            # With the process that Lightning started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = [all((folder / name / f"test-{rank}.pt").exists() for rank in range(PROCESSES)) for name in left]
        reached = left[: [*done, False].index(False) + 1]
        for name in reached:
            shutil.copy(folder / "said.txt", folder / name)
        left = left[len(reached) :]


PROCESSES = 2
FEATURES = {
    "nothing else": Feature(),
    "learned scales": Feature(callback={"learn_scales": True}),
    "frozen ranges": Feature(callback={"freeze_ranges_epoch": 1}),
    "re-estimated batch norm": Feature(callback={"reestimate_bn": 2}),
    "distillation": Feature(callback={"distill_from": "float"}),
    "EMAWeightAveraging": Feature(callbacks=lambda: [C.EMAWeightAveraging(decay=0.5)]),
    "EMAWeightAveraging that starts late": Feature(
        callbacks=lambda: [C.EMAWeightAveraging(decay=0.5, update_starting_at_step=14)]
    ),
    "StochasticWeightAveraging": Feature(
        callbacks=lambda: [C.StochasticWeightAveraging(0.01, swa_epoch_start=1)], callback={"freeze_bn_epoch": None}
    ),
    "EarlyStopping": Feature(callbacks=lambda: [C.EarlyStopping("val", patience=5)]),
    "Timer": Feature(callbacks=lambda: [C.Timer()]),
    "accumulate_grad_batches": Feature(trainer={"accumulate_grad_batches": 2}),
    "gradient clipping by norm": Feature(trainer={"gradient_clip_val": 0.1}),
    "gradient clipping by value": Feature(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "16-mixed": Feature(trainer={"precision": "16-mixed"}),
    "bf16-mixed": Feature(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Feature(trainer={"precision": "bf16-true"}),
    "overfit_batches": Feature(trainer={"overfit_batches": 2}),
    "no validation before training": Feature(trainer={"num_sanity_val_steps": 0}),
    "validation twice an epoch": Feature(trainer={"val_check_interval": 0.5}),
    "configure_model": Feature(module=Late),
    "several sub-models": Feature(module=Several),
    "torch.compile": Feature(module=Compiled),
    "manual optimization": Feature(module=Manual),
    "an optimizer that is given no ranges": Feature(module=ByName, callback={"learn_scales": True}),
    "persistent workers": Feature(data={"num_workers": 2, "persistent_workers": True}),
    "forward with keywords": Feature(module=Keywords, callback={"forward": lambda module, batch: module(batch[0], gain=2.0)}),
    "DDP": Distributed(),
    "DDP, learned scales that freeze": Distributed(
        trainer={"strategy": "ddp_find_unused_parameters_true"}, callback={"learn_scales": True, "freeze_ranges_epoch": 1}
    ),
    "DDP, EMA, EarlyStopping, accumulation, clipping, bf16-mixed": Distributed(
        callbacks=lambda: [C.EMAWeightAveraging(decay=0.5), C.EarlyStopping("val", patience=5)],
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ),
}
