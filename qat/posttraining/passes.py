"""Passes over the data that every layer gets in its turn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calibration.collect import check_data
from ..core.quantizer import Quantizer, State, WeightQuantizer, passing, quantizers
from ..errors import QATError
from ..nn.attention import QuantAttention
from ..nn.layers import QuantLayer
from ..preparation.check import check_model
from ..support.batches import run_batch
from ..support.modes import hooked, isolated_random, keep_generators, looking_at
from ..support.progress import progress_bar
from ..support.text import Printed
from .wiring import Wiring, observe_wiring

Layer = TypeVar("Layer")


class _Reached(Exception):
    """The layer that a pass is for has run: the rest of the model need not."""


class Passes:
    """Runs a calibrated model over the same batches again and again.

    Args:
        model: A prepared and calibrated model.
        data: A loader, as :func:`qat.calibrate` takes it. Every pass starts with the same random state, so that one that
            shuffles or augments shows the same batches each time.
        batches: How many of each pass; ``None`` takes all.

    Attributes:
        wiring: What the first batch showed.

    Raises:
        QATError: If the model is not calibrated or runs in several processes, or for data that cannot be passed over again.
    """

    def __init__(self, model: nn.Module, data: Iterable[Any], batches: int | None) -> None:
        check_model(model)
        _check_calibrated(model)
        check_data(data, batches)
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise QATError("data: is a function; pass a loader, which gives its batches again for every layer")
        if isinstance(data, Iterator):
            raise QATError("data: is an iterator, which gives its batches once; pass a loader or a list of batches")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise QATError("model: each process would change it by its own data. Run this in one process and save the model")
        self._model, self._data, self._batches = model, data, batches
        self._count: int | None = None
        first = next(iter(self._each()), None)
        if first is None:
            raise QATError("data: the loader is empty")
        self.wiring: Wiring = observe_wiring(model, lambda m: self.run(m, first))

    def _each(self) -> Iterator[Any]:
        with isolated_random(self._model), keep_generators([self._data]):
            yield from islice(self._data, self._batches)

    def layers(self) -> dict[str, QuantLayer]:
        """The quantizing convolution and linear layers that the data reach, in the order in which they run."""
        found = {path: self._model.get_submodule(path) for path in self.wiring.calls}
        return {
            path: layer
            for path, layer in found.items()
            if isinstance(layer, QuantLayer) and layer.weight_quantizer.state is State.QUANTIZING
        }

    def attention(self) -> dict[str, str]:
        """Why quantizing attention is left, by path."""
        return {
            path: "attention: its projections are left as they are"
            for path, module in self._model.named_modules()
            if isinstance(module, QuantAttention) and module.query_quantizer.state is State.QUANTIZING
        }

    def held_besides(self, layers: Iterable[nn.Module]) -> set[int]:
        """Identities of the parameters that modules other than ``layers`` hold."""
        among = {id(layer) for layer in layers}
        return {id(p) for module in self._model.modules() if id(module) not in among for p in module._parameters.values()}

    def run(self, model: nn.Module, batch: Any) -> None:
        """Run ``model`` on one batch, in evaluation mode and without gradients."""
        tensor = next(chain(model.parameters(), model.buffers()), None)
        with looking_at(model):
            # A copy, as a model may change its input in place, and others are to see the same.
            run_batch(model, tree_map_only(Tensor, Tensor.clone, batch), None if tensor is None else tensor.device)

    def each(self, *models: nn.Module, until: str | None = None) -> Iterator[None]:
        """Run the models on each batch, and yield after each.

        Args:
            models: Run one after another on the same batch.
            until: Path of a layer after whose last call a run may stop.

        Raises:
            QATError: For data that give another number of batches than in the first pass.
        """
        count = 0
        for batch in self._each():
            for model in models:
                with _stopping(model, until, self.wiring):
                    self.run(model, batch)
            count += 1
            yield
        self._count = count if self._count is None else self._count
        if count != self._count or not count:
            raise QATError(
                f"data: gave {self._count} batches, and then {count}; pass a loader or a list, which gives them again"
            )


@contextmanager
def _stopping(model: nn.Module, path: str | None, wiring: Wiring) -> Iterator[None]:
    if path is None or wiring.calls[path] != 1:
        yield
        return

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        raise _Reached

    # Hooks run in the order in which they were registered: whoever listens does so before.
    with hooked([model.get_submodule(path).register_forward_hook(stop)]), suppress(_Reached):
        yield


def _check_calibrated(model: nn.Module) -> None:
    sites = list(quantizers(model))
    if not sites:
        raise QATError("model: holds no quantizers. Run qat.prepare(model) and qat.calibrate(model, loader) first")
    if not any(site.state is State.QUANTIZING for _, site in sites):
        raise QATError("model: no site quantizes. Run qat.calibrate(model, loader) first")


@contextmanager
def unchanged_on_failure(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put values back unless the body succeeds."""
    before = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
        raise


def listen(layer: nn.Module, hear: Callable[[Tensor, Tensor], None]) -> Any:
    """Call ``hear(input, output)`` whenever a layer has run; returns the handle of the hook."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        hear((*args, *kwargs.values())[0], out)

    return layer.register_forward_hook(hook, with_kwargs=True)


@contextmanager
def clipping_only(model: nn.Module) -> Iterator[None]:
    """While this lasts the sites of activations clip and do not round, and weights are those in float.

    What helpers want outputs to be. No rounding of weights and no bias gives back what clipping takes away: asked to, they
    would change all values for the sake of the largest, which behind ranges by entropy can hold most of a tensor's energy.
    """

    def clip(site: Quantizer, args: Any, x: Tensor) -> Tensor:
        scale = site.scale.detach()
        return x.float().clamp(scale * site.fmt.qmin, scale * site.fmt.qmax).to(x.dtype)

    sites = [site for _, site in quantizers(model) if not isinstance(site, WeightQuantizer) and site.state is State.QUANTIZING]
    with passing(model), hooked(site.register_forward_hook(clip) for site in sites):
        yield


@contextmanager
def walking(
    layers: Mapping[str, Layer], description: str, *, held: Iterable[Tensor], progress: bool
) -> Iterator[Iterable[tuple[str, Layer]]]:
    """The layers in turn, with a progress bar. Unless all are walked, the tensors ``held`` are put back."""
    with unchanged_on_failure(held), progress_bar(shown=progress) as bar:
        yield bar.track(layers.items(), description=description)


@dataclass(frozen=True)
class WalkResult(Printed, Generic[Layer]):
    """What was done to the layers in their turn, as a table.

    Attributes:
        layers: What was changed, in order.
        left: Why a quantized layer was not, by its path.
    """

    _title: ClassVar[str]
    _texts: ClassVar[tuple[str, ...]]
    _numbers: ClassVar[tuple[str, ...]]

    layers: tuple[Layer, ...]
    left: dict[str, str]

    @abstractmethod
    def _cells(self, layer: Layer) -> tuple[str, ...]:
        """A row of the table."""

    def __rich__(self) -> Table:
        table = Table(title=self._title)
        for column in self._texts:
            table.add_column(column, overflow="fold")
        for column in self._numbers:
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(*self._cells(layer))
        for path, why in self.left.items():
            table.add_row(path, why)
        return table
