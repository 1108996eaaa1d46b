"""Ranges: what they clip, what they cost, and what training did to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from ..calibration.histogram import Histogram
from ..calibration.methods import quality
from ..calibration.observers import HistogramObserver
from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers, watching
from ..errors import QATError
from ..support.text import plain
from ..training.ranges import clip_rates as measured_clip_rates
from .layers import each_batch, running
from .metrics import Distance
from .results import Result, make_table


@dataclass(frozen=True)
class SiteRange:
    """The range of one site and what it does to the tensors that reach it.

    Attributes:
        path: Of the quantizer.
        largest: The largest magnitude that was seen.
        amax: The range.
        clipped: Share of values above ``amax``, from the histogram.
        sqnr: Signal-to-quantization-noise ratio in dB, from the histogram.
    """

    path: str
    largest: float
    amax: float
    clipped: float
    sqnr: float


@dataclass(frozen=True)
class Ranges(Result):
    """What :func:`ranges` found; prints as a table.

    Attributes:
        sites: Activation sites that saw data.
        histograms: Of the magnitudes at each of them, by path.
    """

    sites: tuple[SiteRange, ...]
    histograms: dict[str, Histogram] = field(repr=False)

    def table(self) -> Table:
        rows = [(s.path, f"{s.largest:.4g}", f"{s.amax:.4g}", f"{s.clipped:.4%}", f"{s.sqnr:.1f}") for s in self.sites]
        return make_table("Ranges of the activations", ("site",), ("max", "amax", "clipped", "SQNR dB"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; a histogram as the width of its bins and their counts."""
        histograms = {path: {"width": h.width, "counts": h.used.tolist()} for path, h in self.histograms.items()}
        return {"sites": plain([asdict(site) for site in self.sites]), "histograms": histograms}


def ranges(model: nn.Module, batches: Iterable[Any]) -> Ranges:
    """Count what reaches each quantizing activation site, and say what its range does to it.

    Args:
        model: Prepared and calibrated; runs as it is, in evaluation mode. Afterwards it is what it was.
        batches: As for ``qat.calibrate``.

    Raises:
        QATError: If no site quantizes, the batches are empty, or a NaN or Inf is seen.
    """
    sites = _quantizing(model)
    observers = {path: HistogramObserver(path, device=site.amax.device) for path, site in sites.items()}

    def look(path: str, site: Quantizer, x: Tensor) -> None:
        if path in observers:
            observers[path].observe(x)

    with running(model) as (inner, run), watching(inner, look):
        for batch in each_batch(batches):
            run(batch)
    found, histograms = [], {}
    for path, observer in observers.items():
        histogram = observer.histogram
        if observer.seen and histogram.amax > 0:
            amax = float(sites[path].amax.detach().abs())
            histograms[path] = histogram
            found.append(SiteRange(path, histogram.amax, amax, *quality(histogram, amax, fmt=sites[path].fmt)))
    return Ranges(tuple(found), histograms)


def _quantizing(model: nn.Module) -> dict[str, Quantizer]:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    sites = {path: site for path, site in quantizers(inner) if site.state is State.QUANTIZING}
    if not sites:
        raise QATError("model: no site quantizes. Run qat.prepare(model) and qat.calibrate(model, loader) first")
    return {path: site for path, site in sites.items() if not isinstance(site, WeightQuantizer)}


@dataclass(frozen=True)
class ClipRates(Result):
    """What :func:`clip_rates` found; prints as a table.

    Attributes:
        rates: Share of elements whose code is clipped, by the path of the site, the largest first.
    """

    rates: dict[str, float]

    def table(self) -> Table:
        return make_table("Clipped codes", ("site",), ("clipped",), [(p, f"{r:.4%}") for p, r in self.rates.items()])


def clip_rates(model: nn.Module, batches: Iterable[Any]) -> ClipRates:
    """Count exactly how much of what reaches each quantizing site lies beyond its range.

    Args:
        model: Prepared and calibrated; runs as it is, in evaluation mode. Afterwards it is what it was.
        batches: As for ``qat.calibrate``.

    Returns:
        Rates by site, as :func:`qat.ranges.clip_rates` defines them.

    Raises:
        QATError: If no site quantizes, or the batches are empty. Of batches that do not fit, the model's own error.
    """
    _quantizing(model)
    with running(model) as (inner, run):

        def run_all(_: Any) -> None:
            for batch in each_batch(batches):
                run(batch)

        rates = measured_clip_rates(inner, run_all)
    return ClipRates(dict(sorted(rates.items(), key=lambda item: -item[1])))


@dataclass(frozen=True)
class RangeChange:
    """How the range of one site moved.

    Attributes:
        path: Of the quantizer.
        smallest: The smallest ratio of a channel's range to what it was.
        largest: The largest one; the same for one scale a tensor.
    """

    path: str
    smallest: float
    largest: float


@dataclass(frozen=True)
class WeightChange:
    """How one weight moved.

    Attributes:
        name: Of the parameter.
        sqnr: ``10 log10(sum(w ** 2) / sum((w' - w) ** 2))`` in dB of the weight before and after; infinite if it is the same.
        cosine: Cosine similarity of the two.
    """

    name: str
    sqnr: float
    cosine: float


@dataclass(frozen=True)
class Changes(Result):
    """What :func:`compare` found; prints as a table.

    Attributes:
        ranges: Of all sites that have a range in both states, in the order of the state dict.
        weights: Of all parameters with two dimensions or more, likewise.
    """

    ranges: tuple[RangeChange, ...]
    weights: tuple[WeightChange, ...]

    def table(self) -> Table:
        rows = [(r.path, f"{r.smallest:.4g}", f"{r.largest:.4g}", "", "") for r in self.ranges]
        rows += [(w.name, "", "", f"{w.sqnr:.1f}", f"{w.cosine:.5f}") for w in self.weights]
        return make_table("What changed", ("site or weight",), ("amax ratio, least", "largest", "SQNR dB", "cosine"), rows)


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Changes:
    """What training changed: the ranges and the weights of two state dicts.

    Args:
        before: ``model.state_dict()``, copied (``{k: v.clone() ...}``) or saved before training.
        after: That of the same model later.

    Raises:
        QATError: If they have no range or weight in common, or one with another shape.
    """
    moved: list[RangeChange] = []
    weights: list[WeightChange] = []
    for name, old in before.items():
        new = after.get(name)
        if not isinstance(old, Tensor) or not isinstance(new, Tensor) or not old.is_floating_point():
            continue
        if old.shape != new.shape:
            raise QATError(f"{name}: shape {tuple(old.shape)} before, {tuple(new.shape)} after. Pass states of one model")
        new = new.to(old.device)
        if name.rpartition(".")[2] == "amax":
            # The sign of a learned range has no meaning.
            old, new = old.double().abs(), new.double().abs()
            if bool((old > 0).all() & (new > 0).all()):
                ratio = new / old
                moved.append(RangeChange(name.removesuffix("amax").removesuffix("."), float(ratio.min()), float(ratio.max())))
        elif old.ndim > 1:
            distance = Distance()
            distance.add(old, new)
            weights.append(WeightChange(name, distance.sqnr, distance.cosine))
    if not moved and not weights:
        raise QATError("before, after: have no range and no weight in common. Pass state dicts of one model")
    return Changes(tuple(moved), tuple(weights))
