"""Pictures of single things, cut out, and photographs to paste them on: which there are, and which part gets them.

Nothing of the stamps (GPL-2) is copied anywhere but into memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import QATError

PARTS = ("train", "val", "test")
SPLIT_SEED = 0
# Those of COCO's 80 categories that there are stamps of, with COCO's own ids, which run to 90.
COCO_CLASSES = {
    3: "car",
    5: "airplane",
    6: "bus",
    8: "truck",
    9: "boat",
    10: "traffic light",
    13: "stop sign",
    16: "bird",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    37: "sports ball",
    43: "tennis racket",
    47: "cup",
    52: "banana",
    53: "apple",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    59: "pizza",
    70: "toilet",
    87: "scissors",
}
# Pictures by class, as paths below the folder of the stamps; a name that ends with / takes the whole folder.
STAMPS = {
    "airplane": ["vehicles/flight/planes/747"],
    "apple": [f"food/fruit/apple_{kind}" for kind in ("fuji", "granny_smith", "green", "red", "sierra_beauty")],
    "banana": ["food/fruit/banana"],
    "bear": ["animals/mammals/bears/"],
    "bird": ["animals/birds/"],
    "boat": ["vehicles/ship/chineseJunk"],
    "broccoli": ["food/vegetables/broccoli"],
    "bus": ["vehicles/masstransit/green_korean_bus"],
    "car": [*(f"vehicles/auto/{kind}" for kind in ("beetle", "sedan", "sportscar2")), "vehicles/emergency/sedan_police"],
    "carrot": ["food/vegetables/carrot"],
    "cow": [f"animals/mammals/bovines/{kind}" for kind in ("bull", "cow", "cow_white", "zebu")],
    "cup": ["household/dishes/mug"],
    "dog": ["animals/mammals/dogs/dingo", "animals/mammals/dogs/dog"],
    "elephant": ["animals/mammals/elephant"],
    "giraffe": ["animals/mammals/giraffe"],
    "horse": [f"animals/mammals/equines/{kind}" for kind in ("donkey", "donkey_eating", "horse")],
    "orange": [f"food/fruit/{kind}" for kind in ("mandarine", "orange", "orange_seville", "sliced_orange")],
    "pizza": ["food/pizza"],
    "scissors": ["household/arttools/scissors_small_closed", "household/arttools/scissors_small_open"],
    "sheep": [f"animals/mammals/bovines/{kind}" for kind in ("ram", "sheep", "sheep_lamb")],
    "sports ball": [f"sports/{kind}" for kind in ("basketball", "cricketball", "soccer", "tennis_ball")],
    "stop sign": ["town/roadsigns/stop"],
    "tennis racket": ["sports/tennis_racket"],
    "toilet": ["household/toilet"],
    "traffic light": [f"town/roadsigns/stoplight_0{kind}" for kind in ("1_red", "2_yellow", "3_green")],
    "truck": ["vehicles/auto/truck", "vehicles/emergency/firetruck", "vehicles/garbagetruck"],
    "zebra": ["animals/mammals/equines/zebra"],
}
# Photographs of things without a class in COCO.
OTHERS = (
    *(f"animals/{kind}/" for kind in ("amphibians", "fish", "insects", "lizards", "marsupials", "shellfish")),
    *(f"animals/mammals/{kind}/" for kind in ("apes", "aquatic", "camel", "deer", "rodents")),
    *(f"food/{kind}/" for kind in ("fruit", "nuts", "spices", "vegetables")),
    *(f"hobbies/music/{kind}/" for kind in ("brass", "percussion", "string", "wind")),
    *("household/tools/", "plants/flowers/", "plants/mushrooms/", "clothes/hats/"),
)
# Photographs without objects of COCO's classes: package, file.
PHOTOS = {
    "train": [
        *(("skimage", f"data/{name}") for name in ("brick.png", "hubble_deep_field.jpg", "coins.png", "ihc.png")),
        ("sklearn", "datasets/images/flower.jpg"),
    ],
    "val": [("skimage", "data/gravel.png"), ("skimage", "data/rocket.jpg")],
    "test": [("skimage", "data/grass.png"), ("sklearn", "datasets/images/china.jpg")],
}


@dataclass(frozen=True)
class Cutout:
    """A picture of one thing, cut out.

    Attributes:
        name: Where it comes from.
        label: Its class; 0 for a thing without one.
        image: RGBA, cropped to the visible part.
    """

    name: str
    label: int
    image: Image.Image


def find_stamps(folder: Path) -> tuple[dict[int, list[Path]], list[Path]]:
    """The pictures of every class and those without one.

    Args:
        folder: Of the stamps.

    Raises:
        QATError: If one is missing.
    """
    labels = {name: label for label, name in COCO_CLASSES.items()}
    by_class = {labels[name]: [p for entry in STAMPS[name] for p in _pictures(folder, entry)] for name in STAMPS}
    labelled = {path for paths in by_class.values() for path in paths}
    return by_class, [path for entry in OTHERS for path in _pictures(folder, entry) if path not in labelled]


def _pictures(folder: Path, entry: str) -> list[Path]:
    found = sorted((folder / entry).glob("*.png")) if entry.endswith("/") else [folder / f"{entry}.png"]
    # The package holds mirror images of some.
    found = [path for path in found if not path.stem.endswith(("_mirror", "_flip")) and path.is_file()]
    if not found:
        raise QATError(
            f"data_dir={str(folder)!r}: no picture {entry}. The stamps are those of Debian's tuxpaint-stamps-default "
            "2022.06.04: apt-get install tuxpaint-stamps-default, and data_dir=/usr/share/tuxpaint/stamps"
        )
    return found


def deal(by_class: Mapping[int, Sequence[Path]], others: Sequence[Path]) -> dict[str, list[Cutout]]:
    """Split stamps into parts: those of each class, shuffled, to test, validation and training in turn; others train.

    Args:
        by_class: Pictures by label.
        others: Pictures of things without a class.
    """
    rng = np.random.RandomState(SPLIT_SEED)
    dealt: dict[str, list[Cutout]] = {part: [] for part in PARTS}
    for label in sorted(by_class):
        paths = by_class[label]
        for i, chosen in enumerate(rng.permutation(len(paths))):
            dealt[PARTS[::-1][i % 3]].append(_cutout(paths[chosen], label))
    dealt["train"] += [_cutout(path, 0) for path in others]
    return dealt


def _cutout(path: Path, label: int, largest: int = 300) -> Cutout:
    image = _open(path).convert("RGBA")
    box = image.getchannel("A").point([255 * (level > 8) for level in range(256)]).getbbox()
    if box is None:
        raise QATError(f"{path}: the picture is transparent")
    image = image.crop(box)
    image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
    return Cutout(path.stem, label, image)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise QATError(f"{path}: not a picture: {error}") from error


def open_photo(package: str, name: str) -> Image.Image:
    """A photograph among the files of an installed package."""
    # Where the package lies, without importing it.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise QATError(f"data='stamps' needs {package} for its photographs: pip install -e '.[detection]'")
    return _open(Path(spec.origin).parent / name).convert("RGB")
