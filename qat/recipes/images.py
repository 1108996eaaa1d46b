"""Images of a classification task in memory or on disk: their splits, augmentation and loaders.

Splits are drawn with a constant seed, independent of the seed of a run.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import QATError
from .stamps import UNLABELLED

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLIT_SEED = 0


@dataclass(frozen=True)
class Augment:
    """Light augmentation of training images.

    Attributes:
        shift: Largest shift in pixels, both ways, filled by reflection.
        flip: Mirror left to right, every second image.
        flip_vertical: Mirror upside down, every second image.
    """

    shift: int = 0
    flip: bool = False
    flip_vertical: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch ``(N, C, H, W)``, each image by itself, with torch's global random state."""
        count, channels, height, width = images.shape
        if self.shift:
            padded = F.pad(images, [self.shift] * 4, mode="reflect")
            rows = torch.randint(2 * self.shift + 1, (count, 1)) + torch.arange(height)
            columns = torch.randint(2 * self.shift + 1, (count, 1)) + torch.arange(width)
            images = padded[
                torch.arange(count)[:, None, None, None],
                torch.arange(channels)[:, None, None],
                rows[:, None, :, None],
                columns[:, None, None, :],
            ]
        for enabled, dim in ((self.flip, 3), (self.flip_vertical, 2)):
            if enabled:
                images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(dim), images)
        return images


class ArrayImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory; a batch is fetched, normalised and augmented in one go.

    Args:
        images: uint8, ``(N, C, H, W)`` with one or three channels.
        labels: int64, ``(N,)``.
        mean: Mean of each of the three channels, of values in ``[0, 1]``.
        std: Standard deviation of each channel.
        augment: What happens to the pictures on top, if anything.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], augment: Augment | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean).reshape(3, 1, 1)
        self.std = torch.tensor(std).reshape(3, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images ``(len(indices), 3, H, W)`` and labels."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen].to(torch.float32) / 255
        images = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        return (self.augment(images) if self.augment else images), self.labels[chosen]


@dataclass(frozen=True)
class ImageData:
    """Train, validation and test images of one task.

    Attributes:
        name: Of the data set.
        classes: Class names, in the order of the labels.
        image_size: Height and width in pixels.
        train: Augmented training images.
        plain_train: The same images without augmentation.
        val: Validation images.
        test: Test images; nothing is chosen by them.
        test_labels: Their labels, int64.
        sha256: Of the pictures and labels (of names and sizes for files on disk).
        in_memory: Whether loaders need no worker processes.
        accepted: Where more than one class may be right: those of every test image, ``(N, K)``, filled up with -1.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    train: Dataset[Any]
    plain_train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    test_labels: NDArray[np.int64]
    sha256: str
    in_memory: bool = field(default=True)
    accepted: NDArray[np.int64] | None = None

    def loader(self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        """A loader of ``(images, labels)``; with ``shuffle`` also without the last, smaller batch."""
        return DataLoader(
            dataset,
            batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(dataset) >= batch_size,  # type: ignore[arg-type]
            collate_fn=_as_fetched if self.in_memory else None,
            num_workers=0 if self.in_memory else os.cpu_count() or 1,
        )

    def calibration(self, images: int, batch_size: int) -> DataLoader[Any]:
        """A loader of ``images`` fixed training images without augmentation."""
        count = len(self.plain_train)  # type: ignore[arg-type]
        order = np.random.RandomState(SPLIT_SEED).permutation(count)[:images]
        return self.loader(Subset(self.plain_train, order.tolist()), batch_size)

    def settled(self, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Predicted classes of the test images, ``(N,)``; one of several right answers counts as the label."""
        if self.accepted is None:
            return predicted
        return np.where((self.accepted == predicted[:, None]).any(1), self.test_labels, predicted)

    def fold(self, index: int, count: int) -> ImageData:
        """Other training and validation images out of the same, for cross-validation; the test images stay.

        Args:
            index: Which of the parts validates, from 0.
            count: Of how many parts. Each has its share of every class, and always the same images.

        Raises:
            QATError: For a part that there is not, fewer images of a class than parts, or files on disk.
        """
        from sklearn.model_selection import StratifiedKFold

        train, plain, val = self.train, self.plain_train, self.val
        if not (isinstance(train, ArrayImages) and isinstance(plain, ArrayImages) and isinstance(val, ArrayImages)):
            raise QATError(f"data={self.name!r}: cross-validation is for images in memory")
        if not 0 <= index < count:
            raise QATError(f"fold {index} of {count}: choose one from 0 to {count - 1}")
        images, labels = torch.cat([plain.images, val.images]), torch.cat([plain.labels, val.labels])
        if not 2 <= count <= int(labels.bincount(minlength=1)[labels.unique()].min()):
            raise QATError(f"{count} folds: must be at least 2, and at most the images of the rarest class")
        parts = list(StratifiedKFold(count, shuffle=True, random_state=SPLIT_SEED).split(labels, labels))[index]
        fitted, held_out = (torch.from_numpy(part) for part in parts)

        def chosen(like: ArrayImages, rows: Tensor) -> ArrayImages:
            found = copy.copy(like)
            found.images, found.labels = images[rows], labels[rows]
            return found

        return replace(self, train=chosen(train, fitted), plain_train=chosen(plain, fitted), val=chosen(val, held_out))

    def sizes(self) -> dict[str, int]:
        """Number of images of each part."""
        return {part: len(getattr(self, part)) for part in ("train", "val", "test")}


def _as_fetched(batch: Any) -> Any:
    return batch


def split_by_group(
    groups: NDArray[Any], fraction: float, among: NDArray[np.int64] | None = None, *, at_least: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw ``fraction`` of every group, with a constant seed.

    Args:
        groups: Group of every image.
        fraction: Share to draw, rounded in every group.
        among: Indices to draw from; all by default.
        at_least: How many to draw of a group whose share rounds to fewer.

    Returns:
        The indices drawn and those left, both ascending.

    Example:
        >>> drawn, left = split_by_group(np.array([0, 0, 1, 1, 1, 1]), 0.5)
        >>> len(drawn), sorted([*drawn, *left]) == list(range(6))
        (3, True)
    """
    among = np.arange(len(groups)) if among is None else among
    rng = np.random.RandomState(SPLIT_SEED)
    drawn: list[int] = []
    for group in np.unique(groups):
        members = among[groups[among] == group]
        drawn.extend(rng.permutation(members)[: max(round(len(members) * fraction), at_least)])
    return np.sort(np.array(drawn, np.int64)), np.setdiff1d(among, drawn)


def hold_out(train: int, total: int, held_out: int) -> dict[str, NDArray[np.int64]]:
    """Parts of ``total`` images, the first ``train`` of which are not the test set: ``held_out`` of them validate."""
    order = np.random.RandomState(SPLIT_SEED).permutation(train)
    return {"train": np.sort(order[held_out:]), "val": np.sort(order[:held_out]), "test": np.arange(train, total)}


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize ``(N, H, W)`` or ``(N, H, W, 3)`` to ``size`` squared, bilinear with antialiasing."""
    if images.shape[1:3] == (size, size):
        return images
    out = []
    for start in range(0, len(images), 256):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + 256]))
        part = (part[..., None] if part.ndim == 3 else part).permute(0, 3, 1, 2).to(torch.float32)
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
        out.append(part.to(torch.uint8).permute(0, 2, 3, 1).numpy())
    stacked = np.concatenate(out)
    return stacked[..., 0] if images.ndim == 3 else stacked


def from_arrays(
    name: str,
    classes: Sequence[str],
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    parts: dict[str, NDArray[np.int64]],
    size: int | None,
    augment: Augment,
    scale: tuple[float, float] | None = None,
) -> ImageData:
    """Splits of images in memory, normalised by the training images, or by the mean and deviation ``scale``."""
    labels = labels.astype(np.int64)
    if len(images) != len(labels) or labels.min() < UNLABELLED or labels.max() >= len(classes):
        raise QATError(f"data={name!r}: {len(images)} images, {len(labels)} labels, classes outside 0..{len(classes) - 1}")
    images = resize(images, size or images.shape[1])
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()
    pictures = torch.from_numpy(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy())
    channels = [pictures[torch.from_numpy(parts["train"]), c].numpy() / np.float32(255) for c in range(pictures.shape[1])]
    mean = [float(c.mean(dtype=np.float64)) for c in channels] * (3 // len(channels))
    std = [float(c.std(dtype=np.float64)) for c in channels] * (3 // len(channels))
    if scale is not None:
        mean, std = [scale[0]] * 3, [scale[1]] * 3

    def part(key: str, augment: Augment | None = None) -> ArrayImages:
        chosen = torch.from_numpy(parts[key])
        return ArrayImages(pictures[chosen], torch.from_numpy(labels)[chosen], mean, std, augment)

    train = part("train", augment), part("train")
    test_labels = labels[parts["test"]]
    return ImageData(name, tuple(classes), images.shape[1], *train, part("val"), part("test"), test_labels, digest)


def from_folder(name: str, root: Path, size: int, held_out: float) -> ImageData:
    """Pictures on disk in ``<root>/train/<class>`` and ``<root>/val/<class>``; the latter are the test set."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise QATError(f"data={name!r}: {root / part} does not exist; it must hold a folder of pictures for each class")
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    random = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *finish])
    fixed = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), *finish])
    augmented, plain, test = (
        ImageFolder(str(root / part), transform) for part, transform in (("train", random), ("train", fixed), ("val", fixed))
    )
    if plain.classes != test.classes:
        raise QATError(f"data={name!r}: {root / 'train'} and {root / 'val'} hold different classes")
    for label, count in zip(plain.classes, np.bincount(plain.targets, minlength=len(plain.classes)), strict=True):
        if count < 2:
            raise QATError(f"data={name!r}: {root / 'train' / label} holds {count} pictures; one to train and one to validate")
    val, train = split_by_group(np.array(plain.targets), held_out, at_least=1)
    digest = hashlib.sha256()
    for path, label in (*plain.samples, *test.samples):
        digest.update(f"{Path(path).relative_to(root)} {Path(path).stat().st_size} {label}\n".encode())
    return ImageData(
        name,
        tuple(plain.classes),
        size,
        Subset(augmented, train.tolist()),
        Subset(plain, train.tolist()),
        Subset(plain, val.tolist()),
        test,
        np.array(test.targets),
        digest.hexdigest(),
        in_memory=False,
    )
