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
    """The ``Callback`` of every Lightning that the program has imported; without any, of the first that is installed.

    Raises:
        QATError: If none is installed.
    """
    found = [sys.modules[name] for name in PACKAGES if sys.modules.get(name) is not None]
    if not found:
        found = [import_module(name) for name in PACKAGES if find_spec(name.partition(".")[0]) is not None][:1]
    if not found:
        raise QATError("Lightning is not installed. pip install lightning")
    return tuple(module.Callback for module in found)
