"""From a float ResNet to a checked INT8 ONNX file: ``python -m qat.recipes.resnet``.

Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from . import classification
from .models import RESNETS
from .settings import ClassifierSettings, option


@dataclass(frozen=True)
class ResNetSettings(ClassifierSettings):
    """Settings of ``python -m qat.recipes.resnet``."""

    recipe: ClassVar[str] = "resnet"

    arch: str = option("resnet20", "network; resnet20 is for small images (He et al. 2015, section 4.2)", choices=RESNETS)
    out: str = option("runs/resnet", "folder for ONNX files, checkpoints, metrics.json and the picture")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; arguments and result of :func:`qat.recipes.classification.main`."""
    return classification.main(ResNetSettings, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
