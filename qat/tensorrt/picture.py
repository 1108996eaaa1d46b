"""A picture of an engine: its layers in the order in which they run, coloured by precision."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import QATError
from ..support.files import write_whole
from .layers import EngineLayer

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {
    "INT8": "#009e73",
    "FP8": "#f0e442",
    "FP16": "#56b4e9",
    "BF16": "#cc79a7",
    "FP32": "#e69f00",
    "mixed": "#b8a9d9",
    "unknown": "#c9c9c9",
}
_ROW_LAYERS = 32
# Heights by what a layer does; the strip under each tells what it writes.
_HEIGHTS = {"product": 1.0, "add": 0.8, "other": 0.6, "reformat": 0.4}
_STRIP = 0.12


class Node(Protocol):
    """An ONNX node, and the index of its layer."""

    @property
    def group(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


class Drawable(Protocol):
    """Layers, and what is told about them, as :class:`qat.tensorrt.Inspection` does."""

    @property
    def layers(self) -> tuple[EngineLayer, ...]: ...
    @property
    def sites(self) -> Sequence[Node] | None: ...
    @property
    def lost(self) -> Sequence[Node]: ...
    @property
    def runtime(self) -> str: ...
    @property
    def target(self) -> str | None: ...
    @property
    def coverage(self) -> str: ...


def draw(inspection: Drawable, path: str | os.PathLike[str], *, row_layers: int = _ROW_LAYERS) -> Path:
    """Draw the layers of an engine as boxes, row under row.

    A box is as wide as its layer is long in time, or all are equally wide without a profile. Its colour is the type that it
    computes in, the strip under it the type that it writes. Convolutions and matrix products are the tallest boxes, copies
    are low and hatched, a "+" marks a residual Add. A black line marks where one layer computes in another type than the last.

    Args:
        inspection: What to draw.
        path: Where to; the suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        row_layers: About how many layers a row holds.

    Raises:
        QATError: If matplotlib is missing, or the suffix names no format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise QATError("a picture needs matplotlib: `pip install matplotlib`") from error

    path = Path(path)
    rows = _rows(inspection.layers, row_layers)
    figure = Figure(figsize=(16, 1.3 + 2.15 * len(rows)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix.lstrip(".") not in canvas.get_supported_filetypes():
        raise QATError(f"{path}: no picture format {path.suffix!r}. Use .png, .svg or .pdf")
    if inspection.sites is None:
        adds = {i for i, layer in enumerate(inspection.layers) if _joins_tensors(layer)}
    else:
        adds = {site.layer for site in inspection.sites if site.group == "add" and site.layer is not None}
    lost = {site.layer for site in inspection.lost if site.layer is not None}
    timed = any(layer.time_ms for layer in inspection.layers)
    span = max(sum(_width(layer, timed) for _, layer in row) for row in rows)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    previous: EngineLayer | None = None
    for axis, row in zip(axes, rows, strict=True):
        previous = _draw_row(axis, row, previous, adds, lost, span, timed)
    total = sum(layer.time_ms or 0.0 for layer in inspection.layers)
    heading = [inspection.runtime, inspection.target, f"{len(inspection.layers)} layers", f"{total:.3f} ms" if timed else ""]
    title = f"{', '.join(part for part in heading if part)}\n{inspection.coverage}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _legend(figure, inspection.layers)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=path.suffix.lstrip("."))
    write_whole(path, picture.getvalue())
    return path


def _joins_tensors(layer: EngineLayer) -> bool:
    """Whether it adds two tensors, as far as names tell; without the graph there is nothing better."""
    return len(layer.inputs) > 1 and any(re.search(r"(?:\A|/)Add(?:_\d+)?\Z", name) for name in layer.onnx_nodes)


def _rows(layers: tuple[EngineLayer, ...], row_layers: int) -> list[list[tuple[int, EngineLayer]]]:
    """The numbered layers in rows of about equal length: in time, if it is known, else in number."""
    numbered = list(enumerate(layers))
    if not numbered:
        return [[]]
    count = -(-len(layers) // row_layers)
    timed = any(layer.time_ms for layer in layers)
    total = sum(_width(layer, timed) for layer in layers)
    rows: list[list[tuple[int, EngineLayer]]] = [[] for _ in range(count)]
    position = 0.0
    for i, layer in numbered:
        width = _width(layer, timed)
        middle = (position + width / 2) / total
        rows[min(int(middle * count), count - 1)].append((i, layer))
        position += width
    return [row for row in rows if row]


def _width(layer: EngineLayer, timed: bool) -> float:
    # A layer that takes no time stays visible as a line.
    return max(layer.time_ms or 0.0, 1e-6) if timed else 1.0


def _draw_row(
    axis: Any,
    row: list[tuple[int, EngineLayer]],
    previous: EngineLayer | None,
    adds: set[int],
    lost: set[int],
    span: float,
    timed: bool,
) -> EngineLayer | None:
    from matplotlib.patches import Rectangle

    x = last_label = 0.0
    room = span * 0.011
    for i, layer in row:
        width = _width(layer, timed)
        role = _role(layer, i in adds)
        height = _HEIGHTS[role]
        edge = "#d00000" if i in lost else "white"
        axis.add_patch(
            Rectangle(
                (x, 0),
                width,
                height,
                facecolor=_COLOURS[_colour(layer)],
                edgecolor="black" if role == "reformat" else edge,
                hatch="////" if role == "reformat" else None,
                linewidth=2 if i in lost else 0.8,
                zorder=3 if i in lost else 2,
            )
        )
        written = layer.output_precision if layer.output_precision in _COLOURS else "unknown"
        axis.add_patch(Rectangle((x, -_STRIP - 0.03), width, _STRIP, facecolor=_COLOURS[written], edgecolor="none", zorder=2))
        middle = x + width / 2
        if i in adds and width >= room * 0.8:
            axis.text(middle, height / 2, "+", ha="center", va="center", fontsize=15, fontweight="bold", zorder=4)
        if previous is not None and _colour(previous) != _colour(layer):
            axis.plot([x, x], [-_STRIP - 0.03, 1.06], color="black", linewidth=1.4, zorder=5)
        # Narrow boxes get a label only where there is room for it.
        if i == row[0][0] or middle - last_label >= room * 1.6:
            axis.text(
                middle, -0.22, _label(layer, role), rotation=38, ha="right", va="top", fontsize=6.5, rotation_mode="anchor",
                color="#d00000" if i in lost else "black",
            )  # fmt: skip
            last_label = middle
        x += width
        previous = layer
    axis.set_xlim(-span * 0.035, span * 1.002)
    axis.set_ylim(-1.0, 1.1)
    axis.axis("off")
    axis.text(-span * 0.006, 0.5, str(row[0][0]) if row else "", ha="right", va="center", fontsize=8, color="#606060")
    return previous


def _role(layer: EngineLayer, has_add: bool) -> str:
    if layer.is_mac:
        return "product"
    if layer.is_reformat:
        return "reformat"
    return "add" if has_add else "other"


def _colour(layer: EngineLayer) -> str:
    """What a layer computes in; "mixed" for a region whose inner types are not told."""
    if layer.is_region:
        return "mixed"
    return layer.precision if layer.precision in _COLOURS else "unknown"


def _label(layer: EngineLayer, role: str) -> str:
    """The layer's main node, without what a reader can do without."""
    names = [name for name in layer.onnx_nodes if not re.search(r"(?:De)?[Qq]uantizeLinear|weight", name)]
    wanted = {"product": r"Conv|Gemm|MatMul", "add": r"Add"}.get(role, "")
    text = next((name for name in names if re.search(wanted, name)), None) or next(iter(names), None)
    if text is None:
        text = "copy" if layer.is_reformat and not layer.onnx_nodes else next(iter(layer.onnx_nodes), layer.kind)
    text = re.sub(r"/BatchNormalization|/Conv$", "", text)
    text = text if len(text) <= 28 else f"…{text[-27:]}"
    return text.replace("$", r"\$")


def _legend(figure: Any, layers: tuple[EngineLayer, ...]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {_colour(layer) for layer in layers} | {layer.output_precision for layer in layers}
    handles: list[Any] = [
        Patch(facecolor=colour, label={"mixed": "region (Myelin)"}.get(name, name))
        for name, colour in _COLOURS.items()
        if name in used
    ]
    handles += [
        Patch(facecolor="white", edgecolor="black", hatch="////", label="reformat, copy"),
        Line2D([], [], color="black", linewidth=1.4, label="precision changes"),
        Line2D([], [], color="black", marker="+", linestyle="none", markersize=9, label="residual Add"),
        Patch(facecolor="white", edgecolor="#d00000", linewidth=2, label="lost INT8"),
        Patch(facecolor="#eeeeee", label="strip below: type written"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
