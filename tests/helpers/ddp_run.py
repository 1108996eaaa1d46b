"""Training runs with QATCallback in one or more processes: ``ddp_run.py FOLDER``, which holds ``cases.json``.

That file has the settings of each case by its name. Each case leaves a folder of its name, with what each process saw: ranges
when training starts, weights and ranges at its end, or the error that it ends with. On a CPU all cases with the same number of
processes run in turn in one start of them. A case that fails, or takes too long, ends that start: a new one goes on behind it.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning_nets import IMAGES, LABELS, Lit
from lightning_package import pl
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import qat
from qat.core.quantizer import quantizers

# Seconds that a case may take in a process; one takes about two on a quiet machine.
PATIENCE = 120


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
    """Writes what a process sees. Last in the list, so that the ranges at the end are those that others leave."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        ranges = {path: site.amax.detach().clone() for path, site in quantizers(pl_module)}
        torch.save(ranges, self.folder / f"ranges-{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"state-{trainer.global_rank}.pt")


def train(folder, settings):
    """One run; the module it trained."""
    settings = dict(settings)
    processes, forked = settings.pop("processes"), settings.pop("forked", False)
    settings.pop("refused", None)
    patience = settings.pop("patience", PATIENCE)
    faulthandler.dump_traceback_later(patience, exit=True)
    pl.seed_everything(0, verbose=False)
    lit = Unused() if settings.pop("unused", False) else Lit()
    rate = settings.pop("rate", None)
    if rate is not None:
        lit.configure_optimizers = lambda: torch.optim.SGD(lit.parameters(), rate)
    accelerator, precision = settings.pop("accelerator", "cpu"), settings.pop("precision", "32-true")
    launch = "ddp_fork" if forked else "ddp"
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
    fails, stops, hangs = (settings.pop(name, False) for name in ("fails", "stops", "hangs"))

    def forward(module, batch):
        if stops and module.global_rank == 1:
            raise RuntimeError("calibration ends on this process, and the other waits")
        if hangs:
            time.sleep(PATIENCE)
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
    trainer.fit(lit)
    faulthandler.cancel_dump_traceback_later()
    return lit


def run(folder, settings, rank):
    """One case in one process: ``done-RANK.json`` holds the refusal that a case expects, or ``None``."""
    folder.mkdir(exist_ok=True)
    refusal = None
    try:
        train(folder, settings)
    except Exception as error:
        if not settings.get("refused"):
            (folder / f"error-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        refusal = f"{type(error).__name__}: {error}"
    (folder / f"done-{rank}.json").write_text(json.dumps(refusal), encoding="utf-8")


def in_turn(rank, folder, cases, processes):
    """One of several processes, which run all cases."""
    torch.set_num_threads(1)
    if processes > 1:
        # Lightning finds a process that is one of several, and their group.
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        meeting = f"file://{folder}/meeting-{next(iter(cases))}"
        torch.distributed.init_process_group("gloo", meeting, world_size=processes, rank=rank)
    for name, settings in cases.items():
        run(folder / name, settings, rank)
    if processes > 1:
        torch.distributed.destroy_process_group()


def start(folder, cases, processes):
    """Run the cases in one start of ``processes`` processes, and in a new one behind each case that ends it."""
    left = list(cases)
    while left:
        run_together(folder, {name: cases[name] for name in left}, processes)
        done = [name for name in left if all((folder / name / f"done-{rank}.json").exists() for rank in range(processes))]
        # Processes behind a case that did not end in all of them were stopped.
        left = left[next((i for i, name in enumerate(left) if name not in done), len(left)) + 1 :]


def run_together(folder, cases, processes):
    """One start of all cases. At the first error in a process, the others are stopped."""
    try:
        multiprocessing.start_processes(in_turn, (folder, cases, processes), processes, start_method="fork")
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        print(error, file=sys.stderr)


def forked(folder, settings):
    """A case whose processes are started by Lightning: what they say, and how many sites have a range here afterwards."""
    folder.mkdir()
    with errors_in(folder / "stderr.txt"):
        lit = train(folder, settings)
    found = sum(site.has_range for _, site in quantizers(lit))
    (folder / "done-0.json").write_text(json.dumps(found), encoding="utf-8")


@contextmanager
def errors_in(path):
    """What this process and its children write to stderr goes into a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def main():
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if any(settings.get("accelerator") == "gpu" for settings in cases.values()):
        # CUDA does not survive a fork: Lightning starts the other processes with the same command, one case at a time.
        ((name, settings),) = cases.items()
        run(folder / name, settings, int(os.environ.get("LOCAL_RANK", "0")))
        return
    together = {name: settings for name, settings in cases.items() if not settings.get("forked")}
    for processes in sorted({settings["processes"] for settings in together.values()}):
        start(folder, {n: s for n, s in together.items() if s["processes"] == processes}, processes)
    # Here, where nothing was trained before: autograd does not survive a fork either where there are GPUs.
    for name, settings in cases.items():
        if settings.get("forked"):
            try:
                forked(folder / name, settings)
            except Exception:
                (folder / name / "error-0.txt").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main()
