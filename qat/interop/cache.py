"""Calibration caches of TensorRT: read, and given to the sites of a prepared model.

A cache holds one scale for each tensor of the float graph that TensorRT calibrated: a first line ``TRT-<release>-<algorithm>``
(a bare ``0`` from the legacy calibrator), then lines ``tensor: <8 hex digits>``, a big-endian float32.
"""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.quantizer import Quantizer, WeightQuantizer, passing, quantizers, set_ranges, watching
from ..errors import QATError
from ..preparation import prepared_report
from ..support.files import read_whole
from ..support.inputs import call
from ..support.modes import looking_at
from ..tensorrt.calibrators import CACHE_HEADER
from .fit import smallest_range
from .result import Imported

# The name may hold colons itself.
_LINE = re.compile(r"(.+): ?([0-9a-fA-F]{8})")
# Relative to the largest magnitude of a tensor. Two implementations of one graph differ by far less, two tensors by far more.
_SAME = 1e-3


def read_calibration_cache(path: str | os.PathLike[str]) -> dict[str, float]:
    """The scales in a calibration cache of TensorRT.

    Args:
        path: The file.

    Returns:
        Scale by name of the tensor; the range is 127 times that. Zero for a tensor of zeros.

    Raises:
        QATError: If the file is missing or malformed; names the line.
    """
    name = os.fspath(path)
    content = read_whole(path)
    if not CACHE_HEADER.match(content):
        raise QATError(f"{name}: no calibration cache of TensorRT: its first line is not TRT-<release>-<algorithm>, or 0")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise QATError(
            f"{name}: no calibration cache of TensorRT: it is no text ({error.reason} at byte {error.start})"
        ) from error
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise QATError(f"{name}: line {number} is not 'tensor: <8 hex digits>': {line[:80]!r}. Calibrate again")
        scale = struct.unpack(">f", bytes.fromhex(match[2]))[0]
        if not (math.isfinite(scale) and scale >= 0):
            raise QATError(
                f"{name}: line {number}: the scale of {match[1]!r} is {scale}, not a positive number. Calibrate again"
            )
        if scales.setdefault(match[1], scale) != scale:
            raise QATError(f"{name}: line {number}: {match[1]!r} has another scale before. Calibrate again")
    if not scales:
        raise QATError(f"{name}: holds no scales. Calibrate again")
    return scales


def tensor_names(
    model: nn.Module, onnx_path: str | os.PathLike[str], example_inputs: Any, *, among: Mapping[str, Any] | None = None
) -> dict[str, tuple[str, ...]]:
    """Which tensors of a float ONNX graph reach the activation sites of a prepared model.

    Exporters name tensors as they like, and fold layers. So both are run, the model in float, and tensors of equal values are
    the same tensor, whoever exported the graph.

    Args:
        model: Prepared; with the weights that the graph has. It is left as it was.
        onnx_path: The float graph.
        example_inputs: What both run on; one batch of any data that is not constant.
        among: Names to choose from; all if ``None``.

    Returns:
        For each activation site that runs, the names of its tensors, the best match first; several if the site is called on
        several, or if tensors are equal, and none if there is no such tensor.

    Raises:
        QATError: If the model is not prepared, or the graph does not run on ``example_inputs``.
    """
    seen, _ = _observe(model, example_inputs)
    values = _graph_values(onnx_path, example_inputs, among)
    return {site: tuple(dict.fromkeys(name for x in found for name in _equal(x, values))) for site, found in seen.items()}


def load_calibration_cache(
    model: nn.Module,
    cache: str | os.PathLike[str] | Mapping[str, float],
    onnx_path: str | os.PathLike[str],
    example_inputs: Any,
) -> Imported:
    """Set the ranges of a prepared model from a calibration cache of TensorRT, in place.

    Activation sites get the range of their tensor, weights the maximum of each channel, as TensorRT takes it itself.

    Args:
        model: Prepared; with the weights of the graph that was calibrated.
        cache: The file, or what :func:`read_calibration_cache` gave.
        onnx_path: The float graph that TensorRT calibrated; see :func:`tensor_names`.
        example_inputs: One batch that the model and the graph run on. It only serves to tell tensors apart.

    Returns:
        What was set. Where ``scale * 127 / 127`` rounds, a scale is off by one unit in the last place.

    Raises:
        QATError: If the cache is malformed, or a site's tensor is not in it. The model is then unchanged.
    """
    report = prepared_report(model)
    if report is None:
        raise QATError("model: not prepared, it has no sites. Run qat.prepare(model) first")
    scales = dict(cache) if isinstance(cache, Mapping) else read_calibration_cache(cache)
    where = "cache" if isinstance(cache, Mapping) else os.fspath(cache)
    seen, weights = _observe(model, example_inputs)
    values = _graph_values(onnx_path, example_inputs, scales)
    ranges: dict[str, Tensor] = dict(weights)
    taken: dict[str, str] = {}
    notes: list[str] = []
    missing = []
    for path, found in seen.items():
        matches = [_equal(x, values) for x in found]
        if not all(matches):
            missing.append(path)
            continue
        best = max((names[0] for names in matches), key=lambda name: scales[name])
        taken[path] = best
        others = {name for names in matches for name in names if scales[name] != scales[best]}
        if others:
            notes.append(f"{path}: {best} was taken; {', '.join(sorted(others))} match as well, with other scales. Check it")
            warnings.warn(notes[-1], stacklevel=2)
        site = model.get_submodule(path)
        assert isinstance(site, Quantizer)
        amax = scales[best] * site.fmt.qmax
        ranges[path] = torch.tensor(amax, dtype=torch.float64).to(torch.float32)
        if amax < smallest_range(site.fmt):
            notes.append(f"{path}: the range of {best} is {amax:g}, raised to {smallest_range(site.fmt):.2g}")
    if missing:
        raise QATError(
            f"{', '.join(missing)}: {where} has no scale for what these sites read. It must belong to the float graph "
            f"{os.fspath(onnx_path)!r} with the model's weights; for tensors that TensorRT fused before calibrating, prepare "
            "without the site: QuantConfig(add_inputs='residual'), or a rule"
        )
    damaged = [path for path, amax in ranges.items() if not bool((amax.isfinite() & (amax >= 0)).all())]
    if damaged:
        path = damaged[0]
        raise QATError(
            f"{path}: the scale of {taken.get(path, 'its weight')} in {where} gives no finite range. Calibrate again"
        )
    sites = {path: model.get_submodule(path) for path in ranges}
    set_ranges({site: ranges[p].to(site.amax.device) for p, site in sites.items() if isinstance(site, Quantizer)})
    unset = tuple(path for path, site in quantizers(model) if not site.has_range)
    if unset:
        notes.append(f"{', '.join(unset)}: example_inputs do not reach these sites, so they have no range")
        warnings.warn(notes[-1], stacklevel=2)
    return Imported(report, taken, unset, tuple(notes))


def _observe(model: nn.Module, example_inputs: Any) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """What reaches each activation site in the float model, and the range of what reaches each weight site."""
    seen: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}

    def look(path: str, site: Quantizer, x: Tensor) -> None:
        if isinstance(site, WeightQuantizer):
            weights[path] = site.weight_amax(x)
        elif not any(x is other for other in seen.setdefault(path, [])):
            seen[path].append(x.clone())

    with passing(model), watching(model, look), looking_at(model):
        call(model, example_inputs)
    if not seen:
        raise QATError("model: not prepared, or example_inputs reach no site. Run qat.prepare(model) first")
    return seen, weights


def _graph_values(
    onnx_path: str | os.PathLike[str], example_inputs: Any, among: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    from ..verify.feeds import graph_feeds
    from ..verify.reference import Reference

    graph = Reference(onnx_path)
    feeds = graph_feeds(graph, example_inputs, "example_inputs")
    names = [name for node in graph.nodes for name in node.output if name in graph.depends_on_input and graph.is_float(name)]
    wanted = [name for name in names if among is None or name in among]
    found = {**feeds, **graph.run(feeds, wanted)}
    return {name: value for name, value in found.items() if among is None or name in among}


def _equal(x: Tensor, values: Mapping[str, np.ndarray]) -> list[str]:
    """The tensors of the graph that equal ``x`` up to rounding, the nearest first.

    One of another shape may hold the same values in another order, as attention's do, which exporters put in the order of
    the sequence: a range does not depend on that.
    """
    wanted = x.detach().cpu().float().numpy()
    limit = _SAME * float(np.abs(wanted).max(initial=0.0))
    in_order = np.sort(wanted, axis=None)
    found = []
    for name, value in values.items():
        if value.size != wanted.size:
            continue
        value = value.astype(np.float32)
        same_shape = value.shape == wanted.shape
        difference = np.abs(value - wanted if same_shape else np.sort(value, axis=None) - in_order).max(initial=0.0)
        if difference <= limit:
            found.append((not same_shape, float(difference), name))
    return [name for *_, name in sorted(found)]
