"""The Lightning that tests run with: by default ``lightning.pytorch``, or ``QAT_TEST_LIGHTNING=pytorch_lightning``.

Where it is named, the other package cannot be imported, as if it were not installed.
"""

import os
import sys
from importlib import import_module

FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
NAME = os.environ.get("QAT_TEST_LIGHTNING", "lightning.pytorch")
(OTHER,) = FABRIC.keys() - {NAME}
if "QAT_TEST_LIGHTNING" in os.environ:
    for module in (OTHER, FABRIC[OTHER]):
        sys.modules[module.partition(".")[0]] = None
pl = import_module(NAME)
callbacks = pl.callbacks


def part(name):
    """A module of the package that importing the package does not import, such as ``cli``."""
    return import_module(f"{NAME}.{name}")


def make_fabric(**options):
    return import_module(FABRIC[NAME]).Fabric(**options)
