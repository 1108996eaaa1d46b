"""The tests of this folder with ``pytorch_lightning``, and programs that import both packages, or QATCallback before either."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# What touches each part of Lightning that the callback touches. All tests: -m slow.
CHOSEN = [
    "test_package.py",
    "test_callback_ddp.py",
    "test_loading.py",
    *(
        f"test_callback_matrix.py::test_{column}[{row}]"
        for row in ("nothing else", "frozen ranges", "EMAWeightAveraging", "StochasticWeightAveraging", "bf16-true")
        for column in ("fit", "resume", "test", "load")
    ),
    *(f"test_callback_matrix.py::test_finders[{name}-options0]" for name in ("LearningRateFinder", "BatchSizeFinder")),
    "test_callback_matrix.py::test_short_runs",
    "test_callback.py::test_sharding_strategies_are_refused",
]


def suite(package, *tests, timeout, options=()):
    """Run tests with a package, where the other cannot be imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *tests]
    environment = {**os.environ, "QAT_TEST_LIGHTNING": package}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, cwd=HERE.parents[1], env=environment
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_chosen_tests_pass_with_pytorch_lightning():
    said = suite("pytorch_lightning", *(str(HERE / name) for name in CHOSEN), timeout=900)
    assert " passed" in said


@pytest.mark.slow
def test_all_tests_pass_with_pytorch_lightning():
    said = suite("pytorch_lightning", str(HERE), timeout=7200, options=["--ignore", __file__])
    assert " passed" in said


def run(program):
    """Run a program; what it prints at its end."""
    path = os.pathsep.join([str(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_program_that_uses_one_package_imports_no_other(package):
    found = run(f"""
        import sys, {package} as pl, qat
        trainer = pl.Trainer(accelerator="cpu", callbacks=[qat.QATCallback()], logger=False)
        assert any(isinstance(c, qat.QATCallback) and isinstance(c, pl.Callback) for c in trainer.callbacks)
        qat.load_from_checkpoint
        print(sorted(name for name in {PACKAGES} if name in sys.modules))
    """)
    assert found == f"['{package}']"


TRAINING = """
    import sys
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(24) % 4), 8)

    def module(pl):
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

    def fit(pl, epochs, ckpt_path=None):
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[QATCallback({"learn_scales": True})], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        lit = module(pl)
        trainer.fit(lit, data, ckpt_path=ckpt_path)
        return trainer, lit
"""


def test_checkpoints_of_one_package_resume_and_load_in_the_other(tmp_path):
    program = f"""
    import lightning.pytorch
    import pytorch_lightning
    from qat import QATCallback, load_from_checkpoint
    {TRAINING}
    both = lightning.pytorch, pytorch_lightning
    for here, there in (both, both[::-1]):
        assert isinstance(QATCallback(), here.Callback)
        fit(here, 1)[0].save_checkpoint({str(tmp_path / "x.ckpt")!r})
        _, resumed = fit(there, 2, {str(tmp_path / "x.ckpt")!r})
        _, expected = fit(here, 2)
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in expected.state_dict().items())
        loaded = load_from_checkpoint(type(module(there)), {str(tmp_path / "x.ckpt")!r})
        assert any(name.endswith("amax") for name in loaded.state_dict())
    print("equal")
    """
    assert run(program) == "equal"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_callback_that_is_imported_before_lightning_works_with_either(package):
    program = f"""
    from qat import QATCallback
    import {package} as pl
    {TRAINING}
    trainer, lit = fit(pl, 1)
    print(sum(name.endswith("amax") for name in lit.state_dict()))
    """
    assert run(program) == "4"
