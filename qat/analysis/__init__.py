"""Where quantization hurts: errors and sensitivity of layers, mixed precision, ranges, and what training changed."""

from .errors import LayerError, LayerErrors, layer_errors
from .estimate import estimate_sensitivity
from .metrics import kl_divergence, relative_error
from .precision import MixedPrecision, layer_times, mixed_precision
from .ranges import Changes, ClipRates, Ranges, clip_rates, compare, ranges
from .results import LayerSensitivity, Sensitivity
from .sensitivity import sensitivity

__all__ = [
    "Changes",
    "ClipRates",
    "LayerError",
    "LayerErrors",
    "LayerSensitivity",
    "MixedPrecision",
    "Ranges",
    "Sensitivity",
    "clip_rates",
    "compare",
    "estimate_sensitivity",
    "kl_divergence",
    "layer_errors",
    "layer_times",
    "mixed_precision",
    "ranges",
    "relative_error",
    "sensitivity",
]
