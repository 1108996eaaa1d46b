"""Terms that are added to the loss of a ``training_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..errors import QATError
from ..training.checkpoints import reports
from ..training.distillation import Distillation, float_copy
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


def distillation_of(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    teacher: nn.Module | Literal["float"],
    loss: Callable[[Any, Any], Tensor] | None,
) -> Distillation:
    """The distillation of the one prepared sub-model, not yet listening.

    Args:
        trainer: It is about to train the module.
        pl_module: The module, prepared.
        teacher: A model, or ``"float"`` for the student as it is now, without sites.
        loss: As ``distill_loss`` of the callback.

    Raises:
        QATError: If it is not clear whose outputs are compared.
    """
    paths = list(reports(pl_module))
    if len(paths) != 1:
        raise QATError(f"distill_from: {len(paths)} prepared sub-models ({', '.join(paths)}): name one by target=")
    if paths == [""] and isinstance(trainer.strategy, lightning_of(trainer).strategies.DDPStrategy):
        raise QATError(
            "distill_from: the LightningModule is prepared as a whole, and DDP calls its training_step in the place of its "
            "forward. Put the layers into one sub-model, as self.model"
        )
    student = pl_module.get_submodule(paths[0])
    distillation = Distillation(student, teacher if isinstance(teacher, nn.Module) else float_copy(student), loss)
    # Only in steps of training: a learning-rate finder trains without callbacks.
    distillation.listening = False
    return distillation


def add_to_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor, term: Tensor) -> None:
    """Add a term to the loss that is about to be differentiated, in place."""
    # Lightning has divided and scaled the loss already.
    if pl_module.automatic_optimization:
        term = term / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    loss.add_((term if scaler is None else scaler.scale(term)).to(loss.dtype))
