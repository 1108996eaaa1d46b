"""From a float vision transformer to a checked INT8 ONNX file: ``python -m qat.recipes.vit``.

Trains (or loads) a float model, calibrates it (PTQ), fine-tunes it quantized (QAT) and, for a fair comparison, trains the
float model equally long; exports all of them, compares each file with PyTorch, and prints one table. Accuracies are those
of the exported files, run by ONNX Runtime.

Additions between layer normalizations stay in float (``placement: fast``): Q/DQ there costs time in TensorRT, and accuracy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..core.config import QuantConfig
from . import classification
from .models import TRANSFORMERS
from .settings import ClassifierSettings, option


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; arguments and result of :func:`qat.recipes.classification.main`."""
    return classification.main(ViTSettings, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
