"""Trains in child processes that are killed at random points and resume: ``kill_run.py FOLDER KILLS SEED``.

Prints one JSON line: kills by what the child was doing, finished runs, and what differs from an uninterrupted run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from lightning_nets import IMAGES, LABELS, Lit
from lightning_package import callbacks as C
from lightning_package import pl
from torch.utils.data import DataLoader, TensorDataset

import qat

EPOCHS = 4


class Announced(pl.plugins.io.TorchCheckpointIO):
    """Tells when a checkpoint is being written."""

    def __init__(self, tell):
        self.tell = tell

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.tell("saving")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.tell("saved")


class Told(pl.Callback):
    def __init__(self, tell):
        self.tell = tell

    def on_train_batch_end(self, *_):
        self.tell("step")

    def on_validation_batch_end(self, *_):
        self.tell("validation")


class History(Lit):
    """Keeps its validation losses in its checkpoints."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_epoch_end(self):
        self.losses.append(float(self.trainer.callback_metrics["val"]))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint):
        self.losses = list(checkpoint["losses"])


def train(folder, tell):
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    lit = History()
    data = DataLoader(TensorDataset(IMAGES, LABELS), 8)

    def forward(module, batch):
        tell("calibration")
        module(batch[0])

    callbacks = [
        qat.QATCallback({"learn_scales": True}, calibration={"progress": False}, forward=forward, freeze_ranges_epoch=2),
        Told(tell),
        # After the validation of each epoch, so that its loss is in the checkpoint of that epoch.
        C.ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
    ]
    last = Path(folder) / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, plugins=[Announced(tell)], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lit, data, data, ckpt_path=last if last.exists() else None)
    torch.save({"state": lit.state_dict(), "losses": lit.losses}, Path(folder) / "final.part")
    (Path(folder) / "final.part").rename(Path(folder) / "final.pt")


def child(folder, out):
    """What runs in the forked process: every event is a line in the pipe."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    train(folder, lambda event: os.write(out, f"{event}\n".encode()))


def spawn(folder):
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(into)
        status = 1
        try:
            child(folder, out)
            status = 0
        finally:
            os._exit(status)
    os.close(out)
    return pid, os.fdopen(into)


def main():
    folder, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    (folder / "straight").mkdir()
    pid, lines = spawn(folder / "straight")
    events = sum(1 for _ in lines)
    assert os.waitpid(pid, 0)[1] == 0
    expected = torch.load(folder / "straight" / "final.pt", weights_only=True)
    kills, finished, differing = {}, 0, []
    while sum(kills.values()) < wanted or finished == 0:
        run = folder / f"run{finished}"
        run.mkdir(exist_ok=True)
        pid, lines = spawn(run)
        after, doing = chance.randint(1, max(events // 2, 1)), "start"
        if sum(kills.values()) < wanted:
            for count, line in enumerate(lines, 1):
                doing = line.strip()
                if count == after:
                    time.sleep(chance.uniform(0, 0.004))
                    os.kill(pid, signal.SIGKILL)
                    break
        for _ in lines:
            pass
        status = os.waitpid(pid, 0)[1]
        lines.close()
        if os.WIFSIGNALED(status):
            kills[doing] = kills.get(doing, 0) + 1
            continue
        assert status == 0, "a resumed run failed"
        finished += 1
        found = torch.load(run / "final.pt", weights_only=True)
        differing += [name for name, value in expected["state"].items() if not torch.equal(value, found["state"][name])]
        differing += ["losses"] if found["losses"] != expected["losses"] else []
    print(json.dumps({"kills": kills, "finished": finished, "differing": differing, "losses": expected["losses"]}))


if __name__ == "__main__":
    main()
