"""Training a single-shot detector, quantized or not, and running it on scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn

from .boxes import detections, ssd_loss
from .evaluation import open_session
from .scenes import SceneData
from .training import Advance, make_trainer, stage

Targets = list[dict[str, Tensor]]
LOSSES = ("distillation", "labels")


class Detector(pl.LightningModule):
    """Trains a detector by AdamW and a cosine schedule that ends at 1 % of the learning rate.

    Args:
        model: Images to codes and logits.
        anchors: Shape ``(A, 4)``, as shares of the image.
        loss: ``"labels"``: :func:`~qat.recipes.boxes.ssd_loss`. ``"distillation"``: none of its own; that of
            :class:`qat.QATCallback` (``distill_from``) is the whole loss, and targets are not read.
        lr: Learning rate at the start.
        weight_decay: Weight decay.
    """

    anchors: Tensor

    def __init__(self, model: nn.Module, anchors: Tensor, *, loss: str, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("anchors", anchors, persistent=False)
        self.loss = loss
        self.lr = lr
        self.weight_decay = weight_decay

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Codes under ``boxes``, and ``logits``."""
        # The fastest layout for depthwise convolutions, in which the weights are during training.
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Targets], batch_idx: int) -> Tensor:
        """The loss by labels, or zero."""
        images, targets = batch
        out = self(images)
        if self.loss == "distillation":
            # Lightning wants a loss that has a gradient.
            return 0.0 * out["boxes"].sum()
        size = images.shape[-1]
        shares = [{"boxes": target["boxes"] / size, "labels": target["labels"]} for target in targets]
        return ssd_loss(out["boxes"], out["logits"], shares, self.anchors)

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that moves every step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Bar(Callback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_batch_end(self, *args: Any) -> None:
        self.advance()


def fit(
    detector: Detector,
    data: SceneData,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    name: str,
    console: Console,
    device: str = "auto",
    precision: str = "32-true",
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """Train ``detector`` in place, with the same order of scenes for the same ``seed``.

    Returns:
        The trainer, from which a checkpoint can be saved.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    # Lightning leaves training flags alone.
    detector.train()
    detector.model.to(memory_format=torch.channels_last)
    with stage(console, name, steps) as advance:
        limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1}
        trainer = make_trainer(device, precision, callbacks=[*callbacks, _Bar(advance)], **limits)
        trainer.fit(detector, data.loader(data.train, batch_size, shuffle=True))
    detector.model.to(memory_format=torch.contiguous_format)
    return trainer


@torch.no_grad()
def detect_torch(model: nn.Module, batches: Iterable[tuple[Tensor, Any]], anchors: Tensor, size: int) -> Targets:
    """What ``model``, in eval mode on its own device, sees in the scenes of ``batches``.

    Args:
        model: Images to codes and logits.
        batches: Images ``(N, 3, size, size)``, and anything.
        anchors: Shape ``(A, 4)``.
        size: Height and width of an image in pixels.
    """
    device = next(model.parameters()).device
    found: Targets = []
    for images, _ in batches:
        out = model(images.to(device))
        found += detections(out["boxes"].cpu(), out["logits"].cpu(), anchors, size=size)
    return found


def detect_onnx(path: Path, batches: Iterable[tuple[Tensor, Any]], anchors: Tensor, size: int) -> Targets:
    """What the file at ``path`` sees, run by ONNX Runtime with Q/DQ in float; arguments as in :func:`detect_torch`."""
    session = open_session(path, as_written=True)
    name = session.get_inputs()[0].name
    found: Targets = []
    for images, _ in batches:
        codes, logits = (torch.from_numpy(value) for value in session.run(["boxes", "logits"], {name: images.numpy()}))
        found += detections(codes, logits, anchors, size=size)
    return found
