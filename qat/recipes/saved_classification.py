"""What a classification recipe wrote, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from ..errors import QATError
from ..lightning.loading import load_from_checkpoint
from ..preparation import prepare
from ..report import ResultTable
from .classification import is_unbalanced
from .data import check_stored, load
from .engines import EngineResult
from .images import ImageData
from .models import build, load_weights
from .saved_run import SavedRun, read_state
from .settings import ClassifierSettings
from .tables import Result
from .training import Classifier, device_of


def open_classification(folder: Path, metrics: Mapping[str, Any], *, images: int, data_dir: str | None) -> SavedRun:
    """As :func:`qat.recipes.saved.open_run`, which has read ``metrics.json``.

    Args:
        folder: With ``metrics.json`` and ``qat.ckpt``.
        metrics: The content of the former.
        images: How many validation images to take.
        data_dir: Folder of the data, if it is no longer where it was.

    Raises:
        QATError: If a file is missing or damaged, or does not fit the others, or if the data are not in their folder.
    """
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
