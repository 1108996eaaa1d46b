"""Names of before: where modules and functions lived, and where they live now.

Code, pickles and checkpoints that name an old place go on working. An old module is the new one itself, not a copy, so
classes stay one class. Removing an entry breaks users: ``tests/support/test_aliases.py`` says how to do it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Old module: new module, both inside the package.
MODULES = {
    "analysis.report": "analysis.results",
    "batchnorm": "training.batchnorm",
    "calibration.batches": "support.batches",
    "callbacks": "lightning.callback",
    "checkpoints": "training.checkpoints",
    "compatibility": "lightning.compatibility",
    "compiling": "training.compiling",
    "config": "core.config",
    "distillation": "training.distillation",
    "export.check": "graph.check",
    "export.comparison": "verify.onnx_parity",
    "export.graph": "export.pairs",
    "export.halves": "graph.halves",
    "export.opset": "graph.opset",
    "export.precision": "graph.precision",
    "export.reading": "graph.reading",
    "export.report": "verify.differences",
    "export.retype": "graph.retype",
    "export.rules": "graph.rules",
    "export.rules.errors": "graph.rules.errors",
    "export.rules.finding": "graph.rules.finding",
    "export.rules.losses": "graph.rules.losses",
    "export.rules.notes": "graph.rules.notes",
    "export.samples": "graph.samples",
    "export.view": "graph.graph",
    "files": "support.tensor_files",
    "inputs": "support.inputs",
    "kernels": "core.kernels",
    "loading": "lightning.loading",
    "modes": "support.modes",
    "nonfinite": "training.nonfinite",
    "numerics": "core.numerics",
    "oscillation": "training.oscillation",
    "preparation.report": "preparation.placement",
    "quantizer": "core.quantizer",
    "ranges": "training.ranges",
    "recipes.detection_report": "recipes.detection_tables",
    "recipes.report": "recipes.tables",
    "refinement": "posttraining",
    "refinement.bias": "posttraining.bias",
    "refinement.equalization": "posttraining.equalization",
    "refinement.passes": "posttraining.passes",
    "refinement.rounding": "posttraining.rounding",
    "refinement.wiring": "posttraining.wiring",
    "resuming": "lightning.resuming",
    "targets": "lightning.targets",
    "tensorrt.files": "support.files",
    "tensorrt.sites": "graph.wishes",
    "text": "support.text",
    "triton_kernels": "core.triton_kernels",
    "verify.graph": "verify.reference",
    "verify.report": "verify.outcome",
}

# Old place of a name: new place. Packages ask for these in their ``__getattr__``.
NAMES = {
    "export.Finding": "graph.check.Finding",
    "export.ParityReport": "verify.differences.ParityReport",
    "export.Simplification": "graph.simplify.Simplification",
    "export.check_onnx": "graph.check.check_onnx",
    "export.parity": "verify.onnx_parity.parity",
    "export.simplify": "graph.simplify.simplify",
    "tensorrt.Site": "tensorrt.inspection.InspectedNode",
}
_PACKAGE = __name__.partition(".")[0]


def find_name(package: str, name: str) -> Any:
    """The object that ``package`` had under ``name`` before.

    Args:
        package: Full name of the package that is asked, such as ``"qat.export"``.
        name: The attribute.

    Raises:
        AttributeError: If there was no such name.
    """
    place = NAMES.get(f"{package.partition('.')[2]}.{name}")
    if place is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, _, attribute = place.rpartition(".")
    return getattr(import_module(f"{_PACKAGE}.{module}"), attribute)


def names_of(package: str) -> list[str]:
    """The names of before that ``package`` still answers to."""
    prefix = f"{package.partition('.')[2]}."
    return [place.removeprefix(prefix) for place in NAMES if place.startswith(prefix)]


class _Alias(Loader):
    """Hand out the module of another name. Its own spec, name and package stay what they are."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._spec, self._loader = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the old name's spec into it.
        module.__spec__, module.__loader__ = self._spec, self._loader


class AliasFinder(MetaPathFinder):
    """Find the modules of ``MODULES``; nothing else is asked or changed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of an old module, ``None`` for any other name."""
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MODULES:
            return None
        new = f"{_PACKAGE}.{MODULES[name]}"
        found = find_spec(new)
        return ModuleSpec(fullname, _Alias(new), is_package=found is not None and found.submodule_search_locations is not None)


def install() -> None:
    """Let ``import`` find old modules, once.

    The finder comes first: below a package that was renamed, others would load a file a second time.
    """
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
