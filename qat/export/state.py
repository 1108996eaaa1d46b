"""The model while it is traced: every site that runs calls the exporter's operator, with its scale at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.numerics import INT8
from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers
from ..errors import QATError
from ..nn.add import fusing_adds
from ..support.modes import evaluating
from .inputs import output_names, run

# The buffer that a site reads its scale from, there during an export only.
SCALE = "export_scale"


@dataclass
class Traced:
    """What a run of the model told about it."""

    output_names: list[str]
    weight_sites: set[str]


class _ScaleRecorder:
    """Observer that notes the scale a site would use; a site that is never called notes none."""

    def __init__(self, site: Quantizer) -> None:
        self.site = site
        self.scale: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        self.scale = self.site.range_scale(x).detach()


@contextlib.contextmanager
def exporting(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fuse_adds: bool) -> Iterator[Traced]:
    """Put ``model`` in the state to be traced; afterwards, and after an error, it is what it was. It may have no sites."""
    with evaluating(model), fusing_adds(model, fuse_adds), _traceable(model, args, kwargs) as traced:
        yield traced


@contextlib.contextmanager
def _traceable(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Traced]:
    """Every site that runs calls the exporter's operator, the others pass tensors through."""
    sites = dict(quantizers(model))
    states = {site: (site.state, site.observer) for site in sites.values()}
    try:
        recorders = {path: _ScaleRecorder(site) for path, site in sites.items()}
        for path, site in sites.items():
            site.observer, site.state = recorders[path], State.COLLECTING
        output = run(model, args, kwargs, "example_inputs")
        # Sites that do not run in eval mode, auxiliary heads say, are no part of the graph and need no range.
        reached = {path: site for path, site in sites.items() if recorders[path].scale is not None}
        if sites:
            _refuse_unready(reached, {path: states[site][0] for path, site in reached.items()})
        for path, site in sites.items():
            site.observer, site.state = states[site][1], State.OFF
            if path in reached:
                site.register_buffer(SCALE, recorders[path].scale, persistent=False)
                site.state = State.EXPORTING
        yield Traced(output_names(output), {path for path, site in sites.items() if isinstance(site, WeightQuantizer)})
    finally:
        for site, (state, observer) in states.items():
            site.state, site.observer = state, observer
            if SCALE in site._buffers:
                delattr(site, SCALE)


def _refuse_unready(sites: dict[str, Quantizer], states: dict[str, State]) -> None:
    if not sites:
        raise QATError("model: example_inputs reach no quantized layer, there is nothing to export in INT8")
    follows = {path for path, site in sites.items() if isinstance(site, WeightQuantizer) and site.follow}
    empty = [path for path, site in sites.items() if path not in follows and not site.has_range]
    if empty:
        raise QATError(_listing(empty, "no data seen, amax is unset") + "\nRun qat.calibrate(model, loader) before export.")
    off = [path for path in sites if states[path] is not State.QUANTIZING]
    if off:
        raise QATError(
            _listing(off, "switched off, or still collecting")
            + "\nRun qat.calibrate(model, loader), or set_state(State.QUANTIZING) on these sites, before export."
        )
    other = [path for path, site in sites.items() if site.fmt != INT8]
    if other:
        raise QATError(
            _listing(other, "its number format cannot be exported, only int8 can")
            + "\nUse weight_format='int8' for these layers, or quantize=False."
        )


def _listing(paths: list[str], problem: str, most: int = 20) -> str:
    more = [f"... and {len(paths) - most} more"] if len(paths) > most else []
    return "\n".join([*(f"{path}: {problem}" for path in paths[:most]), *more])
