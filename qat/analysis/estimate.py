"""Sensitivity to first order: all layers from a few gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QATError
from .layers import Bench, Layer, analysing, each_batch
from .metrics import floats, relative_error
from .results import Sensitivity, ranked


def estimate_sensitivity(model: nn.Module, batches: Iterable[Any], *, draws: int = 4, seed: int = 0) -> Sensitivity:
    """Estimate what :func:`sensitivity` with ``switch="on"`` and :func:`relative_error` measures, for all layers at once.

    A layer that quantizes changes its own output by ``d``, and the model's output by ``J d`` to first order. For random
    signs ``v``, the mean of ``(v J d) ** 2`` is ``|J d| ** 2`` (Hutchinson 1990; Avron and Toledo 2011, section 2), and one
    gradient gives ``v J`` at every layer. So the costs are about three evaluations and ``draws`` backward passes, whatever the
    number of layers, and the memory is that of the forward pass of a training step plus the layers' ``d``.

    One more backward pass in the first batch tells in which layers the samples do not mix: the gradient of half of the output's
    rows must be zero in all other rows. There the standard deviation of a value is at most ``sqrt(2 / (draws * samples))`` of
    it if all samples are equally sensitive. In layers whose rows are no samples, as the nodes of a graph, ``samples`` counts as
    1. An output that is zero throughout counts as unchanged.

    What clips, saturates or is masked by a ReLU is not of first order: compare a few layers with :func:`sensitivity` first.

    Args:
        model: Prepared and calibrated. Sites that are off stay off. Afterwards it is what it was.
        batches: As for ``qat.calibrate``; read once.
        draws: How many random directions a batch.
        seed: Of the directions.

    Returns:
        The layers, the most sensitive first; ``exact`` is false.

    Raises:
        QATError: If no site quantizes, an argument is invalid, the batches are empty, or the outputs do not depend on a
            quantized layer by a gradient, are all zero, or hold NaN or infinity. Of batches that do not fit, the model's own
            error.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise QATError(f"draws={draws!r}: must be a positive integer")
    totals: dict[str, Tensor] = {}
    with analysing(model) as bench:
        count = 0
        apart: set[str] | None = None
        generator = torch.Generator().manual_seed(seed)
        for count, batch in enumerate(each_batch(batches), 1):  # noqa: B007
            found, apart = _batch(bench, batch, draws, generator, apart)
            for path, value in found.items():
                totals[path] = totals[path] + value if path in totals else value
        values = {path: float(totals[path]) / count if path in totals else 0.0 for path in bench.layers}
        kinds = {path: layer.kind for path, layer in bench.layers.items()}
    return ranked(values, kinds, "on", 0.0, relative_error, exact=False)


def _batch(
    bench: Bench, batch: Any, draws: int, generator: torch.Generator, apart: set[str] | None
) -> tuple[dict[str, Tensor], set[str]]:
    """The estimates from one batch, and the layers in which samples do not mix; ``apart`` are those known before."""
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
    weights = _weights(outputs, len(every))
    marked = [point for _, point, _ in points]
    if apart is None:
        # A generator of its own: one seed gives the same draws whether samples mix or not.
        apart = _unmixed(points, outputs, weights, torch.Generator().manual_seed(generator.initial_seed()))
    totals: dict[str, Tensor] = {}
    for draw in range(draws):
        directions = [_signs(out, generator) * weight.to(out.dtype) for out, weight in zip(outputs, weights, strict=True)]
        grads = torch.autograd.grad(outputs, marked, directions, retain_graph=draw + 1 < draws, allow_unused=True)
        for path, value in _projections(points, grads, apart, len(outputs[0]) if outputs[0].ndim else 1).items():
            totals[path] = totals.get(path, 0) + value.square().sum() / draws
    return totals, apart


def _weights(outputs: list[Tensor], count: int) -> list[Tensor]:
    """What makes squares relative to each output, of ``count``; 0 for an output that is zero."""
    energies = [out.detach().double().square().sum() for out in outputs]
    if not all(bool(energy.isfinite()) for energy in energies):
        raise QATError("model: its outputs hold NaN or infinity. Check the batches and the weights")
    if not any(bool(energy > 0) for energy in energies):
        raise QATError("model: its outputs are all zero, so no change is relative to them. Train the last layer first")
    return [torch.where(energy > 0, (energy * count).rsqrt(), 0.0) for energy in energies]


def _unmixed(
    points: list[tuple[str, Tensor, Tensor]], outputs: list[Tensor], weights: list[Tensor], generator: torch.Generator
) -> set[str]:
    """The layers where the gradient of half of the output's rows is zero in all other rows: samples do not mix after them."""
    samples = len(outputs[0]) if outputs[0].ndim else 1
    if samples == 1 or any(not out.ndim or len(out) != samples for out in outputs):
        return set()
    # A random half: the first one of a sequence does not depend on the second in a causal model, and whole graphs stay apart.
    others = torch.randperm(samples, generator=generator)[samples // 2 :]
    directions = [_signs(out, generator) * weight.to(out.dtype) for out, weight in zip(outputs, weights, strict=True)]
    for direction in directions:
        direction[others.to(direction.device)] = 0
    grads = torch.autograd.grad(outputs, [point for _, point, _ in points], directions, retain_graph=True, allow_unused=True)
    mixed = set()
    for (path, _, _), grad in zip(points, grads, strict=True):
        if grad is not None and not (_has_rows(grad, samples) and not bool(grad[others.to(grad.device)].any())):
            mixed.add(path)
    return {path for path, _, _ in points} - mixed


def _has_rows(tensor: Tensor, samples: int) -> bool:
    return tensor.ndim > 1 and len(tensor) == samples


def _projections(points: list[tuple[str, Tensor, Tensor]], grads: Any, apart: set[str], samples: int) -> dict[str, Tensor]:
    """``v J d`` of each layer, one a sample where samples do not mix."""
    # A layer that runs twice gives sums of its rows only if it has them each time.
    apart = apart - {path for path, _, change in points if not _has_rows(change, samples)}
    found: dict[str, Tensor] = {}
    for (path, _, change), grad in zip(points, grads, strict=True):
        if grad is None:
            continue
        product = grad * change
        # Taken one by one samples vary less, and sums over several have the same mean; the sum over all is right always.
        rows = product.flatten(1).sum(1, dtype=torch.float64) if path in apart else product.sum(dtype=torch.float64)
        found[path] = found[path] + rows if path in found else rows
    return found


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1, drawn on the CPU: the same on every device."""
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return signs.to(like)
