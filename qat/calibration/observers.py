"""What a collecting quantizer shows its tensors to."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..errors import QATError
from ..quantizer import WeightQuantizer
from .histogram import Histogram


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


class SiteObserver:
    """What both observers share.

    Attributes:
        path: Of the site; error messages name it.
        seen: Whether any data came by.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen = False
        self._repeats = _Repeats()


class HistogramObserver(SiteObserver):
    """Counts the magnitudes of the activations at one site.

    A quantizer that several layers share meets the same tensor once a layer; it is counted once.

    Args:
        path: Of the site.
        device: Where the counts live.
    """

    def __init__(self, path: str, *, device: torch.device | None = None) -> None:
        super().__init__(path)
        self.histogram = Histogram(path, device=device)

    def observe(self, x: Tensor) -> None:
        if x.numel() and not self._repeats.is_repeat(x):
            self.histogram.add(x)
            self.seen = True


class WeightObserver(SiteObserver):
    """Takes the range of the weight that reaches a site.

    That need not be ``module.weight``: a weight-standardized convolution, for one, computes it in ``forward``.

    Args:
        path: Of the site.
        site: Says along which axis the range is taken.
    """

    def __init__(self, path: str, site: WeightQuantizer) -> None:
        super().__init__(path)
        self.site = site
        self.amax = torch.zeros_like(site.amax, requires_grad=False)

    def observe(self, weight: Tensor) -> None:
        if not weight.numel() or self._repeats.is_repeat(weight):
            return
        amax = self.site.weight_amax(weight)
        if not bool(amax.isfinite().all()):
            raise QATError(f"{self.path}: NaN or Inf seen. The weight is damaged: load or train it anew")
        self.amax = torch.maximum(self.amax, amax)
        self.seen = True
