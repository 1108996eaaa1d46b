"""The quantized layers of a model, and switching them one by one while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..core.quantizer import Quantizer, State, quantizers
from ..errors import QATError
from ..nn.add import QuantAdd
from ..nn.attention import QuantAttention
from ..nn.layers import CONVS, CONVS_TRANSPOSED, QuantLayer
from ..nn.mul import QuantMul
from ..nn.pool import QuantPool
from ..support.batches import run_batch
from ..support.modes import hooked, looking_at

_KINDS = {QuantAttention: "attention", QuantAdd: "add", QuantMul: "gate", QuantPool: "pool"}


@dataclass(frozen=True)
class Layer:
    """What is switched as one: the sites of a layer, of an Add, of a gate, or of what a pooling reads.

    Attributes:
        path: Module path; a rule with it leaves the layer in float.
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"add"``, ``"gate"`` or ``"pool"``.
        module: The module.
        sites: Its quantizers; they may be shared with other layers.
    """

    path: str
    kind: str
    module: nn.Module
    sites: tuple[Quantizer, ...]


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer of ``model`` with a quantizing site, by its path, in the order of registration.

    Raises:
        QATError: If there is none.
    """
    found: list[Layer] = []
    direct: set[Quantizer] = set()
    for path, module in model.named_modules():
        children = {f"{path}.{name}" if path else name: child for name, child in module._modules.items()}
        sites = {name: child for name, child in children.items() if isinstance(child, Quantizer)}
        kind = _kind(module)
        if kind is not None:
            found.append(Layer(path, kind, module, tuple(dict.fromkeys(sites.values()))))
            continue
        for name, site in sites.items():
            # Called from the forward of its parent. Two expressions that share a quantizer cannot be told apart.
            if site not in direct:
                direct.add(site)
                found.append(Layer(name, "pool", site, (site,)))
    layers = {layer.path: layer for layer in found if any(site.state is State.QUANTIZING for site in layer.sites)}
    if not layers:
        raise QATError("model: no site quantizes. Run qat.prepare(model) and qat.calibrate(model, loader) first")
    return layers


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, QuantLayer):
        return "conv" if isinstance(module, CONVS + CONVS_TRANSPOSED) else "linear"
    return next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), None)


class Switches:
    """Which layers quantize at present; made by :func:`switching`.

    Attributes:
        on: Paths of the layers that quantize.
    """

    def __init__(self, layers: Collection[Layer], active: Collection[Quantizer]) -> None:
        self.on: Collection[str] = frozenset(layer.path for layer in layers)
        self._running: list[Layer] = []
        self._direct = {id(layer.module): layer.path for layer in layers if isinstance(layer.module, Quantizer)}
        self._active = {id(site) for site in active}

    def enter(self, layer: Layer, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a layer."""
        self._running.append(layer)
        for site in layer.sites:
            # Attention looks at the states of its sites to tell whether it is a float layer.
            self._set(site, layer.path)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of a layer."""
        self._running.pop()

    def within_another(self, layer: Layer) -> bool:
        """Whether what runs of ``layer``, a pooling, is its quantizer inside of a layer that shares it."""
        return bool(self._running) and self._running[-1] is not layer and layer.module in self._running[-1].sites

    def reach(self, site: Quantizer, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a site."""
        owner = self._running[-1] if self._running else None
        # Layers that read one tensor share its quantizer, so that its state must follow the layer that runs.
        self._set(site, owner.path if owner is not None and site in owner.sites else self._direct.get(id(site)))
        if site.state is State.EXPORTING:
            site.export_scale = site.range_scale(args[0])

    def _set(self, site: Quantizer, path: str | None) -> None:
        # As the exporter's one operator: what it computes in between need not be kept.
        site.state = State.EXPORTING if path in self.on and id(site) in self._active else State.OFF


@contextmanager
def switching(model: nn.Module, layers: Collection[Layer]) -> Iterator[Switches]:
    """While this lasts, the layers named by ``Switches.on`` quantize, at first all, and the others compute in float.

    Without gradients. States of the quantizers and hooks are afterwards what they were.
    """
    states = [(site, site.state) for _, site in quantizers(model)]
    switches = Switches(layers, [site for site, state in states if state is State.QUANTIZING])

    def register() -> Iterator[RemovableHandle]:
        for layer in layers:
            if not isinstance(layer.module, Quantizer):
                yield layer.module.register_forward_pre_hook(partial(switches.enter, layer), prepend=True)
                yield layer.module.register_forward_hook(switches.leave, always_call=True)
        for site, _ in states:
            yield site.register_forward_pre_hook(switches.reach)

    try:
        with hooked(register()):
            yield switches
    finally:
        for site, state in states:
            site.state = state
            site.__dict__.pop("export_scale", None)


@contextmanager
def running(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Any], Any]]]:
    """The model behind a wrapper, and how to run it on a batch: in evaluation mode, without gradients, uncompiled.

    Modes, buffers and random streams are afterwards what they were.
    """
    # DistributedDataParallel would wait for the other ranks.
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tensor = next(chain(inner.parameters(), inner.buffers()), None)
    device = None if tensor is None else tensor.device
    with looking_at(inner, keep_random=True):
        # Copies, as a model may change its input in place, and sees each batch several times.
        yield inner, lambda batch: run_batch(inner, tree_map_only(Tensor, Tensor.clone, batch), device)


@dataclass(frozen=True)
class Bench:
    """A model ready to be looked at; made by :func:`analysing`.

    Attributes:
        layers: Its quantized layers by path.
        switches: Which of them quantize.
        call: Runs the model on a batch.
    """

    layers: dict[str, Layer]
    switches: Switches
    call: Callable[[Any], Any]

    def run(self, batch: Any, on: Collection[str]) -> Any:
        """The model's output with only the layers ``on`` quantizing."""
        self.switches.on = on
        return self.call(batch)

    @contextmanager
    def watching(self, look: Callable[[Layer, Callable[[], Any], Any], Any]) -> Iterator[None]:
        """While this lasts, ``look(layer, alone, out)`` is called with the output of every layer that has run.

        ``alone()`` is what the layer gives on the same inputs when it quantizes. What ``look`` returns, if not ``None``,
        replaces the output.
        """
        inside = False

        def hook(layer: Layer, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            nonlocal inside
            if inside or self.switches.within_another(layer):
                return None

            def alone() -> Any:
                nonlocal inside
                before, inside, self.switches.on = self.switches.on, True, {layer.path}
                try:
                    return module(*args, **kwargs)
                finally:
                    self.switches.on, inside = before, False

            return look(layer, alone, out)

        layers = self.layers.values()
        with hooked(x.module.register_forward_hook(partial(hook, x), with_kwargs=True) for x in layers):
            yield


@contextmanager
def analysing(model: nn.Module) -> Iterator[Bench]:
    """A prepared model, ready to be looked at; it and the random streams are afterwards what they were.

    Raises:
        QATError: If no site of the model quantizes.
    """
    with running(model) as (inner, call):
        layers = quantized_layers(inner)
        with switching(inner, layers.values()) as switches:
            yield Bench(layers, switches, call)


def each_batch(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        QATError: If ``batches`` is no iterable of batches, or empty.
    """
    if isinstance(batches, Tensor | Mapping | str) or not hasattr(batches, "__iter__"):
        raise QATError(f"batches: is a {type(batches).__name__}; pass an iterable of batches, such as [batch]")
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        yield batch
    if count == 0:
        raise QATError("batches: is empty; nothing to analyse")
