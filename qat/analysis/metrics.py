"""How far two outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QATError
from ..support.inputs import output_tensors

# ``metric(outputs, reference, batch)``: outputs of the model as it is and in float, and the batch. Lower is better.
Metric = Callable[[Any, Any, Any], Tensor | float]


def floats(tree: Any) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    return [tensor for tensor in output_tensors(tree) if tensor.is_floating_point()]


def pairs(outputs: Any, reference: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating tensors of two outputs, side by side.

    Raises:
        QATError: If the sizes differ, as those of a list of detections may once its scores are quantized.
    """
    found, expected = floats(outputs), floats(reference)
    sizes, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected))
    if sizes != wanted:
        raise QATError(
            f"the outputs have sizes {sizes} where those of the float model have {wanted}: no difference can be taken. Analyse "
            "the part of the model before what selects among its outputs, or pass a metric of your own where one is asked for"
        )
    return list(zip(found, expected, strict=True))


class Distance:
    """SQNR and cosine similarity of two signals, summed up over batches in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, reference: Any, other: Any) -> None:
        """Count two outputs of one structure and size."""
        for b, a in pairs(other, reference):
            # Differences in the tensors' own dtype are exact enough, sums of squares are not.
            norms = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64) for x in (a, a - b, b)]
            sums = torch.stack(norms).square()
            self._sums = sums if self._sums is None else self._sums + sums

    @property
    def sqnr(self) -> float:
        """``10 log10(sum(a ** 2) / sum((a - b) ** 2))`` in dB; infinite for equal signals, NaN without or with NaN."""
        signal, noise, _ = self._values()
        if noise == 0:
            return math.nan if self._sums is None else math.inf
        ratio = signal / noise
        if math.isnan(ratio):
            return math.nan
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """``sum(a * b) / sqrt(sum(a ** 2) * sum(b ** 2))``; NaN if one of them is zero."""
        signal, noise, other = self._values()
        if not (signal > 0 and other > 0):
            return math.nan
        # sum(a * b), as |a - b| ** 2 = |a| ** 2 - 2 a b + |b| ** 2.
        return (signal + other - noise) / 2 / math.sqrt(signal * other)

    def _values(self) -> list[float]:
        return [0.0] * 3 if self._sums is None else self._sums.tolist()


def relative_error(outputs: Any, reference: Any, batch: Any) -> Tensor:
    """``sum((a - b) ** 2) / sum(b ** 2)`` of each floating output, averaged over the outputs. 0.01 is an SQNR of 20 dB.

    The default metric: asks for no labels and fits any output.
    """
    ratios = []
    for a, b in pairs(outputs, reference):
        noise, signal = (a.double() - b.double()).square().sum(), b.double().square().sum()
        ratios.append(noise / signal.clamp(min=torch.finfo(torch.float64).tiny))
    if not ratios:
        raise QATError("metric: the model returns no floating tensor. Pass a metric of your own")
    return torch.stack(ratios).mean()


def kl_divergence(outputs: Any, reference: Any, batch: Any) -> Tensor:
    """Kullback-Leibler divergence of the classes' probabilities from those of the float model, in nats a sample.

    For a model that returns logits of shape ``(N, classes)``, as its first output.
    """
    both = pairs(outputs, reference)
    if not both or both[0][0].ndim != 2:
        raise QATError("metric: kl_divergence needs logits of shape (N, classes) as the first output; use relative_error")
    log_q, log_p = (F.log_softmax(x.double(), dim=1) for x in both[0])
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


class Mean:
    """The mean of a metric over batches: over samples where it gives one value a sample, else over batches."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, value: Any) -> None:
        """Count one batch.

        Raises:
            QATError: If the metric gave something else than numbers, or NaN, by which nothing can be ranked.
        """
        if not isinstance(value, Tensor | float | int) or (isinstance(value, Tensor) and not value.numel()):
            raise QATError(f"metric: returned {type(value).__name__}; return a number, or a tensor of one a sample")
        values = torch.as_tensor(value).double()
        if bool(values.isnan().any()):
            raise QATError("metric: is NaN. The batches or the outputs hold NaN or infinity; check both, and the weights")
        self._sum += float(values.sum())
        self._count += values.numel()

    @property
    def value(self) -> float:
        """The mean so far; NaN without any."""
        return self._sum / self._count if self._count else math.nan
