"""Sensitivity to first order: all layers from a few gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QATError
from .layers import Bench, Layer, analysing, each_batch
from .metrics import floats, relative_error
from .report import Sensitivity, ranked


def estimate_sensitivity(model: nn.Module, batches: Iterable[Any], *, draws: int = 4, seed: int = 0) -> Sensitivity:
    """Estimate what :func:`sensitivity` with ``switch="on"`` and :func:`relative_error` measures, for all layers at once.

    A layer that quantizes changes its own output by ``d``, and the model's output by ``J d`` to first order. For random
    signs ``v``, the mean of ``(v J d) ** 2`` is ``|J d| ** 2`` (Hutchinson 1990; Avron and Toledo 2011, section 2), and one
    gradient gives ``v J`` at every layer. So the costs are about three evaluations and ``draws`` backward passes, whatever the
    number of layers, and the memory is that of the forward pass of a training step plus the layers' ``d``.

    The standard deviation of a value is at most ``sqrt(2 / (draws * samples))`` of it if all samples are equally sensitive.
    What clips, saturates or is masked by a ReLU is not of first order: compare a few layers with :func:`sensitivity` first.

    Args:
        model: Prepared and calibrated. Sites that are off stay off. Afterwards it is what it was.
        batches: As for ``qat.calibrate``; read once.
        draws: How many random directions a batch.
        seed: Of the directions.

    Returns:
        The layers, the most sensitive first; ``exact`` is false.

    Raises:
        QATError: If no site quantizes, an argument is invalid, the batches are empty or do not fit the model, or its outputs
            do not depend on a quantized layer by a gradient.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise QATError(f"draws={draws!r}: must be a positive integer")
    totals: dict[str, Tensor] = {}
    with analysing(model) as bench:
        count = 0
        generator = torch.Generator().manual_seed(seed)
        for count, batch in enumerate(each_batch(batches), 1):  # noqa: B007
            for path, value in _batch(bench, batch, draws, generator).items():
                totals[path] = totals[path] + value if path in totals else value
        values = {path: float(totals[path]) / count if path in totals else 0.0 for path in bench.layers}
        kinds = {path: layer.kind for path, layer in bench.layers.items()}
    return ranked(values, kinds, "on", 0.0, relative_error, exact=False)


def _batch(bench: Bench, batch: Any, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The estimates from one batch."""
    points: list[tuple[str, Tensor, Tensor]] = []

    def look(layer: Layer, alone: Callable[[], Any], out: Any) -> Any:
        with torch.no_grad():
            changed = floats(alone())

        def mark(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return tensor
            # What a pooling reads is in float the tensor that others read, too: the change goes through the pooling alone.
            shared = layer.kind == "pool"
            point = tensor.clone() if shared and tensor.requires_grad else tensor
            point = point if point.requires_grad else point.detach().requires_grad_()
            points.append((layer.path, point, changed.pop(0) - point.detach()))
            # A copy goes on: what follows may change it in place.
            return point.clone()

        return torch.utils._pytree.tree_map(mark, out)

    with torch.enable_grad(), bench.watching(look):
        every = floats(bench.run(batch, ()))
    outputs = [out for out in every if out.requires_grad]
    if not outputs:
        raise QATError(
            "model: no output depends on a quantized layer by a gradient. Use qat.analysis.sensitivity, in a report exact=True"
        )
    weights = [1 / (out.detach().double().square().sum() * len(every)).sqrt() for out in outputs]
    totals: dict[str, Tensor] = {}
    for draw in range(draws):
        directions = [_signs(out, generator) * weight.to(out.dtype) for out, weight in zip(outputs, weights, strict=True)]
        grads = torch.autograd.grad(
            outputs, [point for _, point, _ in points], directions, retain_graph=draw + 1 < draws, allow_unused=True
        )
        for path, value in _projections(points, grads, len(outputs[0]) if outputs[0].ndim else 1).items():
            totals[path] = totals.get(path, 0) + value.square().sum() / draws
    return totals


def _projections(points: list[tuple[str, Tensor, Tensor]], grads: Any, samples: int) -> dict[str, Tensor]:
    """``v J d`` of each layer, one a sample where the layer's output has one row a sample."""
    found: dict[str, Tensor] = {}
    for (path, _, change), grad in zip(points, grads, strict=True):
        if grad is None:
            continue
        product = grad * change
        # Samples do not mix: taken one by one they vary less, and sums over several have the same mean.
        apart = product.ndim > 1 and len(product) == samples
        rows = product.flatten(1).sum(1, dtype=torch.float64) if apart else product.sum(dtype=torch.float64)
        found[path] = found[path] + rows if path in found else rows
    return found


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1, drawn on the CPU: the same on every device."""
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return signs.to(like)
