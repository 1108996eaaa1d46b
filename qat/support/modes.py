"""Running a model for a look at it, and leaving it as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, flag by flag: a module's own ``train`` may do more than set it, and could not be undone."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def unchanged_tensors(model: nn.Module) -> Iterator[None]:
    """Buffers, and tensors that modules keep as attributes, are afterwards what they were, whatever a forward stores there."""
    buffers = [
        (module, name, t, None if t.is_inference() else t._version, t.detach().clone())
        for module in model.modules()
        for name, t in module._buffers.items()
        if t is not None
    ]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, t, version, value in buffers:
                module._buffers[name] = t
                if version is not None and t._version != version:
                    # What it was filled with may have had a gradient.
                    t.detach_().copy_(value)
        for module, before in attributes:
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and before.get(name) is not value:
                    vars(module).pop(name)
                    if name in before:
                        vars(module)[name] = before[name]


def uncompiled() -> AbstractContextManager[Any]:
    """A compiled model would compile anew for a look. Nothing is compiled before the compiler has been imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def isolated_random(model: nn.Module) -> Iterator[None]:
    """Loaders shuffle and augment: leave the random streams where they were."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type != "cpu"}
    kind = {"device_type": next(iter(devices)).type} if devices else {}
    # NumPy's old global stream is the one that transforms use.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=list(devices), **kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def keep_generators(loaders: Iterable[Any]) -> Iterator[None]:
    """Restore, on leaving, the random generators that loaders and their samplers were given."""
    owners = [
        owner
        for data in loaders
        for sampler in (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
        for owner in (data, sampler, getattr(sampler, "sampler", None))
    ]
    held = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    restores = [restore for value in held if (restore := _rewinding(value)) is not None]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _rewinding(generator: Any) -> Callable[[], Any] | None:
    """What puts a random generator back to where it is now; ``None`` for anything else."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return None
