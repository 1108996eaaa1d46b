"""From a float ResNet to a checked INT8 ONNX file: ``python -m qat.recipes.resnet``."""

import sys

from .kinds import ResNetSettings, program

__all__ = ["ResNetSettings", "main"]

main = program(ResNetSettings, __doc__)

if __name__ == "__main__":
    sys.exit(main())
