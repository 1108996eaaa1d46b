"""The classification recipes: what each sets in another way than :class:`ClassifierSettings`, and its command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from ..core.config import QuantConfig
from . import classification
from .models import EFFICIENTNETS, MOBILENETS, RESNETS, TRANSFORMERS
from .settings import ClassifierSettings, option

_STAGES = """
Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime.
"""


def program(kind: type[ClassifierSettings], text: str | None) -> Callable[..., int]:
    """The ``main`` of a recipe; arguments and result of :func:`qat.recipes.classification.main`.

    Args:
        kind: Its settings.
        text: Docstring of its module: one line, and what else its help says.
    """
    first, _, more = (text or "").partition("\n")
    return partial(classification.main, kind, f"{first}\n{_STAGES}{more}")


@dataclass(frozen=True)
class ResNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.resnet``."""

    recipe: ClassVar[str] = "resnet"

    arch: str = option("resnet20", "network; resnet20 is for small images (He et al. 2015, section 4.2)", choices=RESNETS)
    out: str = option("runs/resnet", "folder for ONNX files, checkpoints, metrics.json and the picture")


@dataclass(frozen=True)
class MobileNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.mobilenet``."""

    recipe: ClassVar[str] = "mobilenet"

    arch: str = option("mobilenet_v2_small", "network; mobilenet_v2_small is the one for small images", choices=MOBILENETS)
    lr: float = option(0.05, "peak learning rate of float training (warm-up, cosine)", positive=True)
    qat_lr: float = option(0.0005, "initial learning rate of fine-tuning (cosine to 1 %%)", positive=True)
    out: str = option("runs/mobilenet", "folder for ONNX files, checkpoints, metrics.json and the picture")


@dataclass(frozen=True)
class EfficientNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.efficientnet``."""

    recipe: ClassVar[str] = "efficientnet"

    arch: str = option("efficientnet_small", "network; efficientnet_small is the one for small images", choices=EFFICIENTNETS)
    out: str = option("runs/efficientnet", "folder for ONNX files, checkpoints, metrics.json and the picture")


@dataclass(frozen=True)
class ViTSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.vit``."""

    recipe: ClassVar[str] = "vit"

    arch: str = option("vit_small", "network; vit_small is the one for small images", choices=TRANSFORMERS)
    epochs: int = option(60, "epochs of float training; 0 takes the network as it is (with --pretrained)")
    optimizer: str = option("adamw", "SGD with Nesterov momentum 0.9, or AdamW", choices=("sgd", "adamw"))
    lr: float = option(0.002, "peak learning rate of float training (warm-up, cosine)", positive=True)
    qat_lr: float = option(2e-5, "initial learning rate of fine-tuning (cosine to 1 %%)", positive=True)
    weight_decay: float = option(0.05, "weight decay of float training and fine-tuning")
    out: str = option("runs/vit", "folder for ONNX files, checkpoints, metrics.json and the picture")
    quant: QuantConfig = field(default_factory=lambda: QuantConfig(placement="fast"))
