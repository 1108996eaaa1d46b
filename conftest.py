"""Test processes that run side by side share the cores, and what takes time again and again is done once.

Each process would start a thread for every core otherwise, and threads that wait for a core of another process take several
times as long: on two cores, two test files side by side took four to six times as long as with one thread each.
"""

import functools
import importlib
import importlib.util
import os
import sys

import pytest

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Read when PyTorch is imported, and by the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_finish(session):
    """Let torch list its 500 translations to ONNX once: it reads their sources at every export, half the time of a small one.

    Versions of torch that do so elsewhere, or not at all, are left alone.
    """
    name = "torch.onnx._internal.exporter._registration"
    if "onnxscript" not in sys.modules or importlib.util.find_spec(name) is None:
        return
    listing = getattr(importlib.import_module(name), "onnxscript_apis", None)
    if hasattr(listing, "get_torchlib_ops"):
        patch = pytest.MonkeyPatch()
        patch.setattr(listing, "get_torchlib_ops", functools.cache(listing.get_torchlib_ops))
        session.config.add_cleanup(patch.undo)
