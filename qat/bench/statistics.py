"""Statistics of repeated measurements, defined as in ``trtexec`` (TensorRT, samples/common/sampleReporting.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import QATError


def percentile(times: Sequence[float] | np.ndarray, percent: float) -> float:
    """The element of the sorted ``times`` with index ``max(n - 1 - int((1 - percent / 100) * n), 0)``.

    An element, never an interpolation. The index is computed in float32, as ``trtexec`` does: at ``n = 100`` this gives
    the largest element for 99 and the 90th for 90, where float64 would give the 99th and the 91st.

    Args:
        times: At least one number, in any order.
        percent: In ``[0, 100]``.

    Raises:
        QATError: If there are no times, or ``percent`` is outside its range.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50)
        2.0
    """
    if not 0 <= percent <= 100:
        raise QATError(f"percent={percent}: choose a number between 0 and 100")
    if not len(times):
        raise QATError("times is empty: there is no percentile of no measurements")
    count = len(times)
    excluded = int((np.float32(1) - np.float32(percent) / np.float32(100)) * np.float32(count))
    return float(sorted(times)[max(count - 1 - excluded, 0)])


@dataclass(frozen=True)
class Summary:
    """Statistics of one quantity over all runs.

    Attributes:
        minimum: Smallest value, ms.
        maximum: Largest value, ms.
        mean: Arithmetic mean, ms.
        median: Middle value, or the mean of the two middle ones, ms.
        p90: See :func:`percentile`, ms.
        p95: The same for 95.
        p99: The same for 99.
        variation: Coefficient of variation in percent: population standard deviation / mean; 0 if the mean is 0.
    """

    minimum: float
    maximum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    variation: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Summary:
        """Summarize times in ms.

        Raises:
            QATError: If there are none.

        Example:
            >>> Summary.of([1.0, 2.0, 6.0]).median
            2.0
        """
        if not len(times):
            raise QATError("times is empty: nothing was measured")
        values = np.sort(np.asarray(times, dtype=np.float64))
        mean = float(values.mean())
        return cls(
            float(values[0]),
            float(values[-1]),
            mean,
            float(np.median(values)),
            percentile(values, 90),
            percentile(values, 95),
            percentile(values, 99),
            float(values.std() / mean * 100) if mean else 0.0,
        )
