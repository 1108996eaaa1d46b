"""The tests of this folder with ``pytorch_lightning``, and programs that import both packages, or QATCallback before either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# What touches each part of Lightning that the callback touches. All tests: -m slow.
CHOSEN = [
    "test_package.py",
    "test_callback_ddp.py",
    "test_loading.py::test_the_module_computes_what_the_saved_one_did",
    "test_loading.py::test_model_checkpoint_of_weights_only",
    "test_loading.py::test_a_damaged_checkpoint_is_named_and_nothing_is_loaded",
    "test_loading.py::test_a_checkpoint_of_lightning_cli",
    *(
        f"test_callback_matrix.py::test_{column}[{row}]"
        for row in ("nothing else", "EMAWeightAveraging")
        for column in ("fit", "resume", "test", "load")
    ),
    "test_callback_matrix.py::test_fit[StochasticWeightAveraging]",
    *(f"test_callback_matrix.py::test_finders[{name}-options0]" for name in ("LearningRateFinder", "BatchSizeFinder")),
    "test_callback_matrix.py::test_short_runs[options0]",
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a program of ``package_run.py`` found."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, str(HERE.parent / "helpers" / "package_run.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    def found(name):
        assert (folder / f"{name}.json").exists(), done.stderr[-3000:]
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_program_that_uses_one_package_imports_no_other(package, found):
    assert found(f"uses {package}") == {"known": True, "equal": True, "imported": [package]}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_callback_that_is_imported_before_lightning_works_with_either(package, found):
    expected = {"sites": 2, "ended": True, "known": True, "imported": [package]}
    # Lightning calls a callback's state by its class.
    mine = "imports_the_callback_first.<locals>.Mine"
    assert found(f"before {package}") == {**expected, "names": [mine, mine, "QATCallback"]}


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpoints_of_the_other_package_resume_and_load(package, found):
    results = found("exchanges")
    expected = {"resumes": True, "loads": 2, "knows it": True}
    assert {what: results[f"{package} {what}"] for what in expected} == expected
