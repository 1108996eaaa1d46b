"""When are two versions of a tensor the same? When no more than rounding lies between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import QATError
from .differences import TIE, Difference
from .outcome import TensorCheck
from .reference import Reference

# Tolerated difference of two SQNRs in dB: both are single draws of which value falls to which side of a tie.
SLACK = 6.0
# Relative to the largest magnitude: what float32 kernels of all kinds may differ by, about 2 ** -KEPT_BITS.
ROUNDING = 1e-4


def difference(name: str, reference: np.ndarray, other: np.ndarray, whose: str) -> Difference:
    """How far ``other`` is from ``reference``; infinities that are equal count as equal.

    Raises:
        QATError: If their shapes differ.
    """
    if reference.shape != other.shape:
        raise QATError(
            f"{name}: shape {list(other.shape)} from {whose}, {list(reference.shape)} from ONNX Runtime. "
            "Is it built from this file?"
        )
    a, b = _wide(reference), _wide(other)
    both = np.isinf(a) & (a == b)
    if both.any():
        a, b = np.where(both, 0.0, a), np.where(both, 0.0, b)
    with np.errstate(invalid="ignore", over="ignore"):
        return Difference.between(a, b)


def non_finite(reference: np.ndarray, other: np.ndarray) -> int:
    """How many values of ``other`` are NaN or infinite where ``reference`` is finite."""
    if not np.issubdtype(reference.dtype, np.number):
        return 0
    return int((~np.isfinite(_wide(other)) & np.isfinite(_wide(reference))).sum())


def within(error: Difference, limit: float, tolerance: float) -> bool:
    """Whether an error is accepted: by its largest value, or by its SQNR. NaN never is."""
    return error.max_rel <= max(tolerance, ROUNDING) or error.sqnr >= limit


def worst(*differences: Difference | None) -> float:
    """The lowest SQNR in dB; NaN counts as none at all."""
    return min((-math.inf if math.isnan(d.sqnr) else d.sqnr for d in differences if d is not None), default=math.inf)


def budget(int8: Difference | None, tolerance: float) -> float:
    """The SQNR in dB that lower precision may cost: what INT8 itself costs here, or noise as large as the tolerance."""
    own = -20 * math.log10(max(tolerance, ROUNDING))
    return min(own, worst(int8))


@dataclass(frozen=True)
class Judge:
    """Which tensors of an engine depart, and from what SQNR on.

    Args:
        graph: The reference.
        feeds: Its inputs.
        half: Count rounding to FP16 as explained.
        only_loss: Do not ask what rounding explains, but whether more is lost than INT8 itself costs.
        tolerance: A ``max_rel`` that is no loss.
    """

    graph: Reference
    feeds: Mapping[str, np.ndarray]
    half: bool
    only_loss: bool
    tolerance: float

    def __call__(self, found: Mapping[str, np.ndarray], tensors: list[str]) -> dict[str, TensorCheck]:
        """Compare tensors of an engine with ONNX Runtime's."""
        pairs = {name: pair for name in tensors if (pair := self.graph.pair(name)) is not None}
        reference = self.graph.run(self.feeds, [*tensors, *(pair.x for pair in pairs.values())])
        if self.only_loss:
            others = [self.graph.run_unquantized(self.feeds, tensors)]
        else:
            others = [self.graph.run_reversed(self.feeds, tensors), self.graph.run_rounded(self.feeds, tensors, half=False)]
            others += [self.graph.run_rounded(self.feeds, tensors, half=True)] if self.half else []
        checks = {}
        for name in tensors:
            expected = [difference(name, reference[name], other[name], "ONNX Runtime") for other in others]
            limit = (budget(expected[0], self.tolerance) if self.only_loss else worst(*expected)) - SLACK
            error = difference(name, reference[name], found[name], "the engine")
            bad = non_finite(reference[name], found[name])
            accepted = bad == 0 and within(error, limit, self.tolerance if self.only_loss else ROUNDING)
            share = largest = None
            if name in pairs and not bad:
                scale = np.float64(pairs[name].scale)
                ratio = _wide(reference[pairs[name].x]) / scale
                steps = np.abs(np.rint(_wide(found[name]) / scale) - np.rint(_wide(reference[name]) / scale))
                share, largest = float((steps > 0).mean()), int(steps.max(initial=0))
                distance = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)[steps > 0]
                accepted = accepted or (largest <= 1 and float(distance.max(initial=0.0)) <= TIE)
            cut = self.graph.cuts.get(name)
            node, op = (cut.node, cut.op) if cut is not None else (name, "")
            checks[name] = TensorCheck(name, node, op, error, limit, share, largest, bad, not accepted)
        return checks


def _wide(array: np.ndarray) -> np.ndarray:
    """As float64 if it holds numbers of less; argmax and shape stay what they are."""
    return array.astype(np.float64)
