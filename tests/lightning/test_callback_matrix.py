"""QATCallback together with what else a Trainer does: fit, resume, test and load, for each feature.

``python tests/test_callback_matrix.py`` runs them and prints the table of docs/lightning.md.
"""

import copy
from pathlib import Path

import pytest
import torch
from lightning_nets import IMAGES, Lit, callback, loader, make_trainer
from lightning_package import callbacks as C
from matrix_features import FEATURES, Distributed, Late, run_distributed

import qat
from qat.core.quantizer import State, quantizers


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """The folder with a folder of each row that runs in several processes."""
    folder = tmp_path_factory.mktemp("distributed")
    run_distributed(folder)
    return folder


@pytest.fixture(scope="module", params=FEATURES)
def case(request, tmp_path_factory):
    """The feature, a run without interruption, and the folder of its checkpoints."""
    feature = FEATURES[request.param]
    if isinstance(feature, Distributed):
        folder = request.getfixturevalue("distributed") / request.param
    else:
        folder = tmp_path_factory.mktemp("matrix")
    return feature, feature.fit(folder), folder


def outputs(module):
    with torch.no_grad():
        return copy.deepcopy(module.model).float().eval()(IMAGES)


def test_fit(case):
    _, straight, _ = case
    sites = list(quantizers(straight))
    assert sites
    assert {site.state for _, site in sites} == {State.QUANTIZING}
    assert {site.amax.dtype for _, site in sites} == {torch.float32}
    assert all(p.isfinite().all() for p in straight.parameters())
    fresh = type(straight)()
    if isinstance(fresh, Late):
        fresh.configure_model()
    moved = [n for n, p in fresh.named_parameters() if not torch.equal(p, dict(straight.named_parameters())[n].float())]
    assert moved, "nothing was trained"


def test_resume(case):
    feature, straight, folder = case
    expected, found = straight.state_dict(), feature.resume(folder).state_dict()
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_test(case):
    feature, straight, folder = case
    assert torch.equal(outputs(feature.test(folder)), outputs(straight))


def test_load(case):
    feature, straight, folder = case
    loaded = qat.load_from_checkpoint(feature.module, folder / "end.ckpt")
    if "precision" in feature.trainer and feature.trainer["precision"] == "bf16-true":
        loaded = loaded.bfloat16()
    assert torch.equal(outputs(loaded), outputs(straight))


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 2}, {"max_steps": 3}])
def test_short_runs(options):
    lit = Lit()
    make_trainer(callback(), **options).fit(lit, loader(), loader(False))
    assert all(site.has_range for _, site in quantizers(lit))


class Found(Lit):
    """With what the finders of learning rate and batch size look for."""

    def __init__(self):
        super().__init__()
        self.learning_rate, self.batch_size = 0.01, 4

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader().dataset, self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


FINDERS = {
    "LearningRateFinder": lambda: C.LearningRateFinder(num_training_steps=8),
    "BatchSizeFinder": lambda: C.BatchSizeFinder(max_trials=2),
}


@pytest.mark.parametrize("options", [{}, {"distill_from": "float"}])
@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_finders(finder, options, tmp_path):
    lit = Found()
    trainer = make_trainer(callback(**options), finder(), default_root_dir=tmp_path, epochs=1)
    trainer.fit(lit)
    assert {site.state for _, site in quantizers(lit)} == {State.QUANTIZING}


def test_the_table_in_the_documentation_has_these_rows():
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")
    rows = text.split("| with | fit |")[1].split("\n\n")[0].splitlines()[2:]
    assert rows == [f"| {name} | {' | '.join(['passed'] * len(COLUMNS))} |" for name in FEATURES]


COLUMNS = ("fit", "resume", "test", "load")


class Outcomes:
    """Collects what became of each test of the matrix."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.found[report.nodeid.split("::")[1]] = report.outcome

    def table(self):
        rows = [f"| with | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name in FEATURES:
            outcomes = [self.found.get(f"test_{column}[{name}]", "not run") for column in COLUMNS]
            rows.append(f"| {name} | {' | '.join(outcomes)} |")
        return "\n".join(rows)


if __name__ == "__main__":
    outcomes = Outcomes()
    pytest.main(["-q", __file__], plugins=[outcomes])
    print(outcomes.table())
