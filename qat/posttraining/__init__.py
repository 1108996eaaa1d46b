"""Post-training quantization beyond ranges: equalized channels, corrected biases, learned rounding."""

from .bias import BiasCorrection, correct_biases
from .equalization import Equalization, equalize
from .rounding import Rounding, round_weights

__all__ = ["BiasCorrection", "Equalization", "Rounding", "correct_biases", "equalize", "round_weights"]
