"""The calls of one run of a model: modules and functions, what feeds them, and where a site quantizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..analysis.layers import running
from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers
from ..support.inputs import tensors
from .labels import INPUTS, describe, does_nothing, function_label, is_quantized_module

INPUT = -1


@dataclass(frozen=True)
class Edge:
    """What a call reads.

    Attributes:
        source: Index of the call that made it; ``INPUT`` for an input of the model.
        site: Path of the quantizer that it passes, ``None`` if it is read in float.
    """

    source: int
    site: str | None


@dataclass(frozen=True)
class Call:
    """One call of a module without modules of its own, or of a function.

    Attributes:
        path: Of the module; for a function, of the module whose ``forward`` calls it.
        text: What it is, such as ``"Conv 3x3, stride 2"``.
        is_module: Whether it is a module.
        is_layer: Whether it can have sites, quantized or not.
        inputs: What it reads.
        weights: Paths of the sites at its weights.
        inner: Paths of its other sites, such as the one between attention and its output projection.
        owners: The modules within whose ``forward`` it runs, from the outside, each with the number of its call.
    """

    path: str
    text: str
    is_module: bool
    is_layer: bool
    inputs: tuple[Edge, ...]
    weights: tuple[str, ...]
    inner: tuple[str, ...]
    owners: tuple[tuple[str, int], ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of all quantizers that act here."""
        return (*(edge.site for edge in self.inputs if edge.site is not None), *self.weights, *self.inner)


# What is known of a tensor: where it comes from, and through which sites. Views and the like join several.
Origin = tuple[Edge, ...]


def record_calls(model: nn.Module, batch: Any) -> list[Call]:
    """Run ``model`` on one batch and return its calls in their order; the model is afterwards what it was.

    Functions are shown where they join tensors, or are activations, poolings and the like. What runs inside a module without
    modules of its own belongs to that module. Compiled or scripted parts show nothing of their inside.

    Args:
        model: Any model, as a rule prepared.
        batch: As for ``qat.calibrate``.
    """
    with running(model) as (inner, run):
        recorder = _Recorder(inner)
        with recorder.hooked(), recorder:
            run(batch)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Follows tensors through modules, by hooks, and through functions, as a mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self._origins: Any = WeakIdKeyDictionary()
        self._owners: list[tuple[str, int]] = []
        self._counts: dict[str, int] = {}
        # Paths of the modules that are drawn as one, of which the present call is inside; and what they read.
        self._inside: list[tuple[str, list[Origin]]] = []
        self._sites = {id(site): path for path, site in quantizers(model)}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While this lasts, modules tell when they run."""
        handles: list[Any] = []

        def hook(module: nn.Module, before: Any, after: Any) -> None:
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

        try:
            for path, module in self.model.named_modules():
                if isinstance(module, Quantizer):
                    hook(module, _nothing, partial(self._through_site, path))
                elif module is not self.model and _is_drawn_whole(module):
                    hook(module, partial(self._enter, path), partial(self._leave, path))
                else:
                    hook(module, partial(self._open, path), partial(self._close, path))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _open(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._inside:
            if module is self.model:
                for tensor in tensors((args, kwargs)):
                    self._origins[tensor] = (Edge(INPUT, None),)
            self._counts[path] = self._counts.get(path, 0) + 1
            self._owners.append((path, self._counts[path]))

    def _close(self, path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not self._inside:
            self._owners.pop()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Before it runs: it may change its input in place.
        self._inside.append((path, [self._origin(tensor) for tensor in tensors((args, kwargs))]))

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        _, origins = self._inside.pop()
        if self._inside:
            return
        if does_nothing(module):
            for tensor in tensors(out):
                self._origins[tensor] = tuple(edge for origin in origins for edge in origin)
            return
        sites = {name: site for name, site in module._modules.items() if isinstance(site, Quantizer)}
        acting = {name: self._sites[id(site)] for name, site in sites.items() if site.state is State.QUANTIZING}
        entries = {INPUTS[name]: site for name, site in acting.items() if name in INPUTS}
        inputs: list[Edge] = []
        for position, origin in enumerate(origins):
            inputs += [Edge(edge.source, entries.get(position, edge.site)) for edge in origin]
        weights = tuple(site for name, site in acting.items() if isinstance(sites[name], WeightQuantizer))
        rest = tuple(site for name, site in acting.items() if name not in INPUTS and site not in weights)
        text, is_layer = describe(module)
        call = Call(path, text, True, is_layer, tuple(dict.fromkeys(inputs)), weights, rest, tuple(self._owners))
        self._made(call, out)

    def _through_site(self, path: str, site: Quantizer, args: Any, kwargs: Any, out: Any) -> None:
        """A site that the ``forward`` of a model calls itself."""
        if not self._inside and isinstance(out, Tensor):
            passed = path if site.state is State.QUANTIZING else None
            self._origins[out] = tuple(Edge(edge.source, passed or edge.site) for edge in self._origin(args[0]))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside or not self._owners:
            return func(*args, **kwargs)
        origins = [origin for tensor in tensors((args, kwargs)) if (origin := self._origin(tensor))]
        out = func(*args, **kwargs)
        results = tensors(out)
        if results and origins:
            edges = tuple(dict.fromkeys(edge for origin in origins for edge in origin))
            text = function_label(func, joins=len({edge.source for edge in edges}) > 1 and len(origins) > 1)
            if text is not None:
                path = self._owners[-1][0]
                self._made(Call(path, text, False, False, edges, (), (), tuple(self._owners)), out)
            else:
                for result in results:
                    self._origins[result] = edges
        return out

    def _made(self, call: Call, out: Any) -> None:
        self.calls.append(call)
        for tensor in tensors(out):
            self._origins[tensor] = (Edge(len(self.calls) - 1, None),)

    def _origin(self, tensor: Tensor) -> Origin:
        return self._origins.get(tensor, ())


def _nothing(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A pre-hook that changes nothing."""


def _is_drawn_whole(module: nn.Module) -> bool:
    """Whether all that is in a module are sites, parametrizations, or what a quantized layer calls itself."""
    return is_quantized_module(module) or all(isinstance(child, Quantizer) for child in module.children())
