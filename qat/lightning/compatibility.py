"""Refusal, at the start and with the remedy, of those parts of Lightning that cannot work with the callback."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from ..errors import QATError
from ..training.ranges import learned_ranges
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback


def check_compatible(trainer: pl.Trainer, callback: Callback, *, freezes_batch_norm: bool) -> None:
    """Refuse strategies and callbacks that cannot work with a :class:`~qat.QATCallback`.

    Args:
        trainer: That has the callback.
        callback: The callback.
        freezes_batch_norm: Whether it freezes batch-norm statistics at any time.

    Raises:
        QATError: For a sharding strategy, a precision plugin that exchanges layers, for weight averaging that copies the
            model before it is prepared, and for stochastic weight averaging with frozen batch norm.
    """
    lightning = lightning_of(trainer)
    strategies, precisions, callbacks = lightning.strategies, lightning.plugins.precision, lightning.callbacks
    sharded = (strategies.DeepSpeedStrategy, strategies.FSDPStrategy, strategies.ModelParallelStrategy)
    if isinstance(trainer.strategy, sharded):
        raise QATError(
            f"strategy {type(trainer.strategy).__name__}: not supported, it loads checkpoints after the sites were "
            "calibrated. Use a single device or DDP"
        )
    if isinstance(trainer.precision_plugin, (precisions.BitsandbytesPrecision, precisions.TransformerEnginePrecision)):
        raise QATError(
            f"precision plugin {type(trainer.precision_plugin).__name__}: not supported, it has linear layers of its own "
            "formats. Use 32-true, 16-mixed, bf16-mixed or bf16-true"
        )
    before = True
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            before = False
        elif isinstance(other, callbacks.StochasticWeightAveraging) and freezes_batch_norm:
            raise QATError(
                "StochasticWeightAveraging resets the batch-norm statistics and cannot re-estimate them while they are "
                "frozen. Use QATCallback(freeze_bn_epoch=None), or leave the averaging out"
            )
        elif isinstance(other, (callbacks.StochasticWeightAveraging, callbacks.WeightAveraging)) and before:
            name = type(other).__name__
            raise QATError(f"{name} copies the model before it is prepared: list QATCallback before {name}")


def check_averaging(trainer: pl.Trainer) -> None:
    """Refuse learning rates of stochastic weight averaging that are fewer than the parameter groups, ranges included."""
    averaging = lightning_of(trainer).callbacks.StochasticWeightAveraging
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        rates = other._swa_lrs if isinstance(other, averaging) else None
        for optimizer in trainer.optimizers:
            if isinstance(rates, list) and len(rates) != len(optimizer.param_groups):
                raise QATError(
                    f"StochasticWeightAveraging(swa_lrs={rates}): the optimizer has {len(optimizer.param_groups)} parameter "
                    "groups, one for learned ranges behind each that had some. Pass one rate for all"
                )


def check_order(trainer: pl.Trainer, callback: Callback) -> None:
    """Refuse callbacks that keep account of parameter groups and would do so before those of ranges exist."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    finetuning = lightning_of(trainer).callbacks.BaseFinetuning
    late = [c for c in callbacks[callbacks.index(callback) :] if isinstance(c, finetuning)]
    if late:
        name = type(late[0]).__name__
        raise QATError(f"{name} could not resume with the parameter groups of learned ranges: list it before QATCallback")


def check_freezable(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse to freeze learned ranges where DDP waits for the gradient of every parameter that had one at the start."""
    wrapper = trainer.strategy.model
    if not isinstance(wrapper, DistributedDataParallel) or wrapper.find_unused_parameters:
        return
    if any(amax.requires_grad for amax in learned_ranges(pl_module)):
        raise QATError(
            "freeze_ranges_epoch: DDP waits for the gradients of learned ranges, also once they are frozen. Use "
            "Trainer(strategy='ddp_find_unused_parameters_true'), or leave freeze_ranges_epoch out"
        )


def warn_of_spawned(trainer: pl.Trainer) -> None:
    """Say that ranges stay in processes that were started by ``fit`` itself: ddp_spawn, ddp_fork and ddp_notebook."""
    if trainer.world_size > 1 and multiprocessing.parent_process() is not None:
        # Back in the process that called fit, Lightning copies the weights that it finds by name.
        lightning_of(trainer).utilities.rank_zero_warn(
            "the process that called fit gets the weights, but no ranges: there the model is not prepared. To use it after "
            "fit, call qat.prepare on it before, or qat.load_from_checkpoint afterwards"
        )
