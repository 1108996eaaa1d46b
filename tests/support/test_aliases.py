"""Names of before still answer, with the very objects of today.

Removing an alias breaks users' code and pickles: deprecate it in one release, remove it in the
next, and say so in CHANGELOG.md.
"""

import pickle
import subprocess
import sys
from importlib import import_module

import pytest

import qat
from qat.support import aliases

# Where version 0.1 had them. This list only grows.
MODULES = {
    *("batchnorm", "callbacks", "checkpoints", "compatibility", "compiling", "config", "distillation", "files", "inputs"),
    *("kernels", "loading", "modes", "nonfinite", "numerics", "oscillation", "quantizer", "ranges", "refinement"),
    *("resuming", "targets", "text", "triton_kernels", "analysis.report", "calibration.batches", "export.check"),
    *("export.comparison", "export.graph", "export.halves", "export.opset", "export.precision", "export.reading"),
    *("export.report", "export.retype", "export.rules", "export.samples", "export.view"),
    *("preparation.report", "recipes.report", "refinement.bias", "refinement.equalization", "refinement.passes"),
    *("refinement.rounding", "refinement.wiring", "tensorrt.files", "tensorrt.sites", "verify.graph", "verify.report"),
}
NAMES = {
    *("export.Finding", "export.ParityReport", "export.Simplification", "export.check_onnx", "export.parity"),
    *("export.simplify", "tensorrt.Site"),
}


def test_no_alias_of_before_is_gone():
    assert set(aliases.MODULES) >= MODULES
    assert set(aliases.NAMES) >= NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_old_module_is_the_new_one(old):
    new = import_module(f"qat.{aliases.MODULES[old]}")
    assert import_module(f"qat.{old}") is new
    assert new.__name__ == new.__spec__.name == f"qat.{aliases.MODULES[old]}"


@pytest.mark.parametrize("old", sorted(NAMES))
def test_old_name_is_the_new_object(old):
    package, _, name = old.rpartition(".")
    module, _, attribute = aliases.NAMES[old].rpartition(".")
    assert getattr(import_module(f"qat.{package}"), name) is getattr(import_module(f"qat.{module}"), attribute)
    assert name in dir(import_module(f"qat.{package}"))


@pytest.mark.parametrize("statement", ["import qat.ranges as m", "from qat import ranges as m", "import qat; m = qat.ranges"])
def test_every_form_of_import_finds_an_old_module(statement):
    code = f"{statement}; import qat.training.ranges as new; assert m is new; print(m.freeze_ranges.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "qat.training.ranges\n", done.stderr


def test_files_of_renamed_packages_are_loaded_once():
    code = "import qat.refinement.bias as old, qat.posttraining.bias as new; assert old is new"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pickles_that_name_old_places_load():
    pickled = pickle.dumps(qat.QuantConfig(), protocol=0)
    assert b"cqat.core.config\n" in pickled
    assert pickle.loads(pickled.replace(b"cqat.core.config\n", b"cqat.config\n")) == qat.QuantConfig()


def test_names_that_never_were_are_refused():
    with pytest.raises(AttributeError, match=r"module 'qat\.export' has no attribute 'nothing'"):
        qat.export.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"qat\.nothing"):
        import_module("qat.nothing")
