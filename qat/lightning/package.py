"""Two packages hold Lightning: ``lightning.pytorch`` and ``pytorch_lightning``, copies of one code base.

The classes of one are foreign to the other. So nothing of this room names a class of Lightning when it is imported: it asks
the package that a Trainer or a LightningModule comes from. A program that uses one never imports the other.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import QATError

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_of(part: object) -> Any:
    """The Lightning that an object, or a class, comes from.

    Args:
        part: A Trainer or LightningModule of the user, or its class.

    Returns:
        The module ``lightning.pytorch`` or ``pytorch_lightning``, which is imported already.

    Raises:
        QATError: If no class that ``part`` derives from belongs to either.
    """
    kind = part if isinstance(part, type) else type(part)
    for base in kind.__mro__:
        for name in PACKAGES:
            if base.__module__.startswith(f"{name}."):
                return sys.modules[name]
    raise QATError(f"{kind.__name__}: neither from {' nor from '.join(PACKAGES)}. Pass a Trainer or a LightningModule")


def callback_bases() -> tuple[type, ...]:
    """The ``Callback`` of every Lightning that the program has imported; without any, of the only one that is installed.

    Where both are installed and none is imported, it is not known yet which the program will use: :func:`completed` adds it.

    Raises:
        QATError: If none is installed.
    """
    found = _imported()
    if not found:
        installed = [name for name in PACKAGES if find_spec(name.partition(".")[0]) is not None]
        if not installed:
            raise QATError("Lightning is not installed. pip install lightning")
        found = [import_module(name) for name in installed if len(installed) == 1]
    return tuple(module.Callback for module in found)


def completed(kind: type) -> type:
    """A class of callbacks that also derives from the ``Callback`` of each Lightning imported since the class was made.

    Args:
        kind: A class that :func:`callback_bases` was the base of.

    Returns:
        ``kind`` itself if nothing is missing; else a class of the same name, whose ``completes`` is ``kind``. A program that
        makes a callback before it imports any Lightning gets one of the first that is installed.
    """
    packages = _imported() or [import_module(next(name for name in PACKAGES if find_spec(name.partition(".")[0])))]
    missing = [module.Callback for module in packages if not issubclass(kind, module.Callback)]
    if not missing:
        return kind
    names: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "completes": kind,
    }
    return type(kind.__name__, (kind, *missing), names)


def unfinished(kind: Any) -> Any:
    """An object of ``kind`` that ``__init__`` has not seen: the first step of copying and unpickling."""
    made: Any = completed(kind)
    return made.__new__(made)


def _imported() -> list[Any]:
    return [sys.modules[name] for name in PACKAGES if sys.modules.get(name) is not None]
