"""From a float vision transformer to a checked INT8 ONNX file: ``python -m qat.recipes.vit``.

Additions between layer normalizations stay in float (``placement: fast``): Q/DQ there costs time in TensorRT, and accuracy.
"""

import sys

from .kinds import ViTSettings, program

__all__ = ["ViTSettings", "main"]

main = program(ViTSettings, __doc__)

if __name__ == "__main__":
    sys.exit(main())
