"""Batches that a LightningModule is shown outside of training, as training would give them to it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from ..calibration import calibrate
from ..core.quantizer import is_prepared
from ..errors import QATError
from ..support.batches import run_batch
from ..support.modes import keep_generators, uncompiled
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

DEFAULT_BATCHES = 32
# What the forward of a model raises that is run on something else than it takes.
ERRORS_OF_A_FORWARD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Forward = Callable[[Any, Any], Any]


def calibrate_on_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    model: nn.Module,
    *,
    options: Mapping[str, Any],
    data: Iterable[Any] | None,
    forward: Forward | None,
) -> None:
    """Calibrate in place.

    Args:
        trainer: It holds the training data.
        pl_module: The module that runs on the batches.
        model: The part of it whose sites get ranges.
        options: Arguments of :func:`qat.calibrate`.
        data: Batches; ``None`` for those of training.
        forward: As :func:`run_on`.
    """
    arguments = dict(options)
    limit = trainer.num_training_batches if data is None else DEFAULT_BATCHES
    batches = arguments.pop("batches", int(min(DEFAULT_BATCHES, limit)))
    arguments.setdefault("progress", trainer.progress_bar_callback is not None)
    shown = 0

    def show(module: nn.Module) -> None:
        nonlocal shown
        shown = show_batches(trainer, pl_module, batches, forward=forward, data=data)

    calibrate(model, show, **arguments)
    if "batches" in options and batches is not None and shown < batches:
        lightning_of(trainer).utilities.rank_zero_warn(f"calibration: the loader ended after {shown} of {batches} batches")


def show_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: int | None,
    *,
    forward: Forward | None,
    data: Iterable[Any] | None = None,
) -> int:
    """Run the module on the first batches of the training data, or other data, which draw no random numbers by that.

    Returns:
        How many there were.
    """
    utilities = lightning_of(trainer).utilities
    source: Any = data
    if data is None:
        source = utilities.CombinedLoader(trainer.train_dataloader, "min_size")
        # Persistent workers have one iterator, which training may have begun.
        source.flattened = [_own_iterator(loader) for loader in source.flattened]
    combined = isinstance(source, utilities.CombinedLoader)
    count = 0
    with utilities.seed.isolate_rng(), keep_generators(source.flattened if combined else [source]), uncompiled():
        shown = (batch for batch, *_ in iter(source)) if combined else iter(source)
        for batch in itertools.islice(shown, batches):
            # In the order of Lightning's own loop.
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            run_on(trainer, pl_module, trainer.strategy.batch_to_device(batch), forward)
            count += 1
    return count


def run_on(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, forward: Forward | None) -> Any:
    """Run the module on a batch as its steps see it, which is behind the hooks of the transfer to a device.

    Args:
        trainer: Its precision holds.
        pl_module: The module.
        batch: On the module's device.
        forward: ``forward(pl_module, batch)`` instead of :func:`run_module`.

    Raises:
        QATError: If the batch does not say what the module takes, and there is no ``forward``.
    """
    with trainer.precision_plugin.forward_context():
        if forward is not None:
            return forward(pl_module, batch)
        try:
            return run_module(pl_module, batch)
        except ERRORS_OF_A_FORWARD as error:
            raise QATError(
                f"{type(pl_module).__name__} cannot be run on a batch as its first element: {error}. "
                "Pass QATCallback(forward=lambda module, batch: ...)"
            ) from error


def run_module(pl_module: pl.LightningModule, batch: Any) -> None:
    """Run a LightningModule on one batch as :func:`qat.calibrate` runs a model: with its first element.

    Raises:
        QATError: When the module has no ``forward`` and more than one prepared sub-model, or for a batch that does not say
            what the model takes.
    """
    models: list[nn.Module] = [pl_module]
    if not lightning_of(pl_module).utilities.model_helpers.is_overridden("forward", pl_module):
        models = [child for child in pl_module.children() if is_prepared(child)]
    if len(models) != 1:
        name = type(pl_module).__name__
        raise QATError(f"{name} has no forward and {len(models)} prepared sub-models: pass QATCallback(forward=...)")
    run_batch(models[0], batch, None)


def _own_iterator(loader: Any) -> Any:
    """The loader, so that iterating over it takes nothing from training."""
    if isinstance(loader, Iterator) or isinstance(getattr(loader, "dataset", None), Iterator):
        raise QATError(
            "the training data can be read only once, and calibration would take some of them. Pass "
            "QATCallback(calibration_data=...)"
        )
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    loader = copy.copy(loader)
    loader._iterator = None
    return loader
