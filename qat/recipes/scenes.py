"""Scenes with known boxes for the detection recipe, composed from installed pictures, or drawn.

==========  ======================================================================================  =====================
name        source                                                                                  train / val / test
==========  ======================================================================================  =====================
stamps      cut-out photographs of Debian's tuxpaint-stamps-default, pasted on photographs of the   480 / 120 / 200
            packages scikit-image and scikit-learn, 300 px; labels are COCO's, mapped by hand
shapes      drawn rectangles, ellipses and triangles, 64 px; for tests                              128 / 32 / 32
==========  ======================================================================================  =====================

No stamp and no photograph of the test scenes is in a scene of another part: stamps of each class are dealt to test,
validation and training in turn, so that a class with one stamp is in the test scenes only. Training scenes also show stamps
of things that COCO has no class for. Splits and scenes are drawn with constant seeds, independent of the seed of a run.
Nothing of the stamps (GPL-2) is copied anywhere but into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import QATError
from .cutouts import COCO_CLASSES, PARTS, PHOTOS, SPLIT_SEED, Cutout, deal, find_stamps, open_photo

_SIZES = {"stamps": {"train": 480, "val": 120, "test": 200}, "shapes": {"train": 128, "val": 32, "test": 32}}


class Scenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes in memory.

    Args:
        images: uint8, ``(N, 3, H, W)``.
        targets: For each scene ``boxes`` ``(n, 4)``, float32: left, top, right, bottom in pixels; ``labels`` ``(n,)``, int64.
    """

    def __init__(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> None:
        self.images = images
        self.targets = [dict(target) for target in targets]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image ``(3, H, W)`` in ``[-1, 1]`` and its target."""
        return self.images[index].to(torch.float32) / 127.5 - 1, self.targets[index]


@dataclass(frozen=True)
class SceneData:
    """Train, validation and test scenes.

    Attributes:
        name: As in the table of this module.
        classes: Class names by label.
        image_size: Height and width in pixels.
        train: Training scenes.
        val: Validation scenes.
        test: Test scenes; nothing is chosen by them.
        sha256: Of all pictures, boxes and labels.
    """

    name: str
    classes: Mapping[int, str]
    image_size: int
    train: Scenes
    val: Scenes
    test: Scenes
    sha256: str

    def loader(self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        """A loader of images ``(N, 3, H, W)`` and lists of targets; with ``shuffle`` also without the last, smaller batch."""
        return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=_collate)

    def calibration(self, images: int, batch_size: int) -> DataLoader[Any]:
        """A loader of the first ``images`` training scenes."""
        return self.loader(Subset(self.train, range(min(images, len(self.train)))), batch_size)

    def sizes(self) -> dict[str, int]:
        """Number of scenes of each part."""
        return {part: len(getattr(self, part)) for part in PARTS}

    def objects(self) -> dict[str, int]:
        """Number of labelled objects of each part."""
        return {part: sum(len(target["labels"]) for target in getattr(self, part).targets) for part in PARTS}


def _collate(batch: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return torch.stack([image for image, _ in batch]), [target for _, target in batch]


def load(name: str, data_dir: str | Path, sizes: Mapping[str, int] | None = None) -> SceneData:
    """One of the data sets in the table of this module.

    Args:
        name: The data set.
        data_dir: Folder of the stamps, for ``stamps``.
        sizes: Number of scenes of each part, instead of those in the table.

    Raises:
        QATError: For an unknown name, or where pictures are missing.
    """
    if name not in LOADERS:
        raise QATError(f"data={name!r}: choose one of {', '.join(LOADERS)}")
    return LOADERS[name](Path(data_dir), sizes or _SIZES[name])


def _stamps(folder: Path, sizes: Mapping[str, int]) -> SceneData:
    cutouts = deal(*find_stamps(folder))
    photos = {part: [open_photo(*source) for source in PHOTOS[part]] for part in PARTS}
    parts = {part: _compose_all(part, sizes[part], cutouts[part], photos[part], 300) for part in PARTS}
    return _data("stamps", COCO_CLASSES, 300, parts)


def _compose_all(
    part: str, count: int, cutouts: Sequence[Cutout], photos: Sequence[Image.Image], size: int
) -> tuple[list[NDArray[np.uint8]], list[dict[str, Tensor]]]:
    images, targets = [], []
    for i in range(count):
        # A seed for each scene: more scenes leave the others as they are.
        image, target = compose(cutouts, photos, size, np.random.RandomState([SPLIT_SEED, PARTS.index(part), i]))
        images.append(image)
        targets.append(target)
    return images, targets


def compose(
    cutouts: Sequence[Cutout], photos: Sequence[Image.Image], size: int, rng: np.random.RandomState
) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
    """One scene: a part of a photograph with one to four cut-outs that do not overlap.

    Classes are drawn first, each as often as any other, things without a class half the time where there are some.

    Args:
        cutouts: To draw from.
        photos: To draw from.
        size: Height and width of the scene in pixels.
        rng: Draws everything.

    Returns:
        The image ``(3, size, size)``, uint8, and its target as :class:`Scenes` has it.
    """
    photo = photos[rng.randint(len(photos))]
    side = rng.randint(min(photo.size) // 2, min(photo.size) + 1)
    left, top = (rng.randint(extent - side + 1) for extent in photo.size)
    region = (left, top, left + side, top + side)
    scene = photo.resize((size, size), Image.Resampling.BILINEAR, box=region)
    labels = sorted({cutout.label for cutout in cutouts} - {0})
    unlabelled = [cutout for cutout in cutouts if not cutout.label]
    taken: list[tuple[int, int, int, int]] = []
    found: list[int] = []
    for _ in range(rng.randint(1, 5)):
        if unlabelled and rng.rand() < 0.5:
            chosen = unlabelled[rng.randint(len(unlabelled))]
        else:
            label = labels[rng.randint(len(labels))]
            among = [cutout for cutout in cutouts if cutout.label == label]
            chosen = among[rng.randint(len(among))]
        picture = chosen.image
        factor = rng.uniform(0.2, 0.6) * size / max(picture.size)
        width, height = (max(8, round(extent * factor)) for extent in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        if rng.rand() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(12):
            x, y = rng.randint(size - width + 1), rng.randint(size - height + 1)
            box = (x, y, x + width, y + height)
            if not any(box[0] < r and l < box[2] and box[1] < b and t < box[3] for l, t, r, b in taken):  # noqa: E741
                scene.paste(picture, (x, y), picture)
                taken.append(box)
                found.append(chosen.label)
                break
    return _finished(scene, [(box, label) for box, label in zip(taken, found, strict=True) if label])


def _finished(
    scene: Image.Image, objects: Sequence[tuple[tuple[int, int, int, int], int]]
) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
    boxes = torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label in objects], dtype=torch.int64)
    return np.asarray(scene).transpose(2, 0, 1).copy(), {"boxes": boxes, "labels": labels}


def _shapes(folder: Path, sizes: Mapping[str, int]) -> SceneData:
    parts = {}
    for part in PARTS:
        drawn = [draw(64, np.random.RandomState([SPLIT_SEED, PARTS.index(part), i])) for i in range(sizes[part])]
        parts[part] = [image for image, _ in drawn], [target for _, target in drawn]
    return _data("shapes", {1: "rectangle", 2: "ellipse", 3: "triangle"}, 64, parts)


def draw(size: int, rng: np.random.RandomState) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
    """One scene with a shape or two, one in each half.

    Args:
        size: Height and width of the scene in pixels.
        rng: Draws everything.
    """
    scene = Image.new("RGB", (size, size), tuple(int(level) for level in rng.randint(0, 96, 3)))
    pen = ImageDraw.Draw(scene)
    objects = []
    for half in range(rng.randint(1, 3)):
        label, colour = int(rng.randint(1, 4)), tuple(int(level) for level in rng.randint(128, 256, 3))
        width, height = (int(extent) for extent in rng.randint(size // 4, size // 2, 2))
        x, y = half * size // 2 + int(rng.randint(size // 2 - width + 1)), int(rng.randint(size - height + 1))
        # Corners of a drawing are pixels, which belong to it.
        corners = (x, y, x + width - 1, y + height - 1)
        if label == 1:
            pen.rectangle(corners, fill=colour)
        elif label == 2:
            pen.ellipse(corners, fill=colour)
        else:
            pen.polygon([(corners[0], corners[3]), (x + width // 2, y), corners[2:]], fill=colour)
        objects.append(((x, y, x + width, y + height), label))
    return _finished(scene, objects)


LOADERS: dict[str, Callable[[Path, Mapping[str, int]], SceneData]] = {"stamps": _stamps, "shapes": _shapes}


def _data(
    name: str,
    classes: Mapping[int, str],
    size: int,
    parts: Mapping[str, tuple[list[NDArray[np.uint8]], list[dict[str, Tensor]]]],
) -> SceneData:
    digest = hashlib.sha256()
    scenes = {}
    for part, (images, targets) in parts.items():
        for image, target in zip(images, targets, strict=True):
            for array in (image, target["boxes"].numpy(), target["labels"].numpy()):
                digest.update(np.ascontiguousarray(array).tobytes())
        scenes[part] = Scenes(torch.from_numpy(np.stack(images)), targets)
    return SceneData(name, classes, size, **scenes, sha256=digest.hexdigest())
