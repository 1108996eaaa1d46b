"""Where quantization hurts: errors and sensitivity of layers, mixed precision, ranges, and what training changed."""

from .errors import LayerError, LayerErrors, layer_errors
from .estimate import estimate_sensitivity
from .metrics import kl_divergence, relative_error
from .report import LayerSensitivity, Sensitivity
from .sensitivity import sensitivity

__all__ = [
    "LayerError",
    "LayerErrors",
    "LayerSensitivity",
    "Sensitivity",
    "estimate_sensitivity",
    "kl_divergence",
    "layer_errors",
    "relative_error",
    "sensitivity",
]
