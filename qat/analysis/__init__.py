"""Where quantization hurts: errors and sensitivity of layers, mixed precision, ranges, and what training changed."""

from .errors import LayerError, LayerErrors, layer_errors
from .metrics import kl_divergence, relative_error
from .sensitivity import LayerSensitivity, Sensitivity, sensitivity

__all__ = [
    "LayerError",
    "LayerErrors",
    "LayerSensitivity",
    "Sensitivity",
    "kl_divergence",
    "layer_errors",
    "relative_error",
    "sensitivity",
]
