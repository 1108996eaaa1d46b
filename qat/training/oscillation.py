"""Oscillations in quantization-aware training (Nagel et al. 2022, "Overcoming Oscillations in QAT", arXiv 2203.08684)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.numerics import broadcast_scale, fake_quantize
from ..core.quantizer import State, WeightQuantizer
from ..errors import QATError
from ..nn.attention import QuantAttention, projections
from ..nn.layers import InterceptedLayer, QuantLayer


def oscillation_penalty(model: nn.Module) -> Tensor:
    """How far the weights are from their quantized values: a term of the loss that keeps them from oscillating.

    A weight whose best value lies between two codes is pushed across the tie between them again and again by the
    straight-through gradient. The dampening loss of section 4.2, ``|| w_hat - clip(w, s * qmin, s * qmax) ||^2`` summed over
    all weights, pulls each to its present code; clipped weights feel nothing. Add it with a factor that grows from zero while
    training goes on (:func:`ramp`), or the weights stick to the codes that they begin with. It is for few bits: at 8 bits
    oscillations hardly matter.

    Args:
        model: A calibrated model.

    Returns:
        Shape ``()``, float32, at least 0. Its gradient reaches the weights only, not learned ranges.

    Raises:
        QATError: If no weight is quantized.

    Example:
        >>> import qat
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = qat.prepare(model)
        >>> _ = qat.calibrate(model, [torch.randn(8, 4)], progress=False)
        >>> loss = model(torch.randn(8, 4)).square().mean() + 0.1 * oscillation_penalty(model)
    """
    terms = []
    for weight, site in _weights(model):
        with torch.no_grad():
            scale = site.range_scale(weight).detach()
            step = broadcast_scale(scale, weight, site.axis)
            target = fake_quantize(weight.float(), scale, axis=site.axis, fmt=site.fmt)
        clipped = weight.float().clamp(step * site.fmt.qmin, step * site.fmt.qmax)
        terms.append((target - clipped).square().sum())
    if not terms:
        raise QATError("model: no weight is quantized. Run qat.prepare(model) and qat.calibrate(model, loader) first")
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def ramp(progress: float) -> float:
    """From 0 to 1 along half a cosine, as the factor of :func:`oscillation_penalty` should grow (section 4.2).

    Args:
        progress: Share of the training that is over, from 0 to 1.

    Example:
        >>> [round(ramp(x), 2) for x in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.15, 0.5, 1.0]
    """
    return (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, WeightQuantizer]]:
    """Each quantizing weight once; not those that a forward of its own may compute from the parameter."""
    seen: set[int] = set()
    for module in model.modules():
        found: list[tuple[Tensor, WeightQuantizer]] = []
        if isinstance(module, QuantAttention):
            found = [(weight, getattr(module, f"{key}_weight_quantizer")) for key, weight in projections(module).items()]
        elif isinstance(module, QuantLayer) and not isinstance(module, InterceptedLayer):
            found = [(module.weight, module.weight_quantizer)]
        for weight, site in found:
            if site.state is State.QUANTIZING and id(weight) not in seen:
                seen.add(id(weight))
                yield weight, site
