"""Which TensorRT is installed, and what that version can do.

Capabilities are read from the names that a version's Python module has, never from version numbers or integer values:
flags of the same name have other values in every major version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import QATError

MODULES = ("tensorrt", "tensorrt_rtx")
_EXTRAS = {"tensorrt": "pip install -e '.[tensorrt]'", "tensorrt_rtx": "pip install -e '.[rtx]'"}


@dataclass(frozen=True)
class Runtime:
    """An installed TensorRT.

    Attributes:
        module: Its Python module.
    """

    module: ModuleType = field(repr=False)

    @property
    def name(self) -> str:
        """``"tensorrt"`` or ``"tensorrt_rtx"``."""
        return self.module.__name__

    @property
    def version(self) -> tuple[int, ...]:
        """Major, minor, patch and so on."""
        return tuple(int(number) for number in re.findall(r"\d+", self.module.__version__))

    @property
    def title(self) -> str:
        """Name and version for messages, such as ``TensorRT 8.6.1``."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.module.__version__}"

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which compiles ahead for named targets and needs no GPU to build."""
        return self.name == "tensorrt_rtx"

    @property
    def weak_typing(self) -> bool:
        """Whether precisions are builder flags (8.6 and 10), not only what the graph says."""
        return self.has("BuilderFlag", "FP16")

    @property
    def strong_typing(self) -> bool:
        """Whether a network may be, or always is, typed by its graph."""
        return not self.weak_typing or self.has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")

    @property
    def calibrators(self) -> bool:
        """Whether TensorRT brings calibrators for graphs without Q/DQ (up to version 10)."""
        return self.has("IInt8EntropyCalibrator2")

    @property
    def progress_monitor(self) -> bool:
        """Whether a build reports its progress and can be cancelled."""
        return self.has("IProgressMonitor")

    @property
    def timing_cache(self) -> bool:
        """Whether measured tactics can be kept between builds; without effect on TensorRT-RTX, which measures nothing."""
        return not self.is_rtx and self.has("IBuilderConfig", "create_timing_cache")

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be built for without having the GPU, such as ``SM86``; empty where only the local."""
        return tuple(sorted(self.names("ComputeCapability"))) if self.is_rtx else ()

    @property
    def hardware_compatibility(self) -> tuple[str, ...]:
        """Levels of hardware compatibility; empty on TensorRT-RTX, whose engines are portable by their targets."""
        return () if self.is_rtx else self.names("HardwareCompatibilityLevel")

    @property
    def tactic_sources(self) -> tuple[str, ...]:
        """Libraries that tactics come from."""
        return self.names("TacticSource")

    def has(self, *path: str) -> bool:
        """Whether the module has an attribute, or an attribute of an attribute."""
        found: Any = self.module
        for name in path:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True

    def names(self, enumeration: str) -> tuple[str, ...]:
        """Members of one of the module's enumerations, empty if the version lacks it."""
        return tuple(getattr(getattr(self.module, enumeration, None), "__members__", {}))


def find_runtime(name: str | None = None) -> Runtime:
    """Import the TensorRT that is installed.

    Args:
        name: ``"tensorrt"`` or ``"tensorrt_rtx"``; by default the first of the two that can be imported.

    Returns:
        The runtime.

    Raises:
        QATError: If none is installed, or the one asked for is not or does not load.

    Example:
        >>> find_runtime("tensorflow")
        Traceback (most recent call last):
        qat.errors.QATError: runtime='tensorflow': choose 'tensorrt' or 'tensorrt_rtx'
    """
    if name is not None and name not in MODULES:
        raise QATError(f"runtime={name!r}: choose {' or '.join(map(repr, MODULES))}")
    failures = []
    for candidate in MODULES if name is None else (name,):
        module = _import(candidate)
        if isinstance(module, ModuleType):
            return Runtime(module)
        if module is not None:
            failures.append(f"{candidate} is installed but does not load: {module}")
    wanted = "neither TensorRT nor TensorRT-RTX is installed" if name is None else f"{name} is not installed"
    extras = list(_EXTRAS.values()) if name is None else [_EXTRAS[name]]
    raise QATError(
        f"{'; '.join(failures) or wanted}. Install it from the checkout: {' or '.join(f'`{extra}`' for extra in extras)}"
    )


def _import(name: str) -> ModuleType | ImportError | OSError | None:
    """The module, or why it does not load; None if it is not installed."""
    try:
        module = import_module(name)
        # A folder of that name on the path, such as a checkout of TensorRT, is importable, and empty.
        return None if module.__spec__ is not None and module.__spec__.origin is None else module
    except ModuleNotFoundError as error:
        return None if error.name == name else error
    except (ImportError, OSError) as error:  # its shared libraries, or the CUDA libraries under them
        return error


def as_runtime(runtime: Runtime | str | None) -> Runtime:
    """The runtime given, or the one of that name, or the installed one."""
    return runtime if isinstance(runtime, Runtime) else find_runtime(runtime)
