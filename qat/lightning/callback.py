"""Quantization-aware training in Lightning: :class:`QATCallback`, a thin shell over the functions of the package."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from ..calibration import calibrate
from ..calibration.collect import check_data
from ..core.config import QuantConfig
from ..core.quantizer import State, WeightQuantizer, is_prepared, quantizers
from ..errors import QATError
from ..export import export_onnx
from ..preparation import Report, restore
from ..support.batches import run_batch
from ..support.inputs import call
from ..support.modes import keep_generators, looking_at, uncompiled
from ..training.batchnorm import freeze_batch_norm, reestimate_batch_norm
from ..training.checkpoints import (
    CHECKPOINT_KEY,
    check_same_configs,
    frozen_by_config,
    frozen_in,
    reports,
    settings_of,
)
from ..training.distillation import Distillation, float_copy
from ..training.nonfinite import first_non_finite
from ..training.oscillation import oscillation_penalty, ramp
from ..training.ranges import (
    clip_rates,
    freeze_ranges,
    frozen_ranges,
    learned_ranges,
    range_drift,
    ranges_are_frozen,
    recorded_ranges,
    separate_ranges,
)
from .compatibility import check_averaging, check_compatible, check_freezable, check_order
from .resuming import IntactCheckpointIO, freeze_stale_ranges, load_guard
from .targets import LAYERS, layers, prepare_module

DEFAULT_BATCHES = 32
# What the forward of a model raises that is run on something else than it takes.
_ERRORS_OF_A_FORWARD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class QATCallback(Callback):
    """Prepares, calibrates and fine-tunes: ``Trainer(callbacks=[QATCallback()])``.

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
        if log_ranges not in ("summary", "sites", None):
            raise QATError(f"log_ranges={log_ranges!r}: choose 'summary', 'sites' or None")
        self.log_ranges = log_ranges
        self._ranges: dict[str, Tensor] = {}
        self._seen: set[int] | None = None
        for name, epoch in (("freeze_bn_epoch", freeze_bn_epoch), ("freeze_ranges_epoch", freeze_ranges_epoch)):
            if epoch is not None and epoch < 0:
                raise QATError(f"{name}={epoch}: must be an epoch from 0, or None never to freeze")
        if not range_lr_factor > 0:
            raise QATError(f"range_lr_factor={range_lr_factor}: must be above 0")
        self.config = QuantConfig.from_dict(config) if isinstance(config, Mapping) else config
        # Sub-models that are prepared already keep their other settings.
        self._only_learn_scales = config is None and learn_scales is not None
        if learn_scales is not None:
            self.config = (self.config or QuantConfig()).replace(learn_scales=learn_scales)
        self.calibration = dict(calibration or {})
        _check_keys("calibration", self.calibration, calibrate, ("model", "data"))
        batches = self.calibration.get("batches")
        if batches is not None and not (isinstance(batches, int) and batches > 0):
            raise QATError(f"calibration: batches={batches!r}: must be a number from 1, or None for all")
        self.export = None if export is None else dict(export) if isinstance(export, Mapping) else {"path": export}
        if self.export is not None:
            _check_keys("export", self.export, export_onnx, ("model",))
            if "path" not in self.export:
                raise QATError("export: a mapping needs 'path', the ONNX file to write")
        if reestimate_bn is not None and reestimate_bn < 1:
            raise QATError(f"reestimate_bn={reestimate_bn}: must be a number of batches from 1, or None")
        self.reestimate_bn = reestimate_bn
        if calibration_data is not None:
            if callable(calibration_data) and not hasattr(calibration_data, "__iter__"):
                raise QATError("calibration_data: is a function; pass a loader or a list of batches")
            check_data(calibration_data, None)
        self.calibration_data = calibration_data
        self.forward = forward
        self.target = (target,) if isinstance(target, str) else None if target is None else tuple(target)
        self.freeze_bn_epoch = freeze_bn_epoch
        self.freeze_ranges_epoch = freeze_ranges_epoch
        self.range_lr_factor = range_lr_factor
        if distill_from is not None and distill_from != "float" and not isinstance(distill_from, nn.Module):
            raise QATError(f"distill_from={distill_from!r}: must be a model, or 'float' for the one before it is quantized")
        self.distill_from = distill_from
        self.distill_weight = distill_weight
        self.distill_loss = distill_loss
        if not dampen_oscillations >= 0:
            raise QATError(f"dampen_oscillations={dampen_oscillations}: must be at least 0, which leaves it out")
        self.dampen_oscillations = dampen_oscillations
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
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            # Other plugins know the files that they write. No hook comes between the path of a checkpoint and its loading.
            trainer.strategy.checkpoint_io = IntactCheckpointIO()
        # Layers made in this hook must exist now; Lightning requires it to work when it is called again.
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        before = reports(pl_module)
        was_prepared = bool(before)
        prepare_module(pl_module, self._config_for(before), self.target)
        try:
            self._check(trainer, pl_module, stage)
        except QATError:
            for path in reports(pl_module).keys() - before.keys():
                restore(pl_module.get_submodule(path))
            raise
        if stage == "fit" and not was_prepared and trainer.world_size > 1 and multiprocessing.parent_process() is not None:
            # ddp_spawn, ddp_fork and ddp_notebook: back there Lightning copies the weights that it finds by name.
            rank_zero_warn(
                "the process that called fit gets the weights, but no ranges: there the model is not prepared. To use it after "
                "fit, call qat.prepare on it before, or qat.load_from_checkpoint afterwards"
            )
        # LightningModule.setup comes after this hook.
        self._seen = None if was_prepared or self.target else {id(layer) for layer in layers(pl_module)}
        self._remove_load_hooks()
        self._load_hooks = [
            pl_module.register_load_state_dict_pre_hook(load_guard(trainer)),
            pl_module.register_load_state_dict_post_hook(freeze_stale_ranges(trainer)),
        ]

    def _config_for(self, found: Mapping[str, Report]) -> QuantConfig | None:
        """The configuration to prepare with; ``None`` takes what is prepared as it is."""
        if not found or not self._only_learn_scales:
            return self.config
        assert self.config is not None
        for path, report in found.items():
            if report.config.learn_scales != self.config.learn_scales:
                raise QATError(
                    f"{path or 'the LightningModule'} is prepared already, with another learn_scales: call qat.restore on it "
                    "first, or leave learn_scales out"
                )
        return None

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """What depends on the prepared sub-models."""
        if stage != "fit":
            return
        if self.distill_from is not None:
            # Before a checkpoint is loaded: the weights are those that fit begins with.
            self._set_teacher(trainer, pl_module)
        if self.export is not None:
            self._exported(pl_module)
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
        """As ``teardown``, which is not called then: the module may be used again."""
        self.teardown(trainer, pl_module, "fit")

    def _set_teacher(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        paths = list(reports(pl_module))
        if len(paths) != 1:
            raise QATError(f"distill_from: {len(paths)} prepared sub-models ({', '.join(paths)}): name one by target=")
        if paths == [""] and isinstance(trainer.strategy, DDPStrategy):
            raise QATError(
                "distill_from: the LightningModule is prepared as a whole, and DDP calls its training_step in the place of its "
                "forward. Put the layers into one sub-model, as self.model"
            )
        student = pl_module.get_submodule(paths[0])
        teacher = self.distill_from if isinstance(self.distill_from, nn.Module) else float_copy(student)
        if self._distillation is not None:
            self._distillation.remove()
        self._distillation = Distillation(student, teacher, self.distill_loss)
        # Only in steps of training: a learning-rate finder trains without callbacks.
        self._distillation.listening = False
        self._fingerprint = self._distillation.fingerprint()

    def _exported(self, pl_module: pl.LightningModule) -> tuple[nn.Module, dict[str, Any]]:
        """The model to export, and the arguments: what is wrong with them must be said before training."""
        assert self.export is not None
        paths = list(reports(pl_module))
        if len(paths) != 1:
            raise QATError(f"export: {len(paths)} prepared sub-models ({', '.join(paths)}): name one by target=")
        options = {"example_inputs": getattr(pl_module, "example_input_array", None), **self.export}
        if options["example_inputs"] is None:
            raise QATError(
                "export: set example_input_array in the LightningModule, or pass export={'path': ..., 'example_inputs': ...}"
            )
        folder = Path(options["path"]).parent
        if not folder.is_dir():
            raise QATError(f"export: {folder} is no folder to write {Path(options['path']).name} into. Make it first")
        return pl_module.get_submodule(paths[0]), options

    def _check_export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the model on the inputs that it is to be exported with."""
        model, options = self._exported(pl_module)
        inputs = trainer.precision_plugin.convert_input(move_data_to_device(options["example_inputs"], pl_module.device))
        try:
            forward = trainer.precision_plugin.forward_context()
            with looking_at(model, keep_random=True), forward:
                call(model, inputs)
        except _ERRORS_OF_A_FORWARD as error:
            raise QATError(
                f"export: the model cannot be run on example_inputs: {error}. Pass export={{'path': ..., 'example_inputs': "
                "...}} with what the model itself takes, which may be other than what the LightningModule takes"
            ) from error

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
        self._ranges = move_data_to_device(dict(ranges), pl_module.device)
        # The weights and ranges are loaded already.
        frozen = frozen_in(checkpoint.get(CHECKPOINT_KEY, {}), pl_module)
        if trainer.training:
            more = sorted(frozen_ranges(pl_module) - frozen_by_config(pl_module) - frozen)
            if more and CHECKPOINT_KEY in checkpoint:
                raise QATError(
                    f"{more[0]}: its range is frozen here, and moved when the checkpoint was saved. Build the LightningModule "
                    "anew to resume from it"
                )
        _freeze_all(trainer, pl_module, refresh=False, sites=frozen)

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
        self._check_layers(pl_module)
        if self.export is not None:
            self._check_export(trainer, pl_module)
        lost = self._separate_ranges(trainer, pl_module)
        check_averaging(trainer)
        if lost:
            rank_zero_warn(
                f"no optimizer has the learned ranges of {len(lost)} sites, so they stay: {', '.join(lost[:3])}, ..."
            )
        models = [pl_module.get_submodule(path) for path in reports(pl_module)]
        left = [model for model in models if not _has_ranges(model)]
        if not left or (trainer.limit_train_batches == 0 and self.calibration_data is None):
            return
        # Outside isolate_rng: the loader built here is the one that training uses, and draws what it would have drawn.
        trainer.fit_loop.setup_data()
        # All, or those that nobody has calibrated before; at once, as the data may be there only once.
        self._calibrate(trainer, pl_module, pl_module if left == models else nn.ModuleList(left))
        _show_to_averages(trainer, pl_module)

    def _separate_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        schedulers = [entry.scheduler for entry in trainer.lr_scheduler_configs]
        return separate_ranges(pl_module, trainer.optimizers, schedulers, lr_factor=self.range_lr_factor)

    def _check_layers(self, pl_module: pl.LightningModule) -> None:
        if self._seen is None:
            return
        measures = [m for m in pl_module.modules() if isinstance(m, Metric | MetricCollection)]
        apart = {id(inner) for measure in measures for inner in measure.modules()}
        late = [
            path
            for path, module in pl_module.named_modules()
            if isinstance(module, LAYERS)
            and id(module) not in self._seen | apart
            and any(p.requires_grad for p in module.parameters())
        ]
        if late:
            raise QATError(
                f"{late[0]} was made in LightningModule.setup, which comes after the sites and the head were chosen. Build the "
                "layers in __init__ or configure_model, or name the sub-model to quantize: QATCallback(target=...)"
            )

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
        options = dict(self.calibration)
        limit = trainer.num_training_batches if self.calibration_data is None else DEFAULT_BATCHES
        batches = options.pop("batches", int(min(DEFAULT_BATCHES, limit)))
        options.setdefault("progress", trainer.progress_bar_callback is not None)
        shown = 0

        def show(module: nn.Module) -> None:
            nonlocal shown
            shown = self._show(trainer, pl_module, batches, self.calibration_data)

        calibrate(model, show, **options)
        if "batches" in self.calibration and batches is not None and shown < batches:
            rank_zero_warn(f"calibration: the loader ended after {shown} of {batches} batches")

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int | None, data: Any = None) -> int:
        """Run the module on the first batches of the training data, or other data, which draw no random numbers by that.

        Returns:
            How many there were.
        """
        if data is None:
            data = CombinedLoader(trainer.train_dataloader, "min_size")
            # Persistent workers have one iterator, which training may have begun.
            data.flattened = [_own_iterator(loader) for loader in data.flattened]
        combined = isinstance(data, CombinedLoader)
        count = 0
        with isolate_rng(), keep_generators(data.flattened if combined else [data]), uncompiled():
            shown = (batch for batch, *_ in iter(data)) if combined else iter(data)
            for batch in itertools.islice(shown, batches):
                # In the order of Lightning's own loop.
                batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
                self._run(trainer, pl_module, trainer.strategy.batch_to_device(batch))
                count += 1
        return count

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
        """Run the module on a batch as its steps see it, which is behind the hooks of the transfer to a device."""
        with trainer.precision_plugin.forward_context():
            if self.forward is not None:
                return self.forward(pl_module, batch)
            try:
                return run_module(pl_module, batch)
            except _ERRORS_OF_A_FORWARD as error:
                raise QATError(
                    f"{type(pl_module).__name__} cannot be run on a batch as its first element: {error}. "
                    "Pass QATCallback(forward=lambda module, batch: ...)"
                ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze what is due when training starts or resumes in the middle of an epoch."""
        if self.log_ranges is not None and not self._ranges:
            self._ranges = recorded_ranges(pl_module)
        self._ranges = move_data_to_device(self._ranges, pl_module.device)
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
            _freeze_all(trainer, pl_module, refresh=True)

    # Further terms of the loss

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the distance to the teacher and the penalty on oscillations to the loss."""
        if self._distillation is not None:
            with trainer.precision_plugin.forward_context():
                distance = self._distillation.loss()
            pl_module.log("distillation", distance.detach())
            _add_to_loss(trainer, pl_module, loss, self.distill_weight * distance)
        if self.dampen_oscillations:
            penalty = oscillation_penalty(pl_module)
            pl_module.log("oscillation_penalty", penalty.detach())
            factor = self.dampen_oscillations * ramp(trainer.global_step / trainer.estimated_stepping_batches)
            _add_to_loss(trainer, pl_module, loss, factor * penalty)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export: behind ``on_train_end``, where averaged weights are put in."""
        if self.export is None:
            return
        if trainer.is_global_zero:
            model, options = self._exported(pl_module)
            inputs = move_data_to_device(options.pop("example_inputs"), pl_module.device)
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
                # Of bf16-true: files are float32 between Q/DQ.
                model = copy.deepcopy(model).float()
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                # Lightning keeps no checkpoints then, and a good file may be there.
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / Path(options.pop("path")).name
                    export_onnx(model, path, example_inputs=inputs, **options)
                rank_zero_info("fast_dev_run: the export works; its file is not kept")
            else:
                export_onnx(model, example_inputs=inputs, **options)
        trainer.strategy.barrier("qat.export")

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
                reestimate_batch_norm(prepared, lambda _: self._show(trainer, pl_module, self.reestimate_bn))
        if self.log_ranges is not None:
            self._log_ranges(trainer, pl_module, batch)

    def _log_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        rates: dict[str, float] = {}
        try:
            with looking_at(pl_module, keep_random=True):
                rates = clip_rates(pl_module, lambda module: self._run(trainer, pl_module, batch))
        except _ERRORS_OF_A_FORWARD as error:
            # Nobody has run the module on a batch before if it was calibrated by hand.
            rank_zero_warn(
                f"log_ranges: no clip rates, as the model cannot be run on a batch: {error} Or pass QATCallback(forward=...)"
            )
        mean = sum(rates.values()) / len(rates) if rates else math.nan
        if trainer.world_size > 1:
            # Processes that log other values would wait for each other: data may not reach a site, or not run.
            paths = [path for path, site in quantizers(pl_module) if site.state is State.QUANTIZING]
            rates = {path: rates.get(path, math.nan) for path in paths}
        found = {"clip_rate": rates, "range_drift": range_drift(pl_module, self._ranges)}
        values = {
            f"qat/{kind}/max": max((v for v in of.values() if not math.isnan(v)), default=math.nan)
            for kind, of in found.items()
            if of
        }
        if rates:
            values["qat/clip_rate/mean"] = mean
        if self.log_ranges == "sites":
            found["range"] = {path: float(amax.max()) for path, amax in recorded_ranges(pl_module).items()}
            values |= {f"qat/{kind}/{path}": value for kind, of in found.items() for path, value in of.items()}
        # Each process has its own last batch.
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

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
        if not isinstance(loss, Tensor) or bool(loss.isfinite().all()):
            return
        try:
            with isolate_rng():
                site = first_non_finite(pl_module, lambda module: self._run(trainer, pl_module, batch))
            found = f"first seen by {site}" if site else "every site saw finite values only: look at what follows the last one"
        except _ERRORS_OF_A_FORWARD as error:
            found = f"by which site first is not known ({error})"
        raise QATError(
            f"the training loss is {loss.mean().item()} in epoch {trainer.current_epoch}, {found}. "
            "A NaN in an input comes from the data or the layer before; in a weight, lower the learning rate"
        )


def _add_to_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor, term: Tensor) -> None:
    """Add a term to the loss that is about to be differentiated, in place."""
    # Lightning has divided and scaled the loss already.
    if pl_module.automatic_optimization:
        term = term / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    loss.add_((term if scaler is None else scaler.scale(term)).to(loss.dtype))


def _check_keys(argument: str, given: Mapping[str, Any], function: Callable[..., Any], besides: tuple[str, ...]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in besides]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise QATError(f"{argument}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")


def _has_ranges(model: nn.Module) -> bool:
    return any(site.has_range for _, site in quantizers(model) if not isinstance(site, WeightQuantizer))


def _averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the LightningModule that weight averaging has made."""
    found = [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    return [average.module for average in found if average is not None]


def _show_to_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give the ranges to the copies that were made before calibration: validation may run them before an update."""
    for average in _averages(trainer):
        for (_, site), (_, twin) in zip(quantizers(pl_module), quantizers(average), strict=True):
            twin.amax.data.copy_(site.amax.data)
            # Its state dicts then hold ranges of its own weights.
            twin.state = site.state


def _freeze_all(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, refresh: bool, sites: Collection[str] | None = None
) -> None:
    """Freeze ranges of the module, and of averages as they are."""
    freeze_ranges(pl_module, refresh=refresh, sites=sites)
    for average in _averages(trainer):
        freeze_ranges(average, refresh=False, sites=sites)


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


def ranges_to_float32(model: nn.Module) -> None:
    """Bring every range back to float32, in place: ``Trainer(precision="bf16-true")`` casts all floating tensors."""
    for _, site in quantizers(model):
        site.amax.data = site.amax.data.to(torch.float32)


def run_module(pl_module: pl.LightningModule, batch: Any) -> None:
    """Run a LightningModule on one batch as :func:`qat.calibrate` runs a model: with its first element.

    Raises:
        QATError: When the module has no ``forward`` and more than one prepared sub-model, or for a batch that does not say
            what the model takes.
    """
    models: list[nn.Module] = [pl_module]
    if not is_overridden("forward", pl_module):
        models = [child for child in pl_module.children() if is_prepared(child)]
    if len(models) != 1:
        name = type(pl_module).__name__
        raise QATError(f"{name} has no forward and {len(models)} prepared sub-models: pass QATCallback(forward=...)")
    run_batch(models[0], batch, None)
