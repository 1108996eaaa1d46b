"""What the detection recipe wrote, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from ..errors import QATError
from ..lightning.loading import load_from_checkpoint
from ..preparation import prepare
from ..report import ResultTable
from .detection import DetectionSettings
from .detection_tables import Detected
from .detector import Detector
from .saved_run import SavedRun, read_state
from .scenes import load
from .ssdlite import COCO, TINY, SSDLite, make_anchors
from .training import device_of


def open_detection(folder: Path, metrics: Mapping[str, Any], *, images: int, data_dir: str | None) -> SavedRun:
    """As :func:`qat.recipes.saved.open_run`, which has read ``metrics.json``.

    Args:
        folder: With ``metrics.json`` and ``qat.ckpt``.
        metrics: The content of the former.
        images: How many validation scenes to take.
        data_dir: Folder of the stamps, if it is no longer where it was.

    Raises:
        QATError: If a file is missing or damaged, or does not fit the others.
    """
    settings = DetectionSettings.from_dict(metrics["settings"])
    tables = [_table(folder / "metrics.json", metrics["results"])]
    data = load(settings.data, settings.data_dir if data_dir is None else data_dir)

    def network() -> SSDLite:
        # All weights come from the run.
        return SSDLite(TINY if settings.data == "shapes" else COCO).eval()

    images = min(images, len(data.val))
    # A batch of more is none, and the file may say any number.
    batches = list(data.loader(Subset(data.val, range(images)), min(settings.batch_size, images)))
    placement = prepare(network(), settings.quant, example_inputs=batches[0][0][:1])
    given: dict[str, Any] = {"anchors": make_anchors(network()), "loss": settings.loss, "lr": settings.qat_lr}
    loaded = load_from_checkpoint(Detector, folder / "qat.ckpt", map_location="cpu", model=network(), **given)
    state = read_state(folder / "float.pt") if (folder / "float.pt").exists() else None
    title = f"SSDLite on {data.name}, {data.image_size} px, seed {metrics.get('seed', settings.seed)}"
    name = "the float model, before calibration and fine-tuning"
    return SavedRun(loaded.model.to(device_of(settings.device)).eval(), placement, batches, state, name, tables, title)


def _table(path: Path, results: Mapping[str, Any]) -> ResultTable:
    try:
        found = [Detected(**figures) for figures in results.values()]
        return ResultTable({r.label: _row(r) for r in found}, "ONNX files")
    except (TypeError, AttributeError, ValueError) as error:
        raise QATError(f"{path}: damaged, its results are not those of a recipe: {error}") from error


def _row(r: Detected) -> dict[str, Any]:
    return {
        "mAP50 %": f"{100 * r.map50:.2f}",
        "mAP50-95 %": f"{100 * r.map:.2f}",
        "ONNX MB": f"{r.file_bytes / 1e6:.2f}",
        "int8 weights MB": None if r.int8_weights_bytes is None else f"{r.int8_weights_bytes / 1e6:.2f}",
        "CPU ms": f"{r.cpu_ms:.2f}",
    }
