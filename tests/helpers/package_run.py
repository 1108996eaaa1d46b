"""Programs that import Lightning in different orders: ``package_run.py FOLDER``.

Each runs in a process of its own, forked from one that has imported what all of them need, and no Lightning. What it finds is a
JSON file of its name in the folder.
"""

import copy
import json
import os
import pickle
import sys
import traceback
from importlib import import_module
from pathlib import Path

import torch
import torchmetrics  # noqa: F401 - takes long, and both packages import it
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_module(pl):
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    return Lit()


def fit(pl, epochs=1, ckpt_path=None, kind=None):
    made = (kind or qat.QATCallback)({"learn_scales": True})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=made, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = make_module(pl)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, torch.arange(24) % 4), 8), ckpt_path=ckpt_path)
    return trainer, module


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def sites(module):
    return sum(name.endswith("amax") for name in module.state_dict())


def uses(package, folder):
    """A program that uses one package: is the callback one of it, and which are imported?"""
    pl = import_module(package)
    trainer, module = fit(pl)
    trainer.save_checkpoint(folder / f"{package}.ckpt")
    loaded = qat.load_from_checkpoint(type(module), folder / f"{package}.ckpt")
    known = all(isinstance(c, pl.Callback) for c in trainer.callbacks)
    return {"known": known, "equal": same(loaded, module), "imported": [name for name in PACKAGES if name in sys.modules]}


def imports_the_callback_first(package, folder):
    """A program that imports Lightning behind the callback, and has a subclass of it."""
    from qat import QATCallback  # before the package

    class Mine(QATCallback):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            self.ended = True

    pl = import_module(package)
    trainer, module = fit(pl, kind=Mine)
    (mine,) = (c for c in trainer.callbacks if isinstance(c, QATCallback))
    copied, pickled = copy.deepcopy(mine), pickle.loads(pickle.dumps(QATCallback(target="model")))
    return {
        "sites": sites(module),
        "ended": mine.ended and copied.ended,
        "known": all(isinstance(c, pl.Callback) for c in (mine, copied, pickled)),
        "names": [mine.state_key, copied.state_key, pickled.state_key],
        "imported": [name for name in PACKAGES if name in sys.modules],
    }


def exchanges(folder):
    """A program that uses both: do checkpoints of one resume and load in the other?"""
    both = [import_module(name) for name in PACKAGES]
    found = {}
    for here, there in (both, both[::-1]):
        path = folder / "exchanged.ckpt"
        fit(here)[0].save_checkpoint(path)
        found[f"{there.__name__} resumes"] = same(fit(there, 2, path)[1], fit(here, 2)[1])
        found[f"{there.__name__} loads"] = sites(qat.load_from_checkpoint(type(make_module(there)), path))
        found[f"{there.__name__} knows it"] = isinstance(qat.QATCallback(), there.Callback)
    return found


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # Most of what takes long to import.
    qat.calibrate, qat.export_onnx  # noqa: B018
    assert not set(PACKAGES) & set(sys.modules)
    programs = {"exchanges": lambda: exchanges(folder)}
    for package in PACKAGES:
        programs[f"uses {package}"] = lambda package=package: uses(package, folder)
        programs[f"before {package}"] = lambda package=package: imports_the_callback_first(package, folder)
    for name, program in programs.items():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                (folder / f"{name}.json").write_text(json.dumps(program()), encoding="utf-8")
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
