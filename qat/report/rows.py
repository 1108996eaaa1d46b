"""What the tables of a report show, as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis import Changes, ClipRates, LayerErrors, Ranges, Sensitivity
from .charts import activation_bins, number
from .weights import BINS, WeightRange

if TYPE_CHECKING:
    from ..tensorrt import Inspection

# Of the small histograms, in pixels.
_WIDTH, _HEIGHT = 172, 30


@dataclass(frozen=True)
class ResultTable:
    """Figures of several models, or of several engines.

    Attributes:
        rows: By name of the row and of the column; numbers, text, or ``None`` for what is not known.
        caption: Above the table.
        corner: What a row is.
    """

    rows: Mapping[str, Mapping[str, Any]]
    caption: str = ""
    corner: str = "model"


@dataclass(frozen=True)
class Row:
    """One row: a path, its kind or the like, numbers, and perhaps a small histogram."""

    path: str
    kind: str
    cells: tuple[str, ...]
    shape: str = ""
    line: Spark | None = None


@dataclass(frozen=True)
class Spark:
    """A small histogram: an area as SVG path data, and where the marks are."""

    path: str
    marks: tuple[float, ...]


def result_tables(tables: Iterable[ResultTable]) -> list[dict[str, Any]]:
    """Tables whose columns are all that any row has."""
    found = []
    for table in tables:
        columns = list(dict.fromkeys(column for row in table.rows.values() for column in row))
        rows = [(name, [_cell(row.get(column)) for column in columns]) for name, row in table.rows.items()]
        found.append({"caption": table.caption, "corner": table.corner, "columns": columns, "rows": rows})
    return found


def error_rows(errors: LayerErrors) -> list[Row]:
    """One row a layer, in the order in which they run."""
    return [
        Row(
            e.path,
            e.kind,
            (
                number(e.sqnr, ".1f"),
                number(e.cosine, ".5f"),
                number(e.sqnr_accumulated, ".1f"),
                number(e.cosine_accumulated, ".5f"),
            ),
        )
        for e in errors.layers
    ]


def sensitivity_rows(found: Sensitivity) -> list[Row]:
    """One row a layer, the most sensitive first, with its share of the sum."""
    total = sum(layer.change for layer in found.layers if layer.change > 0)
    return [
        Row(x.path, x.kind, (number(x.change, ".3e"), f"{max(x.change, 0.0) / total:.1%}" if total > 0 else "–"))
        for x in found.layers
    ]


def activation_rows(found: Ranges, clipped: ClipRates) -> list[Row]:
    """One row a site."""
    rows = []
    for site in found.sites:
        width, counts = activation_bins(found.histograms[site.path])
        end = max(site.largest, site.amax)
        cells = (
            number(site.largest, "#.4g"),
            number(site.amax, "#.4g"),
            number(site.amax / site.largest, ".3f"),
            _rate(clipped.rates.get(site.path)),
            number(site.sqnr, ".1f"),
        )
        rows.append(Row(site.path, "", cells, line=_spark(counts, 0.0, width, 0.0, end, [site.amax])))
    return rows


def weight_rows(weights: Sequence[WeightRange], clipped: ClipRates) -> list[Row]:
    """One row a site."""
    rows = []
    for w in weights:
        end = max(w.limit, w.largest)
        marks = sorted({-w.largest, -w.smallest, w.smallest, w.largest})
        cells = (
            number(w.smallest, "#.4g"),
            number(w.largest, "#.4g"),
            _rate(clipped.rates.get(w.path)),
            number(w.sqnr, ".1f"),
        )
        line = _spark(w.counts, -w.limit, 2 * w.limit / BINS, -end, end, marks)
        rows.append(Row(w.path, "", cells, "×".join(map(str, w.shape)), line))
    return rows


def change_rows(changes: Changes) -> dict[str, Any]:
    """Weights, and ranges that moved."""
    weights = [
        Row(
            w.name,
            "",
            (
                number(100 * 10 ** (-w.sqnr / 20) if not math.isnan(w.sqnr) else math.nan, "#.3g"),
                number(w.sqnr, ".1f"),
                number(w.cosine, ".6f"),
            ),
        )
        for w in changes.weights
    ]
    moved = [
        Row(r.path, "", (number(r.smallest, ".4f"), number(r.largest, ".4f")))
        for r in changes.ranges
        if (r.smallest, r.largest) != (1.0, 1.0)
    ]
    return {"weights": weights, "has_chart": bool(weights), "ranges": moved, "all_ranges": len(changes.ranges)}


def engine_rows(found: Inspection) -> dict[str, Any]:
    """Layers of an engine, nodes that are not in INT8, and how many layers compute in which type."""
    timed = any(layer.time_ms is not None for layer in found.layers)
    layers = [
        {
            "kind": layer.kind,
            "precision": layer.precision or "unknown",
            "output": layer.output_precision or "unknown",
            "ms": "–" if layer.time_ms is None else f"{layer.time_ms:.4f}",
            "nodes": ", ".join(layer.onnx_nodes) or layer.name,
        }
        for layer in found.layers
    ]
    title = ", ".join(part for part in (found.runtime, found.target, f"{len(layers)} layers") if part)
    sites = None if found.sites is None else [site for site in found.sites if not site.is_good]
    return {
        "coverage": found.coverage,
        "title": title,
        "timed": timed,
        "layers": layers,
        "sites": sites,
        "counts": engine_counts(found),
    }


def engine_counts(found: Inspection) -> list[tuple[str, int, float | None]]:
    """Types that the layers compute in, how many do, and their time in ms if it is known; the most frequent first."""
    counts = Counter(layer.precision or "unknown" for layer in found.layers)
    timed = any(layer.time_ms is not None for layer in found.layers)
    times: Counter[str] = Counter()
    for layer in found.layers:
        times[layer.precision or "unknown"] += layer.time_ms or 0.0  # type: ignore[assignment]
    return [(name, count, times[name] if timed else None) for name, count in counts.most_common()]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value, ".4g")
    return str(value)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.4%}"


def _spark(counts: Sequence[int], start: float, width: float, low: float, high: float, marks: Sequence[float]) -> Spark:
    """The logarithm of the counts over ``[low, high]``."""
    span = high - low
    if span <= 0 or not any(counts):
        return Spark("", ())
    top = math.log1p(max(counts))
    parts = [f"M{_WIDTH * (start - low) / span:.1f} {_HEIGHT}"]
    for i, count in enumerate(counts):
        left, right = (_WIDTH * min(max((start + j * width - low) / span, 0.0), 1.0) for j in (i, i + 1))
        y = _HEIGHT - (_HEIGHT - 2) * math.log1p(count) / top
        parts.append(f"L{left:.1f} {y:.1f}L{right:.1f} {y:.1f}")
    parts.append(f"V{_HEIGHT}Z")
    return Spark("".join(parts), tuple(round(min(max(_WIDTH * (mark - low) / span, 0.7), _WIDTH - 0.7), 1) for mark in marks))
