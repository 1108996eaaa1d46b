"""The Lightning that tests run with: by default ``lightning.pytorch``, or ``QAT_TEST_LIGHTNING=pytorch_lightning``.

Nothing imports both, so that a test of one would see what needs the other.
"""

import os
from importlib import import_module

NAME = os.environ.get("QAT_TEST_LIGHTNING", "lightning.pytorch")
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[NAME]
pl = import_module(NAME)
callbacks = pl.callbacks


def part(name):
    """A module of the package that importing the package does not import, such as ``cli``."""
    return import_module(f"{NAME}.{name}")


def make_fabric(**options):
    return import_module(FABRIC).Fabric(**options)
