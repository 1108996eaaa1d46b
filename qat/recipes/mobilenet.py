"""From a float MobileNet to a checked INT8 ONNX file: ``python -m qat.recipes.mobilenet``.

Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime.

MobileNets are made of depthwise convolutions, whose channels differ much in range: one range a tensor of weights costs them
most, and hard-swish and squeeze-excitation (v3) make PTQ harder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from . import classification
from .models import MOBILENETS
from .settings import ClassifierSettings, option


@dataclass(frozen=True)
class MobileNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.mobilenet``."""

    recipe: ClassVar[str] = "mobilenet"

    arch: str = option("mobilenet_v2_small", "network; mobilenet_v2_small is the one for small images", choices=MOBILENETS)
    lr: float = option(0.05, "peak learning rate of float training (warm-up, cosine)", positive=True)
    qat_lr: float = option(0.0005, "initial learning rate of fine-tuning (cosine to 1 %%)", positive=True)
    out: str = option("runs/mobilenet", "folder for ONNX files, checkpoints, metrics.json and the picture")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; arguments and result of :func:`qat.recipes.classification.main`."""
    return classification.main(MobileNetSettings, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
