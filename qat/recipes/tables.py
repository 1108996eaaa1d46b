"""What a classification recipe says in the end: a table, a picture and a markdown row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol, TypeVar, cast

from rich import box
from rich.table import Table

from ..errors import QATError
from ..support.files import whole_file, write_text
from .settings import ClassifierSettings


@dataclass(frozen=True)
class Result:
    """Figures of one exported model.

    Attributes:
        label: Row of the table.
        top1: Accuracy in ``[0, 1]``; with several seeds the mean.
        stderr: Of the test set, or over seeds if there are several.
        balanced: Mean recall over classes.
        as_float: Share of the test images that get the class which the float model gives them.
        file_bytes: Size of the ONNX file, if there is one.
        int8_weights_bytes: Size of the file with int8 weights, if there is one.
        cpu_ms: Median latency of one image, if there is a file.
    """

    label: str
    top1: float
    stderr: float
    balanced: float
    as_float: float
    file_bytes: int | None
    int8_weights_bytes: int | None
    cpu_ms: float | None


@dataclass(frozen=True)
class Compared:
    """One figure of a comparison in its table.

    Attributes:
        heading: Of the column.
        key: Of the figure in ``metrics.json``.
        drift: Of PyTorch's own.
        form: How both are printed.
    """

    heading: str
    key: str
    drift: str
    form: str


OF_CLASSES = (
    Compared("top-1 equal", "top1_agreement", "drift_top1_agreement", ".2%"),
    Compared("logits max diff", "max_abs", "drift_max_abs", ".2g"),
    Compared("codes equal", "codes_equal", "drift_codes_equal", ".4%"),
)


def over_seeds(runs: Sequence[Mapping[str, Result]]) -> dict[str, Result]:
    """Means over runs with different seeds; ``stderr`` becomes that of the mean over seeds."""
    return averaged(runs, {"top1": "stderr", "balanced": None, "as_float": None, "cpu_ms": None})


def make_table(results: Mapping[str, Result], title: str, caption: str, *, balanced: bool) -> Table:
    """The table of a run.

    Args:
        results: Rows.
        title: Above the table.
        caption: Below the table.
        balanced: Show balanced accuracy: for classes of different size.
    """
    shown = ("top-1 %", *(["balanced %"] if balanced else []), "as float %", "ONNX MB", "int8 weights MB", "CPU ms")
    table = figures_table("model", shown, title, caption)
    for r in results.values():
        cells = [r.label, _percent(r), *([f"{100 * r.balanced:.2f}"] if balanced else []), f"{100 * r.as_float:.2f}"]
        table.add_row(*cells, megabytes(r.file_bytes), megabytes(r.int8_weights_bytes), _milliseconds(r.cpu_ms))
    return table


def parity_table(found: Mapping[str, Mapping[str, Any]], compared: str, columns: Sequence[Compared] = OF_CLASSES) -> Table:
    """How far each file is from PyTorch, next to PyTorch's own drift.

    Args:
        found: Figures by file name; those that a float model has not are missing.
        compared: What they were compared on, such as ``"64 images"``.
        columns: What is shown; behind each its drift.
    """
    title = f"PyTorch and ONNX Runtime on {compared} (drift: PyTorch itself, summing in another order)"
    table = figures_table("file", [heading for column in columns for heading in (column.heading, "drift")], title)
    for name, figures in found.items():
        keys = [(key, column.form) for column in columns for key in (column.key, column.drift)]
        table.add_row(name, *(format(figures[key], form) if key in figures else "-" for key, form in keys))
    return table


def figures_table(first: str, numbers: Iterable[str], title: str, caption: str | None = None) -> Table:
    """An empty table with one column of names and others of numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _percent(result: Result) -> str:
    return f"{100 * result.top1:.2f} ± {100 * result.stderr:.2f}"


def megabytes(size: int | None) -> str:
    """A size for a table; a dash for none."""
    return "-" if size is None else f"{size / 1e6:.2f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


class Measured(Protocol):
    """What the rows of every recipe have; ``None`` where there is no file."""

    @property
    def label(self) -> str: ...
    @property
    def file_bytes(self) -> int | None: ...
    @property
    def int8_weights_bytes(self) -> int | None: ...
    @property
    def cpu_ms(self) -> float | None: ...


Row = TypeVar("Row", bound=Measured)


def averaged(runs: Sequence[Mapping[str, Row]], fields: Mapping[str, str | None]) -> dict[str, Row]:
    """Means over runs with different seeds; one run as it is.

    Args:
        runs: Rows, dataclasses, by key.
        fields: What is averaged, and the field that gets the standard error of that mean. Others are those of the first run.
    """
    if len(runs) == 1:
        return dict(runs[0])
    merged = {}
    for key, first in runs[0].items():
        found: dict[str, float] = {}
        for name, error in fields.items():
            values = [getattr(run[key], name) for run in runs if getattr(run[key], name) is not None]
            if getattr(first, name) is not None:
                found[name] = mean(values)
            if error is not None:
                found[error] = stdev(values) / sqrt(len(values))
        merged[key] = replace(cast(Any, first), **found)
    return merged


def draw_rows(
    results: Mapping[str, Row], title: str, path: Path, plot: Callable[[Any, list[Row], list[str], list[str]], None]
) -> None:
    """What ``plot`` shows, size and latency of every row as a PNG.

    Args:
        results: Rows, by key.
        title: Above the picture.
        path: Of the PNG.
        plot: ``plot(axes, rows, labels, colors)`` draws the first of the three panels.

    Raises:
        QATError: Without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QATError("the picture needs matplotlib: pip install -e '.[recipes]'") from error
    rows = list(results.values())[::-1]
    labels = [r.label for r in rows]
    colors = ["#999999" if key.startswith("float") else "#2b7bba" for key in reversed(list(results))]
    figure = Figure(figsize=(12, 1.6 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    first, size, latency = figure.subplots(1, 3, sharey=True)
    figure.suptitle(title)
    plot(first, rows, labels, colors)
    # No bar where there is no file.
    size.barh(labels, [(r.int8_weights_bytes or r.file_bytes or nan) / 1e6 for r in rows], color=colors)
    size.set_xlabel("ONNX file, MB\n(quantized: int8 weights)")
    latency.barh(labels, [r.cpu_ms or nan for r in rows], color=colors)
    latency.set_xlabel("CPU latency\nof one image, ms")
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def draw(results: Mapping[str, Result], title: str, path: Path) -> None:
    """Accuracy, size and latency of every row as a PNG; raises as :func:`draw_rows`."""

    def plot(axes: Any, rows: list[Result], labels: list[str], colors: list[str]) -> None:
        accuracies = [100 * r.top1 for r in rows]
        axes.errorbar(accuracies, labels, xerr=[100 * r.stderr for r in rows], fmt="none", ecolor="black", capsize=4, zorder=1)
        axes.scatter(accuracies, labels, c=colors, s=60, zorder=2)
        axes.set_xlabel("top-1 accuracy, %\n(bar: standard error)")

    draw_rows(results, title, path, plot)


def markdown_row(
    results: Mapping[str, Result], settings: ClassifierSettings, image_size: int, test_images: int, balanced: bool, command: str
) -> dict[str, str]:
    """One row for a collection of results, with the command that made it; by column."""

    def cell(result: Result) -> str:
        more = [f"balanced {100 * result.balanced:.2f}"] if balanced else []
        return f"{_percent(result)} ({', '.join([*more, f'as float {100 * result.as_float:.2f}'])})"

    return {
        "data": f"{settings.data}, {image_size} px",
        "network": settings.arch,
        "seeds": " ".join(map(str, settings.all_seeds())),
        "test images": str(test_images),
        **{result.label: cell(result) for result in results.values()},
        "ONNX MB float / QAT int8 weights": " / ".join(
            [megabytes(results["float"].file_bytes), megabytes(results["qat"].int8_weights_bytes)]
        ),
        "CPU ms float / QAT": " / ".join(_milliseconds(results[key].cpu_ms) for key in ("float", "qat")),
        "command": f"`{command}`",
    }


def append_row(path: Path, row: Mapping[str, str]) -> None:
    """Append ``row`` to a markdown file; a new file, or one that ends with another table, gets the header first."""
    header = _line(row)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    known = before.splitlines()
    heads = [line for line, following in itertools.pairwise(known) if following.startswith("|---")]
    lines = [_line(row.values())]
    if not heads or heads[-1] != header:
        lines = [*([""] if known else []), header, "|---" * len(row) + "|", *lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, before + "\n".join(lines) + "\n")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
