"""What a recipe wrote, read again: the network with its trained weights, data, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from ..errors import QATError
from ..lightning.loading import load_from_checkpoint
from ..preparation import Report, prepare
from ..report import ResultTable
from ..support.tensor_files import read_tensors
from .classification import is_unbalanced
from .data import ImageData, check_stored, load
from .engines import EngineResult
from .models import build, load_weights
from .settings import ClassifierSettings
from .tables import Result
from .training import Classifier, device_of

_WROTE = "Pass a folder that a recipe wrote, such as runs/resnet"


@dataclass(frozen=True)
class SavedRun:
    """One run of a recipe.

    Attributes:
        model: The fine-tuned network with its sites.
        placement: What is quantized, and what is not.
        batches: Validation images and their labels, or targets.
        baseline_state: The state before fine-tuning: of the PTQ model, or of the float model where that was not written.
        baseline_name: What that state is called.
        results: The tables of the run.
        title: Network and data.
    """

    model: nn.Module
    placement: Report
    batches: list[tuple[Tensor, Any]]
    baseline_state: Mapping[str, Tensor] | None
    baseline_name: str
    results: list[ResultTable]
    title: str


def open_run(folder: str | Path, *, images: int | None = None, data_dir: str | None = None) -> SavedRun:
    """Build the network of a run again and load what it wrote. Nothing in its files is executed.

    The files may come from anywhere: they name the data, but nothing is downloaded and nothing but the data is read.

    Args:
        folder: With ``metrics.json`` and ``qat.ckpt``.
        images: How many validation images to take; by default 128, or 16 of the larger scenes of detection.
        data_dir: Folder of the data, if it is no longer where it was.

    Raises:
        QATError: If a file is missing or damaged, or does not fit the others, or if the data are not in their folder.
    """
    folder = Path(folder)
    if images is not None and images < 1:
        raise QATError(f"images={images}: must be positive")
    metrics = _read_metrics(folder / "metrics.json")
    if "settings" not in metrics and "seeds" in metrics:
        seeds = metrics["seeds"] if isinstance(metrics["seeds"], list) else []
        raise QATError(f"{folder}: holds several runs. Pass one of them, such as {folder / f'seed{(seeds or [0])[0]}'}")
    if not isinstance(metrics.get("settings"), dict) or not isinstance(metrics.get("results"), dict):
        raise QATError(f"{folder / 'metrics.json'}: has no settings and results. {_WROTE}")
    if metrics.get("recipe") == "detection":
        # Only here: detection has extra packages.
        from .saved_detection import open_detection

        return open_detection(folder, metrics, images=16 if images is None else images, data_dir=data_dir)
    return _open_classification(folder, metrics, images=128 if images is None else images, data_dir=data_dir)


def _open_classification(folder: Path, metrics: Mapping[str, Any], *, images: int, data_dir: str | None) -> SavedRun:
    settings = ClassifierSettings.from_dict(metrics["settings"])
    source = settings.data_dir if data_dir is None else data_dir
    try:
        check_stored(settings.data, source, settings.image_size)
    except QATError as error:
        raise QATError(f"{error}. A report neither downloads nor makes data: pass their folder by --data-dir") from error
    data = load(settings.data, source, settings.image_size)

    def network() -> nn.Module:
        # All weights come from the run.
        stem = settings.small_stem
        return build(settings.arch, len(data.classes), image_size=data.image_size, small_stem=stem).eval()

    batches = _images(data, images, settings.batch_size)
    placement = prepare(network(), settings.quant, example_inputs=batches[0][0][:1])
    loaded = load_from_checkpoint(Classifier, folder / "qat.ckpt", map_location="cpu", model=network(), lr=settings.qat_lr)
    state, name = _baseline(folder, network())
    title = f"{settings.arch} on {data.name}, {data.image_size} px, seed {metrics.get('seed', settings.seed)}"
    tables = _tables(folder / "metrics.json", metrics, settings, balanced=is_unbalanced(data))
    return SavedRun(loaded.model.to(device_of(settings.device)).eval(), placement, batches, state, name, tables, title)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QATError(f"{path}: cannot be read: {error.strerror}. {_WROTE}") from error
    except (ValueError, RecursionError) as error:
        raise QATError(f"{path}: damaged: {error}. {_WROTE}") from error
    if not isinstance(found, dict):
        raise QATError(f"{path}: holds no settings. {_WROTE}")
    return found


def _images(data: ImageData, count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    total = len(data.val)  # type: ignore[arg-type]
    count = min(count, total)
    # A batch of more is none, and the file may say any number.
    return list(data.loader(Subset(data.val, range(count)), min(batch_size, count)))


def _baseline(folder: Path, model: nn.Module) -> tuple[Mapping[str, Tensor] | None, str]:
    if (folder / "ptq.pt").exists():
        return read_state(folder / "ptq.pt"), "the PTQ model, before fine-tuning"
    if (folder / "float.pt").exists():
        load_weights(model, str(folder / "float.pt"))
        return model.state_dict(), "the float model, before calibration and fine-tuning"
    return None, ""


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        QATError: If it is none.
    """
    remedy = "Run the recipe again, or remove the file"
    state = read_tensors(path, remedy=remedy)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise QATError(f"{path}: no state dict. {remedy}")
    return state


def _tables(path: Path, metrics: Mapping[str, Any], settings: ClassifierSettings, *, balanced: bool) -> list[ResultTable]:
    try:
        results = [Result(**figures) for figures in metrics["results"].values()]
        engines = metrics.get("engines")
        built = [] if engines is None else [EngineResult(**figures) for figures in engines["results"].values()]
        tables = [ResultTable({r.label: _result_row(r, balanced=balanced) for r in results}, "ONNX files; ± standard error")]
        if engines is not None:
            rows = {r.label: _engine_row(r, settings.engine_batch) for r in built}
            tables.append(ResultTable(rows, str(engines["title"]), "engine"))
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise QATError(f"{path}: damaged, its results are not those of a recipe: {error}") from error
    return tables


def _result_row(r: Result, *, balanced: bool) -> dict[str, Any]:
    return {
        "top-1 %": f"{100 * r.top1:.2f} ± {100 * r.stderr:.2f}",
        **({"balanced %": f"{100 * r.balanced:.2f}"} if balanced else {}),
        "as float %": f"{100 * r.as_float:.2f}",
        "ONNX MB": None if r.file_bytes is None else f"{r.file_bytes / 1e6:.2f}",
        "int8 weights MB": None if r.int8_weights_bytes is None else f"{r.int8_weights_bytes / 1e6:.2f}",
        "CPU ms": None if r.cpu_ms is None else f"{r.cpu_ms:.2f}",
    }


def _engine_row(r: EngineResult, batch: int) -> dict[str, Any]:
    return {
        "top-1 %": None if r.top1 is None or r.stderr is None else f"{100 * r.top1:.2f} ± {100 * r.stderr:.2f}",
        "ms, 1 image": None if r.ms is None else f"{r.ms:.3f}",
        f"ms, {batch} images": None if r.ms_batch is None else f"{r.ms_batch:.3f}",
        "MB": f"{r.plan_bytes / 1e6:.2f}",
        **{name: f"{good} of {count}" if count else None for name, (good, count) in _shares(r).items()},
    }


def _shares(r: EngineResult) -> dict[str, tuple[int, int]]:
    return {"INT8 layers": (r.int8[0], r.int8[1]), "fused Adds": (r.adds[0], r.adds[1])}
