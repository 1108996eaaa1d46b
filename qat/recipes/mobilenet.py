"""From a float MobileNet to a checked INT8 ONNX file: ``python -m qat.recipes.mobilenet``.

MobileNets are made of depthwise convolutions, whose channels differ much in range: one range a tensor of weights costs them
most, and hard-swish and squeeze-excitation (v3) make PTQ harder.
"""

import sys

from .kinds import MobileNetSettings, program

__all__ = ["MobileNetSettings", "main"]

main = program(MobileNetSettings, __doc__)

if __name__ == "__main__":
    sys.exit(main())
