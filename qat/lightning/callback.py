"""Quantization-aware training in Lightning: :class:`QATCallback`, a thin shell over the functions of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.config import QuantConfig
from ..core.quantizer import WeightQuantizer, quantizers
from ..errors import QATError
from ..preparation import restore
from ..support.modes import looking_at
from ..training.batchnorm import freeze_batch_norm, reestimate_batch_norm
from ..training.checkpoints import CHECKPOINT_KEY, check_same_configs, reports, settings_of
from ..training.distillation import Distillation
from ..training.oscillation import oscillation_penalty, ramp
from ..training.ranges import learned_ranges, ranges_are_frozen, recorded_ranges, separate_ranges
from .arguments import calibration_arguments, check_calibration_data, check_choices, export_settings
from .averages import freeze_with_averages, show_to_averages
from .batches import calibrate_on_batches, show_batches
from .compatibility import check_averaging, check_compatible, check_freezable, check_order, warn_of_spawned
from .exporting import check_export, export_arguments, export_at_the_end
from .losses import add_to_loss, distillation_of
from .package import callback_bases, completed, lightning_of, unfinished
from .resuming import freeze_stale_ranges, frozen_by_checkpoint, load_guard, read_intact
from .targets import check_layers, config_for, layers, prepare_module
from .watching import check_loss, log_ranges

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
else:
    # What the user's Trainer knows as a callback, and LightningCLI as a class to build.
    Callback = type("Callback", callback_bases(), {})


class QATCallback(Callback):
    """Prepare, calibrate and fine-tune: ``Trainer(callbacks=[QATCallback()])``.

    The model is prepared in ``setup`` of every stage, so that the optimizer, the strategy and every checkpoint see the
    sites. ``fit`` calibrates before the first step unless the sites have ranges already, prepared by hand or loaded
    from a checkpoint. Nothing is converted at the end: export is a call of its own.

    Args:
        config: What is quantized and how, a :class:`~qat.QuantConfig` or a mapping of its settings. ``None`` means the
            defaults, or those of a model that is prepared already. It travels in the checkpoint; loading one that was
            saved with another config is an error.
        calibration: Keyword arguments of :func:`qat.calibrate` (``method``, ``batches``, ...). By default 32 batches, or as
            many as the trainer is limited to, if that is less. Progress is shown if the trainer shows its own.
        calibration_data: Batches to calibrate from, such as a loader or a list of them. By default those of the train loader,
            without moving the random state that orders the training batches.
        forward: ``forward(module, batch)`` runs the LightningModule on one batch, for calibration and for naming the
            source of a non-finite loss. By default ``module(x)``, with the first element of the batch as ``x``; without a
            ``forward`` of its own, the one prepared sub-model is called.
        target: Attribute path, or paths, of the sub-models to prepare. By default every child that holds convolution,
            linear or attention layers, except metrics, losses and frozen teachers. When the layers are attributes of
            the LightningModule itself, or of several children that its ``forward`` chains, it is prepared as a whole.
        freeze_bn_epoch: First epoch (from 0) with frozen batch-norm statistics in the prepared sub-models; ``None`` never
            freezes them. Frozen from the start is safe with batches of any size; half of the epochs was better in our ablations
            with batches of 32 and more, most of all with 4-bit weights, and worse with batches of 4 (benchmarks/RESULTS.md).
        reestimate_bn: Number of training batches over which the batch-norm statistics of the prepared sub-models are averaged
            anew at the end of each epoch, before its validation; ``None`` leaves them. Costs as many forward passes.
        learn_scales: Overrides ``config.learn_scales``.
        export: ONNX file to write when ``fit`` ends, or a mapping of the arguments of :func:`qat.export_onnx` with ``path``.
            Inputs are those of ``example_input_array``, or ``example_inputs`` in the mapping. What is exported is the model
            as ``fit`` leaves it, averaged where a callback averages weights: to export the best checkpoint, load it and call
            :func:`qat.export_onnx`.
        freeze_ranges_epoch: First epoch with frozen ranges: those of weights stop following them, learned ones stop training.
            ``None`` never freezes them. Frozen ones stay so, in another ``fit``, too. Learned ones need
            ``find_unused_parameters`` with DDP.
        distill_from: A teacher whose outputs the quantized model learns to give, besides what its ``training_step`` asks for
            (which may return ``0 * outputs.sum()``, without labels): a model that is called as the prepared one, or
            ``"float"``: what that one is when ``fit`` begins, before it is quantized. Not part of checkpoints: to resume,
            build the same model again.
        distill_weight: What the distance to the teacher is multiplied by before it is added to the loss.
        distill_loss: ``distill_loss(student_output, teacher_output)``. By default the divergence of class probabilities.
        dampen_oscillations: What :func:`~qat.oscillation_penalty` is multiplied by at the end of the training; the factor grows
            from 0 along half a cosine. For few bits. With ``find_unused_parameters`` in DDP, every weight must take part in
            the loss without it.
        log_ranges: What to log at the end of each epoch, by the last batch: the ``"summary"`` (largest and mean clip rate,
            largest change of a range since ``fit`` began), these for all ``"sites"`` with the ranges themselves (the largest of
            a weight's channels), or ``None``.
        range_lr_factor: Learning rate of learned ranges, relative to that of the parameter group they would be in. They get
            groups of their own, without weight decay. Schedules with absolute rates (``eta_min``) set that of both.

    Raises:
        QATError: For an invalid argument. During ``setup``: when there is nothing to quantize, or for a strategy or
            callback that cannot work with this one.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the class that was called: another program may use another Lightning."""
        return unfinished, (vars(type(self)).get("completes", type(self)),), vars(self)

    def __init__(
        self,
        config: QuantConfig | Mapping[str, Any] | None = None,
        *,
        calibration: Mapping[str, Any] | None = None,
        calibration_data: Iterable[Any] | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        target: str | Sequence[str] | None = None,
        freeze_bn_epoch: int | None = 0,
        reestimate_bn: int | None = None,
        learn_scales: bool | None = None,
        export: str | Path | Mapping[str, Any] | None = None,
        freeze_ranges_epoch: int | None = None,
        distill_from: nn.Module | Literal["float"] | None = None,
        distill_weight: float = 1.0,
        distill_loss: Callable[[Any, Any], Tensor] | None = None,
        dampen_oscillations: float = 0.0,
        log_ranges: Literal["summary", "sites"] | None = "summary",
        range_lr_factor: float = 1.0,
    ) -> None:
        # A callback of every Lightning that is imported by now, not only when this class was made.
        self.__class__ = completed(type(self))
        check_choices(
            log_ranges=log_ranges,
            freeze_bn_epoch=freeze_bn_epoch,
            freeze_ranges_epoch=freeze_ranges_epoch,
            range_lr_factor=range_lr_factor,
            reestimate_bn=reestimate_bn,
            distill_from=distill_from,
            dampen_oscillations=dampen_oscillations,
        )
        check_calibration_data(calibration_data)
        self.config = QuantConfig.from_dict(config) if isinstance(config, Mapping) else config
        # Sub-models that are prepared already keep their other settings.
        self._only_learn_scales = config is None and learn_scales is not None
        if learn_scales is not None:
            self.config = (self.config or QuantConfig()).replace(learn_scales=learn_scales)
        self.calibration = calibration_arguments(calibration)
        self.calibration_data = calibration_data
        self.forward = forward
        self.target = (target,) if isinstance(target, str) else None if target is None else tuple(target)
        self.freeze_bn_epoch = freeze_bn_epoch
        self.reestimate_bn = reestimate_bn
        self.export = export_settings(export)
        self.freeze_ranges_epoch = freeze_ranges_epoch
        self.distill_from = distill_from
        self.distill_weight = distill_weight
        self.distill_loss = distill_loss
        self.dampen_oscillations = dampen_oscillations
        self.log_ranges = log_ranges
        self.range_lr_factor = range_lr_factor
        self._ranges: dict[str, Tensor] = {}
        self._seen: set[int] | None = None
        self._distillation: Distillation | None = None
        # Outlives fit, for checkpoints that are saved afterwards.
        self._fingerprint: str | None = None
        self._load_hooks: list[Any] = []
        self._last_step: tuple[Any, Any] | None = None
        self._still: dict[str, nn.Module] = {}

    # Insertion

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the model."""
        check_compatible(trainer, self, freezes_batch_norm=self.freeze_bn_epoch is not None)
        if stage == "fit":
            self._ranges = {}
        if not pl_module.automatic_optimization and (self.distill_from is not None or self.dampen_oscillations):
            raise QATError(
                "distill_from, dampen_oscillations: are added to the loss of automatic optimization. In a training_step that "
                "calls manual_backward itself, add qat.distillation.Distillation.loss() and qat.oscillation_penalty() there"
            )
        read_intact(trainer)
        # Layers made in this hook must exist now; Lightning requires it to work when it is called again.
        if lightning_of(trainer).utilities.model_helpers.is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        before = reports(pl_module)
        was_prepared = bool(before)
        prepare_module(pl_module, config_for(before, self.config, only_learn_scales=self._only_learn_scales), self.target)
        try:
            self._check(trainer, pl_module, stage)
        except QATError:
            for path in reports(pl_module).keys() - before.keys():
                restore(pl_module.get_submodule(path))
            raise
        if stage == "fit" and not was_prepared:
            warn_of_spawned(trainer)
        # LightningModule.setup comes after this hook.
        self._seen = None if was_prepared or self.target else {id(layer) for layer in layers(pl_module)}
        self._remove_load_hooks()
        self._load_hooks = [
            pl_module.register_load_state_dict_pre_hook(load_guard(trainer)),
            pl_module.register_load_state_dict_post_hook(freeze_stale_ranges(trainer)),
        ]

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what does not fit the prepared sub-models."""
        if stage != "fit":
            return
        if self.distill_from is not None:
            # Before a checkpoint is loaded: the weights are those that fit begins with.
            distillation = distillation_of(trainer, pl_module, self.distill_from, self.distill_loss)
            if self._distillation is not None:
                self._distillation.remove()
            self._distillation = distillation
            self._fingerprint = distillation.fingerprint()
        if self.export is not None:
            export_arguments(pl_module, self.export)
        if learned_ranges(pl_module):
            check_order(trainer, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop what belongs to one run of the trainer."""
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None
        self._remove_load_hooks()
        self._last_step = None
        self._still = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tear down, which Lightning leaves out then: the module may be used again."""
        self.teardown(trainer, pl_module, "fit")

    def _remove_load_hooks(self) -> None:
        for hook in self._load_hooks:
            hook.remove()
        self._load_hooks = []

    # Checkpoints

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the configuration as plain values."""
        checkpoint[CHECKPOINT_KEY] = settings_of(pl_module)
        if self._fingerprint is not None:
            checkpoint[CHECKPOINT_KEY]["teacher"] = self._fingerprint
        if self._ranges:
            # What changes of ranges are relative to, also after resuming.
            checkpoint[CHECKPOINT_KEY]["first_ranges"] = {path: amax.cpu() for path, amax in self._ranges.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration; freeze ranges that were frozen."""
        check_same_configs(checkpoint, pl_module)
        teacher = checkpoint.get(CHECKPOINT_KEY, {}).get("teacher")
        if self._distillation is not None and teacher not in (None, self._fingerprint):
            raise QATError(
                "distill_from: the teacher is not the one that the checkpoint was trained with. Build the LightningModule with "
                "the same float weights as then, or pass that model"
            )
        ranges = checkpoint.get(CHECKPOINT_KEY, {}).get("first_ranges", {})
        self._ranges = lightning_of(trainer).utilities.move_data_to_device(dict(ranges), pl_module.device)
        # The weights and ranges are loaded already.
        freeze_with_averages(trainer, pl_module, refresh=False, sites=frozen_by_checkpoint(trainer, pl_module, checkpoint))

    # Training

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate, unless the sites have ranges."""
        self._remove_load_hooks()
        if self.freeze_ranges_epoch is not None:
            check_freezable(trainer, pl_module)
        ranges_to_float32(pl_module)
        if self._distillation is not None:
            teacher = self._distillation.teacher.to(pl_module.device)
            self._distillation.teacher = trainer.precision_plugin.convert_module(teacher)
        if self._seen is not None:
            check_layers(pl_module, self._seen)
        if self.export is not None:
            check_export(trainer, pl_module, self.export)
        lost = self._separate_ranges(trainer, pl_module)
        check_averaging(trainer)
        if lost:
            lightning_of(trainer).utilities.rank_zero_warn(
                f"no optimizer has the learned ranges of {len(lost)} sites, so they stay: {', '.join(lost[:3])}, ..."
            )
        models = [pl_module.get_submodule(path) for path in reports(pl_module)]
        left = [model for model in models if not _has_ranges(model)]
        if not left or (trainer.limit_train_batches == 0 and self.calibration_data is None):
            return
        # Outside isolate_rng: the loader built here is the one that training uses, and draws what it would have drawn.
        trainer.fit_loop.setup_data()
        # All, or those that nobody has calibrated before; at once, as the data may be there only once.
        calibrate_on_batches(
            trainer,
            pl_module,
            pl_module if left == models else nn.ModuleList(left),
            options=self.calibration,
            data=self.calibration_data,
            forward=self.forward,
        )
        show_to_averages(trainer, pl_module)

    def _separate_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        schedulers = [entry.scheduler for entry in trainer.lr_scheduler_configs]
        return separate_ranges(pl_module, trainer.optimizers, schedulers, lr_factor=self.range_lr_factor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze what is due when training starts or resumes in the middle of an epoch."""
        if self.log_ranges is not None and not self._ranges:
            self._ranges = recorded_ranges(pl_module)
        self._ranges = lightning_of(trainer).utilities.move_data_to_device(self._ranges, pl_module.device)
        if self.dampen_oscillations and not 0 < trainer.estimated_stepping_batches < math.inf:
            raise QATError(
                "dampen_oscillations: grows towards the last step, and the loader or the trainer does not say how many steps "
                "there are. Use Trainer(max_steps=...)"
            )
        self._freeze(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze what is due at the start of each epoch: batch norm after whatever called ``train()`` there."""
        if batch_idx == 0:
            # Other callbacks may have given ranges to an optimizer since, with those of a layer that they unfroze.
            self._separate_ranges(trainer, pl_module)
            self._freeze(trainer, pl_module)
        if self._distillation is not None:
            self._distillation.forget()
            self._distillation.listening = True

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.freeze_bn_epoch is not None and trainer.current_epoch >= self.freeze_bn_epoch:
            self._still = {}
            for path in reports(pl_module):
                part = pl_module.get_submodule(path)
                self._still |= {f"{path}.{name}".strip("."): part.get_submodule(name) for name in freeze_batch_norm(part)}
        due = self.freeze_ranges_epoch is not None and trainer.current_epoch >= self.freeze_ranges_epoch
        if due and not ranges_are_frozen(pl_module):
            freeze_with_averages(trainer, pl_module, refresh=True)

    # Further terms of the loss

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the distance to the teacher and the penalty on oscillations to the loss."""
        if self._distillation is not None:
            with trainer.precision_plugin.forward_context():
                distance = self._distillation.loss()
            pl_module.log("distillation", distance.detach())
            add_to_loss(trainer, pl_module, loss, self.distill_weight * distance)
        if self.dampen_oscillations:
            penalty = oscillation_penalty(pl_module)
            pl_module.log("oscillation_penalty", penalty.detach())
            factor = self.dampen_oscillations * ramp(trainer.global_step / trainer.estimated_stepping_batches)
            add_to_loss(trainer, pl_module, loss, factor * penalty)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export: behind ``on_train_end``, where averaged weights are put in."""
        if self.export is not None:
            export_at_the_end(trainer, pl_module, self.export)

    # Non-finite losses

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average batch-norm statistics after the last step; remember the step, unread: that would synchronise every time."""
        if self._distillation is not None:
            self._distillation.listening = False
        moved = next((path for path, norm in self._still.items() if norm.training), None)
        if moved is not None:
            raise QATError(
                f"{moved}: its statistics are frozen, and training_step put it into training mode. Call train() on the parts "
                "that need it, or use QATCallback(freeze_bn_epoch=None)"
            )
        # In manual optimization the outputs of a step may be anything.
        self._last_step = (outputs.get("loss") if isinstance(outputs, Mapping) else outputs, batch)
        if not (trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step):
            return
        if self.reestimate_bn is not None:
            prepared = nn.ModuleList(pl_module.get_submodule(path) for path in reports(pl_module))
            with looking_at(pl_module, keep_tensors=False):
                reestimate_batch_norm(
                    prepared, lambda _: show_batches(trainer, pl_module, self.reestimate_bn, forward=self.forward)
                )
        if self.log_ranges is not None:
            log_ranges(trainer, pl_module, batch, first=self._ranges, of=self.log_ranges, forward=self.forward)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the last loss before a checkpoint of it can be kept as the best."""
        self._check_loss(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the last loss of the epoch: a loss that was ever non-finite has ruined the weights, and stays so."""
        self._check_loss(trainer, pl_module)

    def _check_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_step is None:
            return
        loss, batch = self._last_step
        self._last_step = None
        check_loss(trainer, pl_module, loss, batch, forward=self.forward)


def _has_ranges(model: nn.Module) -> bool:
    return any(site.has_range for _, site in quantizers(model) if not isinstance(site, WeightQuantizer))


def ranges_to_float32(model: nn.Module) -> None:
    """Bring every range back to float32, in place: ``Trainer(precision="bf16-true")`` casts all floating tensors."""
    for _, site in quantizers(model):
        site.amax.data = site.amax.data.to(torch.float32)
