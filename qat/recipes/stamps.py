"""Pictures for networks with ImageNet's classes, from packages: without labels for training, with labels for the test.

Debian's tuxpaint-stamps-default holds pictures of single objects, cut out, most of them photographs. ``stamps.csv`` gives the
photographs of one of the 1000 classes the classes that count as right (made by hand, some loosely); with the 20 ImageNet
pictures of foolbox they are the test set. All others, drawings included, and scikit-learn's two photographs are for
calibration and label-free training.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import QATError

STAMPS = Path("/usr/share/tuxpaint/stamps")
# Folders of drawings.
_DRAWN = {"cartoon", "symbols", "toys"}
# White around an object, and what a centre crop leaves of a picture.
_MARGIN, _CROP = 0.10, 0.875
_OPAQUE = 8
UNLABELLED = -1


def accepted_classes() -> dict[str, list[int]]:
    """The ImageNet classes that count as right, by the name of a stamp's file."""
    lines = files(__package__).joinpath("stamps.csv").read_text(encoding="utf-8").splitlines()
    return {row["stamp"]: [int(text) for text in row["classes"].split()] for row in csv.DictReader(lines)}


def read_pictures(size: int, folder: Path = STAMPS) -> dict[str, NDArray[Any]]:
    """All pictures and what they show.

    Args:
        size: Height and width of the result in pixels.
        folder: Where Debian's package puts the stamps.

    Returns:
        ``images`` uint8 ``(N, size, size, 3)``; ``accepted`` int64 ``(N, K)``, the classes that count as right, filled up
        with ``UNLABELLED``.

    Raises:
        QATError: If a package is missing.
    """
    found = [*_stamps(folder), *_photographs()]
    images = np.stack([_cropped(picture, size) for picture, _ in found])
    accepted = np.full((len(found), max(len(classes) for _, classes in found)), UNLABELLED, np.int64)
    for row, (_, classes) in zip(accepted, found, strict=True):
        row[: len(classes)] = classes
    return {"images": images, "accepted": accepted}


def _stamps(folder: Path) -> Iterator[tuple[Image.Image, list[int]]]:
    if not folder.is_dir():
        raise QATError(f"data='stamps': no {folder}. Install Debian's tuxpaint-stamps-default")
    classes = accepted_classes()
    for path in sorted(folder.rglob("*.png")):
        drawn = _DRAWN.intersection(path.relative_to(folder).parts)
        with Image.open(path) as picture:
            yield on_white(picture), [] if drawn else classes.get(path.stem, [])


def on_white(picture: Image.Image) -> Image.Image:
    """What is visible of a cut-out picture, on a white square with a margin."""
    picture = picture.convert("RGBA")
    rows, columns = np.nonzero(np.asarray(picture)[..., 3] > _OPAQUE)
    picture = picture.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    side = int(max(picture.size) * (1 + 2 * _MARGIN))
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB")


def _photographs() -> Iterator[tuple[Image.Image, list[int]]]:
    # Found without importing, which would need all of its dependencies.
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        raise QATError("data='stamps' needs the pictures of foolbox: pip install -e '.[stamps]'")
    for path in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg")):
        with Image.open(path) as picture:
            yield picture.convert("RGB"), [int(path.stem.rpartition("_")[2])]
    from sklearn.datasets import load_sample_images

    yield from ((Image.fromarray(picture), []) for picture in load_sample_images().images)


def _cropped(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """The middle of a picture, ``(size, size, 3)``, after bicubic scaling."""
    scale = round(size / _CROP) / min(picture.size)
    width, height = (max(round(scale * length), size) for length in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)), np.uint8)
