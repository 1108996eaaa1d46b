"""Arrays and functions that the user names on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QATError

if TYPE_CHECKING:
    import numpy as np


def load_inputs(path: str) -> Any:
    """One array, or arrays by name. Pickled objects, which could run code, are refused."""
    import zipfile
    import zlib

    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise QATError(f"--inputs {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise QATError(f"--inputs {path}: damaged, or neither .npy nor .npz of plain arrays: {error}") from error


def by_name(inputs: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Inputs by the names that ``names`` wants."""
    if not isinstance(inputs, dict):
        if len(names) != 1:
            raise QATError(f"--inputs: one array for the inputs {list(names)}. Pass an .npz that names them")
        return {names[0]: inputs}
    if set(inputs) != set(names):
        raise QATError(f"--inputs: arrays {sorted(inputs)}, the inputs are {sorted(names)}")
    return inputs


def call_factory(spec: str) -> Any:
    """Call ``module:function``, the user's code, and return its result."""
    module, _, function = spec.partition(":")
    # A console script, unlike `python -m`, does not look in the current folder.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise QATError(f"{spec}: there is no module {error.name!r} here or installed") from error
    except AttributeError as error:
        raise QATError(f"{spec}: {module!r} has no function {function!r}") from error
    return found()
