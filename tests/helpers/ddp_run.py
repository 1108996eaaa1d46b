"""One training run with QATCallback in one or more processes: ``ddp_run.py FOLDER PROCESSES SETTINGS``.

Every process writes what it sees: ranges when training starts, weights and ranges at its end. Behind ``fit`` it prints how many
sites have a range.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning_nets import IMAGES, LABELS, Lit
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import qat
from qat.core.quantizer import quantizers


class Spare(nn.Module):
    """A layer that runs and that no loss reaches, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.runs, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        self.runs(x)
        return x


class Unused(Lit):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Spare(), *self.model)


class Look(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        ranges = {path: site.amax.detach().clone() for path, site in quantizers(pl_module)}
        torch.save(ranges, self.folder / f"ranges-{trainer.global_rank}.pt")


def main():
    folder, processes, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    lit = Unused() if settings.pop("unused", False) else Lit()
    rate = settings.pop("rate", None)
    if rate is not None:
        lit.configure_optimizers = lambda: torch.optim.SGD(lit.parameters(), rate)
    accelerator, precision = settings.pop("accelerator", "cpu"), settings.pop("precision", "32-true")
    # CUDA does not survive a fork.
    launch = "ddp_fork" if accelerator == "cpu" else "ddp"
    strategy = settings.pop("strategy", f"{launch}_find_unused_parameters_true") if processes > 1 else "auto"
    options = {"sync_batchnorm": settings.pop("sync_batchnorm", False), "precision": precision, "strategy": strategy}

    def train_dataloader():
        """Three batches, which all processes together see as one does. The sampler that Lightning would put in shuffles."""
        data = TensorDataset(IMAGES, LABELS)
        sampler = DistributedSampler(data, processes, lit.global_rank, shuffle=False)
        return DataLoader(data, 48 // (3 * processes), sampler=sampler)

    lit.train_dataloader = train_dataloader
    if settings.pop("prepared", False):
        qat.prepare(lit.model)
    fails = settings.pop("fails", False)

    def forward(module, batch):
        if fails and module.global_rank == 1 and module.trainer.global_step:
            raise RuntimeError("not on this process")
        return module(batch[0])

    callbacks = [Look(folder)]
    if settings.pop("quantized", True):
        given = {
            "learn_scales": settings.pop("learn_scales", False),
            "freeze_bn_epoch": 0 if settings.pop("frozen", False) else None,
            "freeze_ranges_epoch": settings.pop("freeze_ranges_epoch", None),
            "calibration": {"batches": 3, "progress": False, **settings},
        }
        callbacks.insert(0, qat.QATCallback(target="model", forward=forward, **given))
    trainer = pl.Trainer(
        accelerator=accelerator, devices=processes, max_epochs=2, callbacks=callbacks, **options,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip

    class Save(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.state_dict(), folder / f"state-{trainer.global_rank}.pt")

    trainer.callbacks.append(Save())
    trainer.fit(lit)
    print(sum(site.has_range for _, site in quantizers(lit)))


if __name__ == "__main__":
    main()
