"""From a float EfficientNet to a checked INT8 ONNX file: ``python -m qat.recipes.efficientnet``.

Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime.

efficientnet_lite0 can start from ImageNet weights (``--pretrained``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from . import classification
from .models import EFFICIENTNETS
from .settings import ClassifierSettings, option


@dataclass(frozen=True)
class EfficientNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.efficientnet``."""

    recipe: ClassVar[str] = "efficientnet"

    arch: str = option("efficientnet_small", "network; efficientnet_small is the one for small images", choices=EFFICIENTNETS)
    out: str = option("runs/efficientnet", "folder for ONNX files, checkpoints, metrics.json and the picture")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; arguments and result of :func:`qat.recipes.classification.main`."""
    return classification.main(EfficientNetSettings, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
