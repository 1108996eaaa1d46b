"""Settings of a recipe: a dataclass that is also its command line and its YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..calibration.methods import METHODS
from ..core.config import QuantConfig
from ..errors import QATError
from .data import LOADERS
from .models import ARCHS
from .options import RecipeSettings, Settings, option


@dataclass(frozen=True)
class ClassifierSettings(RecipeSettings):
    """Settings of a classification recipe, each of which has its defaults in a class that derives from this one.

    The metadata of each field documents it.
    """

    arch: str = option("resnet20", "network, see qat/recipes/models.py", choices=ARCHS)
    small_stem: bool = option(False, "first convolution of stride 1, and no pooling behind it, for images up to 64 pixels")
    pretrained: bool = option(False, "start from ImageNet weights, where an installed package holds some (efficientnet_lite0)")
    data: str = option("digits", "data set, see qat/recipes/data.py", choices=tuple(LOADERS))
    data_dir: str = option("data", "folder for downloads, caches, and the pictures of imagefolder")
    image_size: int | None = option(None, "height and width in pixels (default: usual for the data set)", positive=True)
    epochs: int = option(20, "epochs of float training; 0 takes the network as it is (with --pretrained)")
    qat_epochs: int = option(4, "epochs of fine-tuning, quantized and, for comparison, float", positive=True)
    freeze_bn_epoch: int = option(0, "first epoch (from 0) of fine-tuning with frozen batch-norm statistics")
    batch_size: int = option(64, "images a step", positive=True)
    optimizer: str = option("sgd", "SGD with Nesterov momentum 0.9, or AdamW", choices=("sgd", "adamw"))
    lr: float = option(0.1, "peak learning rate of float training (warm-up, cosine)", positive=True)
    qat_lr: float = option(0.001, "initial learning rate of fine-tuning (cosine to 1 %%)", positive=True)
    weight_decay: float = option(5e-4, "weight decay of float training and fine-tuning")
    label_smoothing: float = option(0.0, "label smoothing of float training and fine-tuning")
    calibration: str = option("mse", "calibration method", choices=METHODS)
    calibration_images: int = option(512, "training images to calibrate with", positive=True)
    teacher: str = option(
        "labels",
        "what quantized fine-tuning learns from: labels, the float model's outputs (no labels are needed), or both",
        choices=("labels", "float", "both"),
    )
    compare: bool = option(
        False,
        "also PTQ by every other calibration method, with weights by least squared error, equalized, with learned rounding; "
        "and QAT with learned scales",
    )
    rounding_steps: int = option(1000, "steps of learned rounding for each layer", positive=True)
    weights: str | None = option(None, "start from this float checkpoint (a state dict) instead of training")
    seed: int = option(0, "seed of one run")
    seeds: tuple[int, ...] | None = option(None, "several runs, e.g. 0,1,2: mean and standard error over seeds")
    device: str = option("auto", "Lightning accelerator: auto, cpu, gpu, ...")
    precision: str = option("32-true", "Lightning precision of training, e.g. bf16-mixed")
    out: str = option("runs/classifier", "folder for ONNX files, checkpoints, metrics.json and the picture")
    engine: bool = option(False, "also build TensorRT engines, and measure them if there is a GPU (extras: rtx or tensorrt)")
    engine_batch: int = option(32, "images a run that engines are tuned for and measured with", positive=True)
    results_row: str | None = option(None, "append a markdown row with the figures and the command to this file")
    quant: QuantConfig = field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 0 or (self.epochs == 0 and not self.pretrained and self.weights is None):
            raise QATError(f"epochs={self.epochs!r}: must be positive, or 0 for a network with weights")
        if self.freeze_bn_epoch < 0:
            raise QATError(
                f"freeze_bn_epoch={self.freeze_bn_epoch!r}: must be an epoch from 0 ({self.qat_epochs}, qat_epochs: never)"
            )


def make_parser(kind: type[RecipeSettings], description: str) -> argparse.ArgumentParser:
    """The command line of ``kind``, every setting an option."""
    parser = argparse.ArgumentParser(prog=f"python -m qat.recipes.{kind.recipe}", description=description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the settings below (with underscores), and under the key 'quant' those of "
        "qat.QuantConfig; options on the command line win",
    )
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.name != "quant":
            parser.add_argument("--" + item.name.replace("_", "-"), **_argument(item, hints[item.name]))
    return parser


def _argument(item: Field[Any], hint: Any) -> dict[str, Any]:
    text = item.metadata["help"] + ("" if item.default is None or item.default is False else f" (default: {item.default})")
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS, "help": text}
    kinds = {"seeds": _seeds}
    kind = kinds.get(item.name) or next(k for k in getattr(hint, "__args__", (hint,)) if k is not type(None))
    shown = {"choices": item.metadata["choices"]} if item.metadata["choices"] else {"metavar": item.name.upper()}
    return {"type": kind, "default": argparse.SUPPRESS, "help": text, **shown}


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(kind: type[Settings], description: str, argv: Sequence[str] | None = None) -> Settings:
    """Settings from a command line and the YAML file that it names.

    Raises:
        QATError: For a file that is no YAML mapping, or an invalid setting.
    """
    given = vars(make_parser(kind, description).parse_args(argv))
    path = given.pop("config", None)
    from_file = read_yaml(path) if path else {}
    try:
        # By itself first, so that the file is blamed for what it says only.
        kind.from_dict(from_file)
    except QATError as error:
        raise QATError(f"config={path!r}: {error}") from error
    return kind.from_dict({**from_file, **given})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        QATError: For a file that cannot be read or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise QATError(f"config={str(path)!r}: {error}") from error
    if not isinstance(values, dict):
        raise QATError(f"config={str(path)!r}: must hold settings, 'name: value' a line")
    return values
