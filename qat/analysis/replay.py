"""Running a model again with a part of it changed, computing only what the change reaches.

Every operator of one run is recorded with its result. In a later run, an operator that is called with the very tensors that
it was recorded with is not computed: its recorded result is returned, by which the operators behind it are recognized in
turn. What the change reaches meets new tensors and is computed. So nothing has to be known about the model, its Python code
included, and whatever comes out is what a complete run gives.

In-place operators change tensors that were recorded before. Tensors are therefore told apart by how often their memory was
written; the content before each write is kept and put back for an operator that has to read it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Memory:
    """The storage of recorded tensors: its contents over time."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.contents: dict[int, torch.UntypedStorage] = {}
        self.version = 0  # what the run that is going on has come to; negative: content that was not recorded
        self.present = 0  # what the storage holds

    def keep(self) -> None:
        """Before a write: save the content, if it may be asked for again."""
        if self.present >= 0 and self.present not in self.contents:
            self.contents[self.present] = self.storage.clone()

    def bring(self, version: int) -> None:
        """Let the storage hold the content that it had at ``version``."""
        if self.present != version:
            self.keep()
            self.storage.copy_(self.contents[version])
            self.present = version


class Recording:
    """The operators of one run and what they gave, for runs of the same model on the same inputs.

    Holds every intermediate result of the run, as the forward pass of a training step does, and in addition what in-place
    operators overwrote.
    """

    def __init__(self) -> None:
        self._results: dict[Any, list[Any]] = {}
        # What is known by id: the tensor itself, so that no other gets its id, its memory, and who it is.
        self._tensors: dict[int, tuple[Tensor, _Memory, int]] = {}
        self._memories: dict[int, _Memory] = {}
        self._fresh = itertools.count(-1, -1)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the operators that run meanwhile; once."""
        with _Record(self):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Take what was recorded where it is the same."""
        for memory in self._memories.values():
            memory.version = 0
        mode = _Replay(self)
        try:
            with mode:
                yield
        finally:
            self.forget(mode.views)

    def read(self, tensors: list[Tensor]) -> None:
        """Let ``tensors`` hold what they held at the end of the run that was the last."""
        for tensor in tensors:
            memory = self.memory(tensor)
            if memory is not None:
                memory.bring(memory.version)

    def close(self) -> None:
        """Put back what the runs overwrote of tensors that they did not make, such as buffers."""
        for memory in self._memories.values():
            memory.bring(0)

    def memory(self, tensor: Tensor) -> _Memory | None:
        """The memory that ``tensor`` shares with recorded tensors, if any."""
        return self._memories.get(tensor.untyped_storage()._cdata)

    def add(self, tensor: Tensor, same_as: Tensor | None = None) -> None:
        """Make a tensor known, as one of its own or as a view that equals a known one."""
        if id(tensor) not in self._tensors:
            storage = tensor.untyped_storage()
            memory = self._memories.setdefault(storage._cdata, _Memory(storage))
            who = id(tensor) if same_as is None else self._tensors[id(same_as)][2]
            self._tensors[id(tensor)] = tensor, memory, who

    def forget(self, tensors: list[Tensor]) -> None:
        """Inverse of :meth:`add`."""
        for tensor in tensors:
            self._tensors.pop(id(tensor), None)

    def key(self, value: Any) -> Any:
        """What tells whether an argument is the same as in the recorded run; ``None`` for a tensor that is not."""
        if isinstance(value, Tensor):
            known = self._tensors.get(id(value))
            return None if known is None or known[1].version < 0 else (known[2], known[1].version)
        if isinstance(value, list | tuple):
            parts = tuple(self.key(item) for item in value)
            return None if any(part is None for part in parts) else parts
        return type(value), value

    def call_key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for a call."""
        parts = self.key(args), self.key(tuple(kwargs.items()))
        return None if None in parts else (func, *parts)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, recorded: bool) -> Any:
        """Run an operator on the contents that it would meet in a complete run."""
        touched = {id(memory): memory for t in _tensors((args, kwargs)) if (memory := self.memory(t)) is not None}
        for memory in touched.values():
            memory.bring(memory.version)
        written = self.written(func, args, kwargs)
        for memory in written:
            memory.keep()
        out = func(*args, **kwargs)
        for memory in written:
            memory.version = memory.present = memory.version + 1 if recorded else next(self._fresh)
        return out

    def written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Memory]:
        """The memories that an operator writes to."""
        found: dict[int, _Memory] = {}
        for tensor in _written(func, args, kwargs):
            memory = self.memory(tensor)
            if memory is not None:
                found[id(memory)] = memory
        return list(found.values())


class _Record(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recording, kwargs = self.recording, kwargs or {}
        for tensor in _tensors((args, kwargs)):
            recording.add(tensor)
        key = recording.call_key(func, args, kwargs)
        out = recording.compute(func, args, kwargs, recorded=True)
        for tensor in _tensors(out):
            recording.add(tensor)
        recording._results.setdefault(key, []).append(out)
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.calls: dict[Any, int] = {}
        self.views: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recording, kwargs = self.recording, kwargs or {}
        key = recording.call_key(func, args, kwargs)
        # The same call twice gives two tensors, which may be written to independently.
        count = self.calls.get(key, 0)
        results = recording._results.get(key, ()) if key is not None else ()
        if count >= len(results):
            return recording.compute(func, args, kwargs, recorded=False)
        self.calls[key] = count + 1
        for memory in recording.written(func, args, kwargs):
            memory.version += 1
        return self._view(results[count], func, args, kwargs) if _is_view(func) else results[count]

    def _view(self, recorded: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A view, made anew: autograd marks each as a view, which it does only once a tensor."""
        out = func(*args, **kwargs)
        for tensor, known in zip(_tensors(out), _tensors(recorded), strict=True):
            self.recording.add(tensor, same_as=known)
            self.views.append(tensor)
        return out


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether the results of an operator share memory with its arguments, which it does not change."""
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator changes, by its schema."""
    places = _written_places(func)
    return [t for position, name in places for t in _tensors(args[position] if position < len(args) else kwargs.get(name))]


@functools.cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator changes."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments of an operator."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for item in tree for tensor in _tensors(item)]
