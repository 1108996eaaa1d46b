"""The copies of a LightningModule that weight averaging makes: their ranges follow those of the module."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from ..core.quantizer import quantizers
from ..training.ranges import freeze_ranges
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


def show_to_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give the ranges to the copies that were made before calibration: validation may run them before an update."""
    for average in _averages(trainer):
        for (_, site), (_, twin) in zip(quantizers(pl_module), quantizers(average), strict=True):
            twin.amax.data.copy_(site.amax.data)
            # Its state dicts then hold ranges of its own weights.
            twin.state = site.state


def freeze_with_averages(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, refresh: bool, sites: Collection[str] | None = None
) -> None:
    """Freeze ranges of the module, and of averages as they are."""
    freeze_ranges(pl_module, refresh=refresh, sites=sites)
    for average in _averages(trainer):
        freeze_ranges(average, refresh=False, sites=sites)


def _averages(trainer: pl.Trainer) -> list[nn.Module]:
    averaging = lightning_of(trainer).callbacks.WeightAveraging
    found = [c._average_model for c in trainer.callbacks if isinstance(c, averaging)]  # type: ignore[attr-defined]
    return [average.module for average in found if average is not None]
