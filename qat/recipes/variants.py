"""The models that a classification recipe compares: float, quantized after training, and fine-tuned quantized."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from ..calibration import Calibration, calibrate
from ..calibration.methods import METHODS
from ..lightning.callback import QATCallback
from ..posttraining import correct_biases, equalize, round_weights
from ..preparation import prepare, prepared_report
from ..support.tensor_files import write_tensors
from .images import ImageData
from .models import build, load_weights
from .settings import ClassifierSettings
from .training import FreezeBatchNorm, device_of, fit, make_classifier, stage

LABELS = {
    "float": "float",
    "float_longer": "float trained equally long",
    "ptq": "PTQ",
    "qat": "QAT",
    "qat_fused": "QAT, fused Adds",
}
# More rows with ``compare``.
EQUALIZED, ROUNDED, BOTH, LEARNED = "ptq_equalized", "ptq_rounded", "ptq_equalized_rounded", "qat_learned"
WEIGHTS, WEIGHTS_ROUNDED = "ptq_weights", "ptq_weights_rounded"
# Learned rounding passes over them once for each layer.
ROUNDING_IMAGES = 64


def labels(settings: ClassifierSettings) -> dict[str, str]:
    """The rows of the table, by key."""
    rows = dict(LABELS)
    if settings.compare:
        rows["ptq"] = f"PTQ, {settings.calibration}"
        rows |= {f"ptq_{method}": f"PTQ, {method}" for method in METHODS if method != settings.calibration}
        rows |= {EQUALIZED: "PTQ, equalized", ROUNDED: "PTQ, rounding learned, biases corrected", BOTH: "PTQ, all three"}
        rows |= {WEIGHTS: "PTQ, weights by mse", WEIGHTS_ROUNDED: "PTQ, weights by mse, rounding learned, biases corrected"}
        rows[LEARNED] = "QAT, learned scales"
    if settings.teacher == "float":
        # The float model gives the outputs that it would be trained to give.
        del rows["float_longer"]
    stages = ("float", "ptq", "qat")
    return dict(sorted(rows.items(), key=lambda row: stages.index(row[0].partition("_")[0])))


def train_all(settings: ClassifierSettings, data: ImageData, seed: int, out: Path, console: Console) -> dict[str, nn.Module]:
    """Every model of the table but ``qat_fused``, which is another export of ``qat``; on the CPU, in evaluation mode."""
    model = float_model(settings, data, seed, out, console)
    calibration = data.calibration(settings.calibration_images, settings.batch_size)
    models = {"float": model, **after_training(model, settings, calibration, console)}
    # What fine-tuning starts from, for qat report.
    write_tensors(out / "ptq.pt", models["ptq"].state_dict())

    def tune(name: str, callback: Callback, file: str, *, distill: bool) -> nn.Module:
        tuned = make_classifier(copy.deepcopy(model), settings, fine_tune=True, distill=distill)
        # Lightning leaves training flags alone.
        tuned.train()
        options: dict[str, Any] = {"epochs": settings.qat_epochs, "name": name, "console": console, "seed": seed + 1}
        fit(tuned, data, settings, callbacks=[callback], **options).save_checkpoint(out / file)
        return tuned.model.cpu().eval()

    def tune_quantized(name: str, *, learn_scales: bool, file: str) -> nn.Module:
        callback = QATCallback(
            replace(settings.quant, learn_scales=learn_scales),
            calibration={"method": settings.calibration, "progress": False},
            calibration_data=calibration,
            distill_from=None if settings.teacher == "labels" else "float",
            freeze_bn_epoch=settings.freeze_bn_epoch,
        )
        return tune(name, callback, file, distill=settings.teacher == "float")

    if settings.teacher != "float":
        frozen = FreezeBatchNorm(settings.freeze_bn_epoch)
        models["float_longer"] = tune("float, equally long", frozen, "float_longer.ckpt", distill=False)
    models["qat"] = tune_quantized("quantized fine-tuning (QAT)", learn_scales=settings.quant.learn_scales, file="qat.ckpt")
    if settings.compare:
        models[LEARNED] = tune_quantized("QAT with learned scales", learn_scales=True, file="qat_learned.ckpt")
    return {key: models[key] for key in labels(settings) if key in models}


def float_model(settings: ClassifierSettings, data: ImageData, seed: int, out: Path, console: Console) -> nn.Module:
    """The float model, trained, loaded, or as its package has it; also written to ``out``."""
    torch.manual_seed(seed)
    options = {"small_stem": settings.small_stem, "pretrained": settings.pretrained}
    model = build(settings.arch, len(data.classes), image_size=data.image_size, **options)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    elif settings.epochs:
        base = make_classifier(model, settings, fine_tune=False)
        fit(base, data, settings, epochs=settings.epochs, name="float training", console=console, seed=seed)
    model.cpu().eval()
    write_tensors(out / "float.pt", model.state_dict())
    return model


def after_training(
    model: nn.Module, settings: ClassifierSettings, calibration: DataLoader[Any], console: Console
) -> dict[str, nn.Module]:
    """The models of post-training quantization: the calibrated one and, with ``compare``, what else there is to try.

    Args:
        model: The float model; stays as it is.
        settings: Of the recipe.
        calibration: Training images.
        console: For progress and the summary of what is quantized.
    """
    ptq, calibrated = _calibrated(model, settings, calibration, console, "calibration (PTQ)")
    report = prepared_report(ptq)
    assert report is not None
    console.print(report.summary(), highlight=False)
    models = {"ptq": ptq}
    if settings.compare:
        models |= by_other_methods(ptq, calibrated, settings.calibration)
        equal = copy.deepcopy(model)
        equalize(equal, next(iter(calibration))[0][:4])
        models[EQUALIZED], _ = _calibrated(equal, settings, calibration, console, "calibration, equalized")
        models[ROUNDED] = _rounded(ptq, settings, calibration, console, "learned rounding")
        models[BOTH] = _rounded(models[EQUALIZED], settings, calibration, console, "learned rounding, equalized")
        name = "calibration, weights by mse"
        models[WEIGHTS], _ = _calibrated(model, settings, calibration, console, name, weight_method="mse")
        models[WEIGHTS_ROUNDED] = _rounded(models[WEIGHTS], settings, calibration, console, "learned rounding, weights by mse")
    return {name: found.cpu().eval() for name, found in models.items()}


def by_other_methods(ptq: nn.Module, calibrated: Calibration, method: str) -> dict[str, nn.Module]:
    """Copies of a calibrated model with the ranges of every method but ``method``, which it has again afterwards."""
    models = {}
    for other in METHODS:
        if other != method:
            calibrated.apply(other)
            models[f"ptq_{other}"] = copy.deepcopy(ptq)
    calibrated.apply(method)
    return models


def _calibrated(
    model: nn.Module,
    settings: ClassifierSettings,
    calibration: DataLoader[Any],
    console: Console,
    name: str,
    *,
    weight_method: str = "max",
) -> tuple[nn.Module, Calibration]:
    device = device_of(settings.device)
    quantized = copy.deepcopy(model).to(device)
    # Ranges that follow the weights are their maxima.
    config = settings.quant if weight_method == "max" else replace(settings.quant, weight_range="frozen")
    prepare(quantized, config, example_inputs=next(iter(calibration))[0][:1].to(device))
    with stage(console, name, len(calibration)) as advance:

        def run(model: nn.Module) -> None:
            for images, _ in calibration:
                model(images.to(device))
                advance()

        result = calibrate(quantized, run, method=settings.calibration, weight_method=weight_method, progress=False)
        return quantized, result


def _rounded(
    calibrated: nn.Module, settings: ClassifierSettings, calibration: DataLoader[Any], console: Console, name: str
) -> nn.Module:
    """A copy with learned rounding of the weights and corrected biases."""
    rounded, batches = copy.deepcopy(calibrated), max(ROUNDING_IMAGES // settings.batch_size, 1)
    with stage(console, name, 2) as advance:
        round_weights(rounded, calibration, steps=settings.rounding_steps, batches=batches, progress=False)
        advance()
        correct_biases(rounded, calibration, batches=batches, progress=False)
        advance()
    return rounded
