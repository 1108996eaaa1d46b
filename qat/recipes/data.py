"""The image classification data of the recipes: fixed, documented splits into train, validation and test.

===============  ==========================================================================  =================================
name             source                                                                      train / validation / test
===============  ==========================================================================  =================================
digits           scikit-learn, in the package                                                60 / 10 / 30 %, by class
fashion-mnist    ``fashion-mnist.npz`` in the data folder, Debian's dataset-fashion-mnist,   55,000 / 5,000 / the published
                 or torchvision's download                                                   test set of 10,000
cifar10          torchvision's download                                                      45,000 / 5,000 / the published
                                                                                             test set of 10,000
elpv             ``elpv-<size>.npz`` in the data folder, or the package elpv-dataset; a      1,773 / 197 / 654, by defect
                 cell is defective if its defect probability is at least one half            probability and cell type
imagenette       torchvision's download (160 px)                                             95 % / 5 % of ``train`` / ``val``
stamps           Debian's tuxpaint-stamps-default, foolbox and scikit-learn: for networks    the unlabelled ones, 85 / 15 % /
                 with ImageNet's classes, see qat/recipes/stamps.py                          the labelled ones
imagefolder      ``train/<class>/*`` and ``val/<class>/*`` in the data folder (ImageNet's    98 % / 2 %, at least one a class,
                 layout)                                                                     of ``train`` / ``val``
===============  ==========================================================================  =================================

Splits are drawn with a constant seed, independent of the seed of a run. Calibration images are training images without
augmentation. Grey images become three equal channels, so that every network and pretrained weights fit.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QATError
from ..support.files import whole_file
from .images import Augment, ImageData, from_arrays, from_folder, hold_out, resize, split_by_group
from .stamps import read_pictures

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LARGEST = 4096
_ELPV_SIZE, _STAMPS_SIZE = 96, 224
_IMAGENETTE = "imagenette2-160"


def load(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> ImageData:
    """One of the data sets in the table of this module.

    Args:
        name: The data set.
        data_dir: Where downloads and resized copies are kept, and where ``imagefolder`` looks.
        image_size: Height and width in pixels; ``None`` takes the usual size of the data set.

    Raises:
        QATError: For an unknown name, or when the data can neither be found nor made.
    """
    if name not in LOADERS:
        raise QATError(f"data={name!r}: choose one of {', '.join(LOADERS)}")
    if image_size is not None and image_size < 8:
        raise QATError(f"image_size={image_size}: must be at least 8 pixels")
    if image_size is not None and image_size > _LARGEST:
        raise QATError(f"image_size={image_size}: must be at most {_LARGEST} pixels")
    return LOADERS[name](Path(data_dir), image_size)


def check_stored(name: str, data_dir: str | Path, image_size: int | None = None) -> None:
    """Whether :func:`load` would only read: it downloads, makes and writes nothing then.

    Raises:
        QATError: If a data set is not there as a whole, and :func:`load` would fetch or make it.
    """
    folder = Path(data_dir)
    caches = {
        "fashion-mnist": "fashion-mnist.npz",
        "elpv": f"elpv-{image_size or _ELPV_SIZE}.npz",
        "stamps": f"stamps-{image_size or _STAMPS_SIZE}.npz",
        "imagenette": _IMAGENETTE,
    }
    if name in caches and not (folder / caches[name]).exists():
        raise QATError(f"data={name!r}: {folder / caches[name]} does not exist")
    if name == "cifar10":
        from torchvision.datasets import CIFAR10

        try:
            CIFAR10(str(folder), download=False)
        except RuntimeError as error:
            raise QATError(f"data={name!r}: is not in {folder}, or not as a whole") from error


def _digits(folder: Path, size: int | None) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise QATError("data='digits' needs scikit-learn: pip install -e '.[recipes]'") from error
    source = load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)
    test, rest = split_by_group(source.target, 0.3)
    val, train = split_by_group(source.target, 1 / 7, rest)
    parts = {"train": train, "val": val, "test": test}
    return from_arrays("digits", [str(d) for d in range(10)], images, source.target, parts, size, Augment(shift=1))


def _fashion_mnist(folder: Path, size: int | None) -> ImageData:
    kinds: dict[str, tuple[type, int]] = {"images": (np.uint8, 3), "labels": (np.uint8, 1)}
    expected = {f"{part}_{kind}": value for part in ("train", "test") for kind, value in kinds.items()}
    arrays = _cached(folder / "fashion-mnist.npz", expected, lambda: _read_fashion_mnist(folder))
    images = np.concatenate([arrays["train_images"], arrays["test_images"]])
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]])
    parts = hold_out(len(arrays["train_images"]), len(images), 5000)
    return from_arrays("fashion-mnist", FASHION_CLASSES, images, labels, parts, size, Augment(shift=2, flip=True))


def _read_fashion_mnist(folder: Path) -> dict[str, NDArray[Any]]:
    if DEBIAN_FASHION.is_dir():
        where = DEBIAN_FASHION
    else:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        where = folder / "FashionMNIST" / "raw"
    return {
        f"{part}_{kind}": read_idx(where / f"{prefix}-{kind}-idx{rank}-ubyte.gz")
        for part, prefix in (("train", "train"), ("test", "t10k"))
        for kind, rank in (("images", 3), ("labels", 1))
    }


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (the MNIST format).

    Raises:
        QATError: For anything else.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise QATError(f"{path}: cannot be read as gzip: {error}") from error
    rank = raw[3] if len(raw) > 3 else 0
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    if raw[:3] != b"\x00\x00\x08" or not rank or len(raw) != 4 + 4 * rank + int(np.prod(shape, dtype=object)):
        raise QATError(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _cifar10(folder: Path, size: int | None) -> ImageData:
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(str(folder), train=flag, download=True) for flag in (True, False))
    images = np.concatenate([train.data, test.data])
    labels = np.array([*train.targets, *test.targets])
    parts = hold_out(len(train.data), len(images), 5000)
    return from_arrays("cifar10", CIFAR_CLASSES, images, labels, parts, size, Augment(shift=4, flip=True))


def _elpv(folder: Path, size: int | None) -> ImageData:
    size = size or _ELPV_SIZE
    expected: dict[str, tuple[type, int]] = {"images": (np.uint8, 3), "probability": (np.float64, 1), "cell_type": (np.str_, 1)}
    arrays = _cached(folder / f"elpv-{size}.npz", expected, lambda: _read_elpv(size))
    probability, cell_type = arrays["probability"], arrays["cell_type"]
    # The order of the groups is part of the split.
    groups = np.unique(probability, return_inverse=True)[1] * 2 + (cell_type == "mono")
    test, rest = split_by_group(groups, 0.25)
    val, train = split_by_group(groups, 0.1, rest)
    parts = {"train": train, "val": val, "test": test}
    labels = (probability >= 0.5).astype(np.int64)
    augment = Augment(shift=4, flip=True, flip_vertical=True)
    return from_arrays("elpv", ("functional", "defective"), arrays["images"], labels, parts, size, augment)


def _read_elpv(size: int) -> dict[str, NDArray[Any]]:
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise QATError("data='elpv' needs the package elpv-dataset (91 MB): pip install -e '.[elpv]'") from error
    images, probability, cell_type = load_dataset()
    return {"images": resize(images, size), "probability": probability, "cell_type": cell_type}


def _stamps(folder: Path, size: int | None) -> ImageData:
    size = size or _STAMPS_SIZE
    expected: dict[str, tuple[type, int]] = {"images": (np.uint8, 4), "accepted": (np.int64, 2)}
    arrays = _cached(folder / f"stamps-{size}.npz", expected, lambda: read_pictures(size))
    labels = arrays["accepted"][:, 0]
    val, train = split_by_group(np.where(labels < 0, 0, 1), 0.15, np.flatnonzero(labels < 0))
    parts = {"train": train, "val": val, "test": np.flatnonzero(labels >= 0)}
    augment = Augment(shift=16, flip=True)
    classes = [str(index) for index in range(1000)]
    found = from_arrays("stamps", classes, arrays["images"], labels, parts, size, augment, scale=(0.5, 0.5))
    return replace(found, accepted=arrays["accepted"][parts["test"]])


def _imagenette(folder: Path, size: int | None) -> ImageData:
    root = folder / _IMAGENETTE
    if not root.is_dir():
        from torchvision.datasets import Imagenette

        Imagenette(str(folder), size="160px", download=True)
    return from_folder("imagenette", root, size or 128, 0.05)


def _imagefolder(folder: Path, size: int | None) -> ImageData:
    return from_folder("imagefolder", folder, size or 224, 0.02)


LOADERS: dict[str, Callable[[Path, int | None], ImageData]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "imagenette": _imagenette,
    "imagefolder": _imagefolder,
    "elpv": _elpv,
    "stamps": _stamps,
}


def _cached(
    path: Path, expected: Mapping[str, tuple[type, int]], make: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """The arrays in ``path``, made and stored there if there is no such file yet.

    Args:
        path: A compressed NPZ file. It may come from anywhere: pickled objects are refused.
        expected: Kind and rank of every array.
        make: Makes the arrays.
    """
    if not path.exists():
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in expected}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise QATError(f"{path}: not a cache of this data set ({error}). Delete it to make it anew") from error
    for key, (kind, rank) in expected.items():
        if not np.issubdtype(arrays[key].dtype, kind) or arrays[key].ndim != rank:
            raise QATError(f"{path}: {key} is {arrays[key].dtype} of rank {arrays[key].ndim}. Delete it to make it anew")
    return arrays
