"""What a recipe wrote, read again: the network with its trained weights, data, and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import QATError
from .saved_classification import open_classification
from .saved_run import SavedRun

_WROTE = "Pass a folder that a recipe wrote, such as runs/resnet"


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
    return open_classification(folder, metrics, images=128 if images is None else images, data_dir=data_dir)


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
