"""What tracing cannot show, observed in one run of the model on example inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..support.inputs import call, tensors
from ..support.modes import hooked, looking_at
from .flow import Flow
from .source import ADD_FORMS, Key, derive_class, plain_operation

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Operand:
    """One input of an addition that ran.

    Attributes:
        layers: Paths of the nearest weighted modules that it was computed from.
        ancestors: Everything it was computed from: weighted modules and model inputs.
        direct: Whether a weighted module produced it, through at most batch normalization.
    """

    layers: frozenset[str]
    ancestors: frozenset[str]
    direct: bool


@dataclass
class Run:
    """One observed run.

    Attributes:
        head: Nearest weighted modules of the model's outputs.
        adds: Operands of each instrumented addition that ran with two tensors, by module path and expression.
    """

    head: set[str] = field(default_factory=set)
    adds: dict[tuple[str, Key], list[tuple[Operand, Operand]]] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Remembers for every tensor what it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = WeakIdKeyDictionary()
        self.ancestors: Any = WeakIdKeyDictionary()
        self.direct: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = tensors((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        layers = _NONE.union(*(self.layers.get(t, _NONE) for t in sources))
        ancestors = _NONE.union(*(self.ancestors.get(t, _NONE) for t in sources))
        for t in tensors(out):
            self.layers[t], self.ancestors[t], self.direct[t] = layers, ancestors, False
        return out

    def enter(self, name: str, tree: Any) -> None:
        """Mark tensors as an input of the model."""
        for t in tensors(tree):
            self.ancestors[t] = self.ancestors.get(t, _NONE) | {name}

    def weighted_hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            for t in tensors(out):
                self.layers[t], self.direct[t] = frozenset([path]), True
                self.ancestors[t] = self.ancestors.get(t, _NONE) | {path}

        return hook

    def normalization_hook(self, module: nn.Module, args: Any, out: Any) -> None:
        for t in tensors(out):
            self.direct[t] = any(self.direct.get(x, False) for x in tensors(args))

    def operand(self, t: Tensor) -> Operand:
        return Operand(self.layers.get(t, _NONE), self.ancestors.get(t, _NONE), self.direct.get(t, False))


class _Recorder:
    """Descriptor of an instrumented addition: computes it and records its operands."""

    def __init__(self, key: Key, record: Callable[[nn.Module, Key, Tensor, Tensor], None]) -> None:
        self.key = key
        self.record = record

    def __get__(self, instance: nn.Module, owner: type) -> Callable[..., Any]:
        return functools.partial(self.add, instance)

    def add(self, instance: nn.Module, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            self.record(instance, self.key, a, b)
        return plain_operation(self.key.form)(a, b)


def observe(flow: Flow, example_inputs: Any) -> Run:
    """Run the model once, in evaluation mode, and observe its outputs and the additions that tracing could not see.

    Classes, modes, tensors, hooks and random state are afterwards what they were.
    """
    model, run, tracker = flow.model, Run(), Tracker()
    classes: dict[nn.Module, type] = {}

    def record(module: nn.Module, key: Key, a: Tensor, b: Tensor) -> None:
        found = run.adds.setdefault((flow.paths[id(module)], key), [])
        found.append((tracker.operand(a), tracker.operand(b)))

    def register() -> Iterator[RemovableHandle]:
        for path, module in model.named_modules():
            if path in flow.weighted:
                yield module.register_forward_hook(tracker.weighted_hook(path))
            elif isinstance(module, _BatchNorm):
                yield module.register_forward_hook(tracker.normalization_hook)

    try:
        for trace in flow.traces.values():
            keys = [key for key in trace.source.keys if key.form in ADD_FORMS]
            if keys and not trace.graphs:
                classes[trace.module] = type(trace.module)
                names = {key: f"_qat_{position}" for position, key in enumerate(keys)}
                members = {name: _Recorder(key, record) for key, name in names.items()}
                trace.module.__class__ = derive_class(trace.source, names, (), members)
        with hooked(register()), looking_at(model, keep_random=True), tracker:
            for position, tree in enumerate(_arguments(example_inputs)):
                tracker.enter(f"input {position}", tree)
            out = call(model, example_inputs)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    run.head = set().union(*(tracker.layers.get(t, _NONE) for t in _outputs(out)))
    return run


def _arguments(example_inputs: Any) -> list[Any]:
    if isinstance(example_inputs, tuple):
        return list(example_inputs)
    return list(example_inputs.values()) if isinstance(example_inputs, dict) else [example_inputs]


def _outputs(out: Any) -> list[Tensor]:
    found = tensors(out)
    # An output object that is no registered container: its attributes.
    return found if found or not hasattr(out, "__dict__") else tensors(vars(out))
