"""Ranges in the shape of their sites."""

from __future__ import annotations

from torch import Tensor

from ..core.numerics import SCALE_MIN, Format
from ..errors import QATError
from .source import Source


def fitted(name: str, amax: Tensor, weight: Tensor | None, channels: int | None) -> Tensor:
    """The range in the shape of its site.

    Args:
        name: Of the quantizer.
        amax: As stored.
        weight: What it quantizes, if that is a weight.
        channels: Number of channels, along axis 0, if the site has a range for each.

    Raises:
        QATError: If the stored shape is no range for each output channel, nor a single one.
    """
    shape = tuple(amax.shape)
    if amax.numel() == 1:
        return amax.reshape(()) if channels is None else amax.reshape(1).expand(channels)
    if weight is None:
        raise QATError(f"{name}._amax: has shape {shape}; TensorRT quantizes an activation with a single range")
    if channels is None:
        raise QATError(
            f"{name}._amax: has shape {shape}; this site has a single range for the weight, as TensorRT needs it for a "
            "transposed convolution. Leave the layer in float by disabled=[glob] (outputs change), or calibrate it per tensor"
        )
    if shape != (channels, *([1] * (weight.ndim - 1))):
        raise QATError(
            f"{name}._amax: has shape {shape}; a weight of shape {tuple(weight.shape)} needs one range, or one for each "
            f"output channel: {(channels, *([1] * (weight.ndim - 1)))}"
        )
    return amax.reshape(channels)


def smallest_range(fmt: Format) -> float:
    """The range below which a scale would be smaller than ``SCALE_MIN``."""
    return fmt.qmax * SCALE_MIN


def notes_on(source: Source, amax: Tensor, weight: Tensor | None) -> list[str]:
    """What to know of ranges that are too small for a scale. A channel whose weights are zero stays zero."""
    small = amax < smallest_range(source.fmt)
    if weight is not None:
        magnitude = weight.detach().abs().cpu()
        largest = magnitude.max() if amax.ndim == 0 else magnitude.flatten(1).amax(1)
        small = small & (largest > 0)
    if not bool(small.any()):
        return []
    return [
        f"{source.name}: {int(small.sum())} range(s) below {smallest_range(source.fmt):.2g}, raised to it: values of at most "
        "that size come where there were zeros or smaller steps"
    ]
