"""The plots of a report, as figures of plotly.js: plain values, with all text escaped.

Plotly reads a few HTML tags in labels, links among them, so that names of modules are escaped before they get there.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from ..analysis import Changes, LayerErrors, Ranges, Sensitivity
from ..calibration.histogram import Histogram
from .weights import BINS, WeightRange

Figure = dict[str, Any]

COLORS = {
    "conv": "#1f6fb2",
    "linear": "#0f8a7e",
    "attention": "#7a4fb5",
    "add": "#d97706",
    "gate": "#b4457f",
    "pool": "#64748b",
    "other": "#8a6d3b",
}
_INK, _GRID = "#1c2733", "#e3e8ee"
# Names on an axis: no more than fit, and no longer than that.
_MOST_NAMES, _LONGEST_NAME = 90, 26
RANKED = 25
HISTOGRAM_BINS = 128


def error_chart(errors: LayerErrors) -> Figure:
    """SQNR of every layer: bars alone, points with all others quantized."""
    layers = errors.layers
    names = [escaped(layer.path) for layer in layers]
    positions = list(range(len(layers)))
    bars = []
    for kind in dict.fromkeys(layer.kind for layer in layers):
        chosen = [i for i in positions if layers[i].kind == kind]
        bars.append(
            {
                "type": "bar",
                "name": escaped(kind),
                "x": chosen,
                "y": [finite(layers[i].sqnr) for i in chosen],
                "marker": {"color": COLORS.get(kind, COLORS["other"])},
                "customdata": [[names[i], number(layers[i].sqnr, ".1f"), number(layers[i].cosine, ".5f")] for i in chosen],
                "hovertemplate": "<b>%{customdata[0]}</b><br>alone: %{customdata[1]} dB, "
                "cosine %{customdata[2]}<extra></extra>",
            }
        )
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "all layers quantized",
        "x": positions,
        "y": [finite(layer.sqnr_accumulated) for layer in layers],
        "marker": {"color": _INK, "size": 6, "symbol": "diamond", "line": {"color": "#ffffff", "width": 1}},
        "customdata": [
            [name, number(layer.sqnr_accumulated, ".1f"), number(layer.cosine_accumulated, ".5f")]
            for name, layer in zip(names, layers, strict=True)
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>all quantized: %{customdata[1]} dB, "
        "cosine %{customdata[2]}<extra></extra>",
    }
    axis = {"title": "layers in the order in which they run", **_named_axis(positions, [layer.path for layer in layers])}
    return _figure([*bars, points], axis, {"title": "SQNR of the layer's output, dB"}, height=430, bargap=_gap(len(layers)))


def sensitivity_chart(found: Sensitivity) -> Figure:
    """The most sensitive layers, the worst on top."""
    layers = found.layers[:RANKED][::-1]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [finite(layer.change) for layer in layers],
        "y": list(range(len(layers))),
        "marker": {"color": [COLORS.get(layer.kind, COLORS["other"]) for layer in layers]},
        "customdata": [[escaped(layer.path), escaped(layer.kind), number(layer.change, ".3e")] for layer in layers],
        "hovertemplate": "<b>%{customdata[0]}</b> (%{customdata[1]})<br>%{customdata[2]}<extra></extra>",
    }
    y = _named_axis(list(range(len(layers))), [layer.path for layer in layers], longest=44)
    x = {"title": "relative error of the model's output", "rangemode": "tozero", "exponentformat": "e"}
    return _figure([bar], x, {**y, "tickangle": 0}, height=90 + 22 * len(layers), bargap=0.3, legend=False)


def change_chart(changes: Changes) -> Figure | None:
    """How far each weight moved; ``None`` if there are none."""
    weights = changes.weights
    if not weights:
        return None
    positions = list(range(len(weights)))
    # The share of the norm that changed: 0 for a weight that did not.
    changed = {i: 100 * 10 ** (-weight.sqnr / 20) for i, weight in enumerate(weights) if weight.sqnr > -math.inf}
    # One that was zero before has no norm: no bar is higher.
    largest = max(changed.values(), default=0.0) or 100.0
    bar = {
        "type": "bar",
        "x": positions,
        "y": [changed.get(i, largest) for i in positions],
        "marker": {"color": COLORS["conv"]},
        "customdata": [[escaped(w.name), number(w.sqnr, ".1f"), number(w.cosine, ".6f")] for w in weights],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{y:.3g} % of its norm<br>"
        "SQNR %{customdata[1]} dB, cosine %{customdata[2]}<extra></extra>",
    }
    x = {"title": "weights in the order of the state dict", **_named_axis(positions, [weight.name for weight in weights])}
    return _figure(
        [bar],
        x,
        {"title": "change, % of the weight's norm", "rangemode": "tozero"},
        height=400,
        bargap=_gap(len(weights)),
        legend=False,
    )


def coverage_chart(counts: Sequence[tuple[str, int, float | None]]) -> Figure:
    """Layers of an engine, or the time in them, by the type that they compute in.

    Args:
        counts: Type, layers, and time in ms if it is known.
    """
    colors = {"INT8": "#1f6fb2", "FP8": "#0f8a7e", "FP16": "#d97706", "BF16": "#b4457f", "FP32": "#64748b"}
    timed = any(ms is not None for _, _, ms in counts)
    bars = []
    for name, layers, ms in counts:
        rows = [layers / max(sum(count for _, count, _ in counts), 1)]
        texts = [f"{escaped(name)}: {layers}"]
        if timed:
            rows.append((ms or 0.0) / max(sum(other or 0.0 for *_, other in counts), 1e-30))
            texts.append(f"{escaped(name)}: {ms or 0.0:.4f} ms")
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": escaped(name),
                "x": [100 * share for share in rows],
                "y": ["layers", "time"][: len(rows)],
                "text": texts,
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "marker": {"color": colors.get(name, "#8a6d3b")},
                "hovertemplate": "%{text}, %{x:.1f} %<extra></extra>",
            }
        )
    x = {"title": "share, %", "range": [0, 100]}
    y = {"autorange": "reversed"}
    return _figure(bars, x, y, height=170 + 40 * timed, barmode="stack")


def histogram_chart(axis: str) -> Figure:
    """The layout of a large histogram, which the page fills in; ``axis`` says what is counted."""
    y = {"title": "values (logarithmic)", "type": "log", "rangemode": "normal", "dtick": 1}
    return _figure([], {"title": axis}, y, height=300, bargap=0, legend=False)


def activation_bins(histogram: Histogram) -> tuple[float, list[int]]:
    """The width of at most ``HISTOGRAM_BINS`` bins from zero on, and their counts.

    Bins are joined in whole groups, so that the counts stay exact.
    """
    counts = histogram.used.tolist()
    group = max(1, math.ceil(len(counts) / HISTOGRAM_BINS))
    joined = [sum(counts[start : start + group]) for start in range(0, len(counts), group)]
    return histogram.width * group, joined


def activation_data(found: Ranges) -> list[dict[str, Any]]:
    """What the page draws of each activation site."""
    data = []
    for site in found.sites:
        width, counts = activation_bins(found.histograms[site.path])
        data.append(
            {
                "start": 0.0,
                "width": width,
                "counts": counts,
                "marks": [[site.amax, "amax"]],
                "ends": [0.0, max(site.largest, site.amax)],
            }
        )
    return data


def weight_data(weights: Sequence[WeightRange]) -> list[dict[str, Any]]:
    """What the page draws of each weight site."""
    data = []
    for weight in weights:
        marks: list[list[Any]] = [[weight.largest, "largest amax"], [-weight.largest, ""]]
        if weight.smallest != weight.largest:
            marks += [[weight.smallest, "smallest"], [-weight.smallest, ""]]
        end = max(weight.limit, weight.largest)
        data.append(
            {
                "start": -weight.limit,
                "width": 2 * weight.limit / BINS,
                "counts": list(weight.counts),
                "marks": marks,
                "ends": [-end, end],
            }
        )
    return data


def escaped(text: str) -> str:
    """``text`` as plotly.js shows it literally: it reads tags and entities, and puts data in place of ``%{...}``."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def number(value: float, form: str) -> str:
    """``value`` in ``form``; in words where it is no number."""
    if math.isnan(value):
        return "undefined"
    return format(value, form) if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def finite(value: float) -> float | None:
    """``value``, or ``None`` for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _gap(count: int) -> float:
    """The share of an axis between bars: a few bars need not fill it."""
    return max(0.25, 0.85 - 0.03 * count)


def _named_axis(positions: list[int], names: Sequence[str], *, longest: int = _LONGEST_NAME) -> dict[str, Any]:
    """An axis with a name at each position, as long as there is room for them."""
    ends = [-0.8, len(names) - 0.2]
    if len(names) > _MOST_NAMES:
        return {"showticklabels": False, "ticks": "", "ticklen": 0, "showgrid": False, "zeroline": False, "range": ends}
    # The end of a path tells more than its start.
    texts = [name if len(name) <= longest else "…" + name[1 - longest :] for name in names]
    # Upright names need the least room, lying ones are read best.
    angle, size = (-90, 10) if len(names) > 40 else (-60, 11) if len(names) > 8 else (0, 11)
    shown = {"tickvals": positions, "ticktext": [escaped(text) for text in texts], "showgrid": False, "zeroline": False}
    return {**shown, "tickangle": angle, "tickfont": {"size": size}, "range": ends}


def _figure(data: list[Any], x: dict[str, Any], y: dict[str, Any], *, height: int, legend: bool = True, **more: Any) -> Figure:
    def axis(given: dict[str, Any]) -> dict[str, Any]:
        title = {"text": given.get("title", ""), "standoff": 12}
        base = {"gridcolor": _GRID, "zerolinecolor": "#b8c2cc", "automargin": True}
        base |= {"tickfont": {"size": 11}, "ticks": "outside", "ticklen": 5, "tickcolor": "#b8c2cc"}
        return {**base, **given, "title": title}

    layout = {
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
            "size": 12,
            "color": _INK,
        },
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": "#b8c2cc", "font": {"color": _INK}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": legend,
        "xaxis": axis(x),
        "yaxis": axis(y),
        **more,
    }
    return {"data": data, "layout": layout}
