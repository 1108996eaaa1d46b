"""What the detection recipe says in the end: tables, a picture and a markdown row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .tables import Compared, averaged, draw_rows, figures_table, megabytes

# Raw outputs of a detector in the table of a comparison.
OF_DETECTIONS = (
    Compared("codes of boxes", "boxes_max_abs", "boxes_drift_max_abs", ".2g"),
    Compared("logits", "logits_max_abs", "logits_drift_max_abs", ".2g"),
    Compared("INT8 codes equal", "codes_equal", "drift_codes_equal", ".4%"),
)


@dataclass(frozen=True)
class Detected:
    """Figures of one exported detector.

    Attributes:
        label: Row of the table.
        map50: Mean average precision at an overlap of 0.5, in ``[0, 1]``; with several seeds the mean.
        map: The same over overlaps from 0.5 to 0.95.
        file_bytes: Size of the ONNX file.
        int8_weights_bytes: Size of the file with int8 weights, if there is one.
        cpu_ms: Median latency of one image.
        map50_stderr: Standard error of the mean over seeds, if there are several.
        map_stderr: Likewise.
    """

    label: str
    map50: float
    map: float
    file_bytes: int
    int8_weights_bytes: int | None
    cpu_ms: float
    map50_stderr: float | None = None
    map_stderr: float | None = None


def over_seeds(runs: Sequence[Mapping[str, Detected]]) -> dict[str, Detected]:
    """Means over runs with different seeds, with their standard errors."""
    return averaged(runs, {"map50": "map50_stderr", "map": "map_stderr", "cpu_ms": None})


def make_table(results: Mapping[str, Detected], title: str, caption: str) -> Table:
    """The table of a run: precisions, what they differ from those of the float model, sizes and latency."""
    shown = ("mAP50 %", "to float", "mAP50-95 %", "to float", "ONNX MB", "int8 weights MB", "CPU ms")
    table = figures_table("model", shown, title, caption)
    base = results["float"]
    for key, r in results.items():
        gains = ["" if key == "float" else f"{100 * (a - b):+.2f}" for a, b in ((r.map50, base.map50), (r.map, base.map))]
        figures = [_percent(r.map50, r.map50_stderr), gains[0], _percent(r.map, r.map_stderr), gains[1]]
        table.add_row(r.label, *figures, megabytes(r.file_bytes), megabytes(r.int8_weights_bytes), f"{r.cpu_ms:.1f}")
    return table


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def draw(results: Mapping[str, Detected], title: str, path: Path) -> None:
    """Precision, size and latency of every row as a PNG; raises as :func:`qat.recipes.tables.draw_rows`."""

    def plot(axes: Any, rows: list[Detected], labels: list[str], colors: list[str]) -> None:
        axes.barh(labels, [100 * r.map50 for r in rows], color=colors, xerr=[100 * (r.map50_stderr or 0) for r in rows])
        axes.set_xlabel("mAP50, %")

    draw_rows(results, title, path, plot)


def markdown_row(
    results: Mapping[str, Detected], *, data: str, seeds: Sequence[int], test_images: int, command: str
) -> dict[str, str]:
    """One row for a collection of results, with the command that made it; by column. Cells: mAP50 / mAP50-95 in %."""
    return {
        "data": data,
        "seeds": " ".join(map(str, seeds)),
        "test scenes": str(test_images),
        **{r.label: f"{_percent(r.map50, r.map50_stderr)} / {_percent(r.map, r.map_stderr)}" for r in results.values()},
        "ONNX MB float / QAT int8 weights": " / ".join(
            [megabytes(results["float"].file_bytes), megabytes(results["qat"].int8_weights_bytes)]
        ),
        "command": f"`{command}`",
    }
