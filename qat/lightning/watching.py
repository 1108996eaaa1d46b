"""Watching a training: clip rates and moving ranges to log, and the site that a non-finite loss comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..core.quantizer import State, quantizers
from ..errors import QATError
from ..support.modes import looking_at
from ..training.nonfinite import first_non_finite
from ..training.ranges import clip_rates, range_drift, recorded_ranges
from .batches import ERRORS_OF_A_FORWARD, Forward, run_on
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


def log_ranges(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    first: Mapping[str, Tensor],
    of: Literal["summary", "sites"],
    forward: Forward | None,
) -> None:
    """Log clip rates of a batch and changes of ranges, by ``pl_module.log_dict``.

    Args:
        trainer: It trains the module.
        pl_module: The module.
        batch: As its steps see it.
        first: The ranges that changes are relative to.
        of: ``"sites"`` for the values of each site besides the summary.
        forward: As :func:`~qat.lightning.batches.run_on`.
    """
    utilities = lightning_of(trainer).utilities
    rates: dict[str, float] = {}
    try:
        with looking_at(pl_module, keep_random=True):
            rates = clip_rates(pl_module, lambda module: run_on(trainer, pl_module, batch, forward))
    except ERRORS_OF_A_FORWARD as error:
        # Nobody has run the module on a batch before if it was calibrated by hand.
        utilities.rank_zero_warn(
            f"log_ranges: no clip rates, as the model cannot be run on a batch: {error} Or pass QATCallback(forward=...)"
        )
    mean = sum(rates.values()) / len(rates) if rates else math.nan
    if trainer.world_size > 1:
        # Processes that log other values would wait for each other: data may not reach a site, or not run.
        paths = [path for path, site in quantizers(pl_module) if site.state is State.QUANTIZING]
        rates = {path: rates.get(path, math.nan) for path in paths}
    found = {"clip_rate": rates, "range_drift": range_drift(pl_module, first)}
    values = {
        f"qat/{kind}/max": max((v for v in by_site.values() if not math.isnan(v)), default=math.nan)
        for kind, by_site in found.items()
        if by_site
    }
    if rates:
        values["qat/clip_rate/mean"] = mean
    if of == "sites":
        found["range"] = {path: float(amax.max()) for path, amax in recorded_ranges(pl_module).items()}
        values |= {f"qat/{kind}/{path}": value for kind, by_site in found.items() for path, value in by_site.items()}
    # Each process has its own last batch.
    pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def check_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss: object, batch: Any, *, forward: Forward | None
) -> None:
    """Refuse to go on after a non-finite loss.

    Raises:
        QATError: Naming the first site that sees a non-finite value when the module runs on ``batch``.
    """
    if not isinstance(loss, Tensor) or bool(loss.isfinite().all()):
        return
    try:
        with lightning_of(trainer).utilities.seed.isolate_rng():
            site = first_non_finite(pl_module, lambda module: run_on(trainer, pl_module, batch, forward))
        found = f"first seen by {site}" if site else "every site saw finite values only: look at what follows the last one"
    except ERRORS_OF_A_FORWARD as error:
        found = f"by which site first is not known ({error})"
    raise QATError(
        f"the training loss is {loss.mean().item()} in epoch {trainer.current_epoch}, {found}. "
        "A NaN in an input comes from the data or the layer before; in a weight, lower the learning rate"
    )
