"""What a collecting quantizer shows its tensors to."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.quantizer import WeightQuantizer
from ..errors import QATError
from .histogram import Histogram, float_of_bits
from .methods import weight_amax_by_mse


class _Repeats:
    """Tells whether a tensor is the one seen last, unchanged. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._last: weakref.ref[Tensor] | None = None
        self._version = -1

    def is_repeat(self, x: Tensor) -> bool:
        if x.is_inference():
            return False  # has no version counter: an in-place change could not be told
        repeated = self._last is not None and self._last() is x and self._version == x._version
        self._last, self._version = weakref.ref(x), x._version
        return repeated


class SiteObserver(ABC):
    """What both observers share.

    Nothing that they do on a GPU waits for it: what they may have to refuse there shows in :func:`settle`.

    Args:
        path: Of the site.
        log: Observers in the order in which they first saw data; this one adds itself.

    Attributes:
        path: Of the site; error messages name it.
        seen: Whether any data came by.
    """

    def __init__(self, path: str, log: list[SiteObserver] | None = None) -> None:
        self.path = path
        self.seen = False
        self._log = log
        self._repeats = _Repeats()

    @abstractmethod
    def status(self) -> Tensor | None:
        """What :meth:`settle` has to know: int32, one dimension; ``None`` if nothing."""

    @abstractmethod
    def settle(self, status: Sequence[int]) -> None:
        """Finish what was left open so as not to wait for the device.

        Raises:
            QATError: If a NaN or an infinity was seen.
        """

    def _saw_data(self) -> None:
        if not self.seen and self._log is not None:
            self._log.append(self)
        self.seen = True


class HistogramObserver(SiteObserver):
    """Counts the magnitudes of the activations at one site.

    A quantizer that several layers share meets the same tensor once a layer; it is counted once.

    Args:
        path: Of the site.
        log: As of :class:`SiteObserver`.
        device: Where the counts live.
    """

    def __init__(self, path: str, log: list[SiteObserver] | None = None, *, device: torch.device | None = None) -> None:
        super().__init__(path, log)
        self.histogram = Histogram(path, device=device)

    def observe(self, x: Tensor) -> None:
        if x.numel() and not self._repeats.is_repeat(x):
            # First, so that the log tells which of several sites saw a NaN first.
            self._saw_data()
            self.histogram.add(x)

    def status(self) -> Tensor | None:
        return self.histogram.status()

    def settle(self, status: Sequence[int]) -> None:
        self.histogram.settle(status)


class WeightObserver(SiteObserver):
    """Takes the range of the weight that reaches a site.

    That need not be ``module.weight``: a weight-standardized convolution, for one, computes it in ``forward``.

    Args:
        path: Of the site.
        site: Says along which axis the range is taken.
        log: As of :class:`SiteObserver`.
        method: ``"max"`` or ``"mse"``.
    """

    def __init__(self, path: str, site: WeightQuantizer, log: list[SiteObserver] | None = None, *, method: str = "max") -> None:
        super().__init__(path, log)
        self.site = site
        self.method = method
        self.amax = torch.zeros_like(site.amax, requires_grad=False)

    def observe(self, weight: Tensor) -> None:
        if not weight.numel() or self._repeats.is_repeat(weight):
            return
        by_error = self.method == "mse"
        site = self.site
        amax = weight_amax_by_mse(weight, site.axis, fmt=site.fmt) if by_error else site.weight_amax(weight)
        if amax.device.type == "cpu" and not bool(amax.isfinite().all()):
            raise self._refusal()
        self.amax = torch.maximum(self.amax, amax)
        self._saw_data()

    def status(self) -> Tensor | None:
        # Maxima keep NaN and infinity.
        return None if self.amax.device.type == "cpu" else self.amax.max().reshape(1).view(torch.int32)

    def settle(self, status: Sequence[int]) -> None:
        if not math.isfinite(float_of_bits(status[0])):
            raise self._refusal()

    def _refusal(self) -> QATError:
        return QATError(f"{self.path}: NaN or Inf seen. The weight is damaged: load or train it anew")


def settle(observers: Sequence[SiteObserver]) -> None:
    """Finish the work of ``observers``, with one copy from each device that they used.

    Args:
        observers: Those that saw data, in that order.

    Raises:
        QATError: If one saw a NaN or an infinity; names the first.
    """
    statuses = {observer: status for observer in observers if (status := observer.status()) is not None}
    values: dict[SiteObserver, list[int]] = {}
    for device in {status.device for status in statuses.values()}:
        there = {observer: status for observer, status in statuses.items() if status.device == device}
        fetched = iter(torch.cat(list(there.values())).tolist())
        values.update({observer: [next(fetched) for _ in range(status.numel())] for observer, status in there.items()})
    for observer in statuses:
        observer.settle(values[observer])
