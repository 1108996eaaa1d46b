"""Float training and quantization-aware fine-tuning of a classifier with Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QATError
from ..support.progress import progress_bar
from ..training.batchnorm import freeze_batch_norm
from .images import ImageData
from .settings import ClassifierSettings


class Advance(Protocol):
    """Moves the progress bar of a stage."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def stage(console: Console, name: str, total: int) -> Iterator[Advance]:
    """One progress bar for one stage of a recipe."""
    with progress_bar(console=console, notes=True) as bar:
        task = bar.add_task(name, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note or bar.tasks[0].fields["note"])

        yield advance


class Classifier(pl.LightningModule):
    """Trains an image classifier by SGD with momentum, or AdamW, and a cosine schedule.

    Args:
        model: Images ``(N, 3, H, W)`` to logits.
        optimizer: ``"sgd"`` with Nesterov momentum 0.9, or ``"adamw"``.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        label_smoothing: Label smoothing of the training loss.
        distill: Learn nothing from the labels: a callback adds the distance to a teacher.
        warm_up: Share of the steps in which the learning rate rises from 4 % of its peak; 0 starts at the peak. It ends
            at 1 % of the peak after fine-tuning (without a warm-up), near zero otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        optimizer: str = "sgd",
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        distill: bool = False,
        warm_up: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.distill = distill
        self.warm_up = warm_up

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy; zero, but with a gradient, where only a teacher is to be learned from."""
        images, labels = batch
        logits = self(images)
        if self.distill:
            return 0.0 * logits.sum()
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1 accuracy, where there are labels."""
        images, labels = batch
        if bool((labels >= 0).all()):
            correct = (self(images).argmax(1) == labels).float().mean()
            self.log("val_top1", correct, batch_size=len(labels), on_epoch=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that moves every step."""
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.warm_up:
            schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.lr, total_steps=steps, pct_start=self.warm_up, cycle_momentum=False
            )
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FreezeBatchNorm(Callback):
    """Freezes batch-norm statistics as :class:`qat.QATCallback` does, for the float model trained equally long.

    Args:
        first: First epoch (from 0) with frozen statistics.
    """

    def __init__(self, first: int) -> None:
        self.first = first

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """At the start of each epoch."""
        if batch_idx == 0 and trainer.current_epoch >= self.first:
            freeze_batch_norm(pl_module)


class _Bar(Callback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_batch_end(self, *args: Any) -> None:
        self.advance()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "val_top1" in trainer.callback_metrics:
            self.advance(0, f"validation top-1 {100 * float(trainer.callback_metrics['val_top1']):.2f} %")


def fit(
    classifier: Classifier,
    data: ImageData,
    settings: ClassifierSettings,
    *,
    epochs: int,
    name: str,
    console: Console,
    seed: int,
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """Train ``classifier`` in place, with the same order of batches for the same ``seed``.

    Returns:
        The trainer, from which a checkpoint can be saved.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    train = data.loader(data.train, settings.batch_size, shuffle=True)
    val = data.loader(data.val, 4 * settings.batch_size)
    with stage(console, name, epochs * len(train)) as advance:
        limits: dict[str, Any] = {"max_epochs": epochs, "num_sanity_val_steps": 0}
        trainer = make_trainer(settings.device, settings.precision, callbacks=[*callbacks, _Bar(advance)], **limits)
        trainer.fit(classifier, train, val)
    return trainer


def make_trainer(device: str, precision: str, **options: Any) -> pl.Trainer:
    """Lightning's Trainer with one device, which writes nothing.

    Args:
        device: Name of an accelerator.
        precision: As Lightning names it.
        options: Of the Trainer.

    Raises:
        QATError: For an accelerator that is unknown or not there, or a precision that Lightning or that device does not have.
    """
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    try:
        return pl.Trainer(accelerator=device, devices=1, precision=precision, **quiet, **options)  # type: ignore[arg-type]
    except (ValueError, MisconfigurationException) as error:
        raise QATError(f"device={device!r}, precision={precision!r}: {error}") from error


def device_of(accelerator: str) -> torch.device:
    """Where calibration and evaluation in PyTorch run: on the accelerator, unless the setting ``device`` says CPU."""
    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def make_classifier(model: nn.Module, settings: ClassifierSettings, *, fine_tune: bool, distill: bool = False) -> Classifier:
    """``model`` with the schedule of float training or of fine-tuning, that by a teacher alone with ``distill``."""
    return Classifier(
        model,
        lr=settings.qat_lr if fine_tune else settings.lr,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        distill=distill,
        warm_up=0.0 if fine_tune else 0.25,
    )
