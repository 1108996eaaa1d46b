"""From a float EfficientNet to a checked INT8 ONNX file: ``python -m qat.recipes.efficientnet``.

efficientnet_lite0 can start from ImageNet weights (``--pretrained``).
"""

import sys

from .kinds import EfficientNetSettings, program

__all__ = ["EfficientNetSettings", "main"]

main = program(EfficientNetSettings, __doc__)

if __name__ == "__main__":
    sys.exit(main())
