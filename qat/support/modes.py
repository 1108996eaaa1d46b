"""Running a model for a look at it, and leaving it as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def looking_at(model: nn.Module, *, keep_tensors: bool = True, keep_random: bool = False) -> Iterator[None]:
    """Run a model for a look: in evaluation mode, without gradients, uncompiled; it is afterwards what it was.

    Args:
        model: What is run.
        keep_tensors: Put back what a forward stores in buffers and attributes. Off where that is what is wanted.
        keep_random: Put back the random streams: for those who also iterate loaders.
    """
    with (
        evaluating(model),
        unchanged_tensors(model) if keep_tensors else nullcontext(),
        isolated_random(model) if keep_random else nullcontext(),
        torch.no_grad(),
        uncompiled(),
    ):
        yield


@contextmanager
def assigned(owners: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """While this lasts, the attribute ``name`` of every owner is ``value``."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        for owner, _ in before:
            setattr(owner, name, value)
        yield
    finally:
        for owner, held in before:
            setattr(owner, name, held)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end. A generator that registers them as it goes leaves none behind when it fails."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode, flag by flag: a module's own ``train`` may do more than set it, and could not be undone."""
    return assigned(model.modules(), "training", False)


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
    # The CPU has its stream anyway, and the meta device none.
    devices = {t.device for t in chain(model.parameters(), model.buffers()) if t.device.type not in ("cpu", "meta")}
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
