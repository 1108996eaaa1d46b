"""TensorRT engines of the detection recipe's models: built, and asked what runs in INT8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..tensorrt import build, find_runtime, inspect
from .engines import ROWS, export_for
from .training import stage


def build_engines(models: Mapping[str, nn.Module], images: Tensor, out: Path, console: Console) -> dict[str, Any]:
    """Export for the TensorRT that is installed and build; graphs and plans go into ``out``. Nothing is run.

    Args:
        models: Float, PTQ and QAT model, on the CPU.
        images: Shape ``(N, 3, H, W)``; engines are tuned for batches of 1 to ``N``.
        out: Folder to write to.
        console: For the progress bar and the table.

    Returns:
        What ``metrics.json`` holds of the engines.

    Raises:
        QATError: If no TensorRT is installed, or it refuses a graph.
    """
    runtime = find_runtime()
    target = ""
    rows: dict[str, dict[str, Any]] = {}
    with stage(console, "engines", len(ROWS)) as advance:
        for key, row in ROWS.items():
            stem = key.replace("_", "-")
            file = export_for(runtime, models[row.model], out / f"{stem}-engine.onnx", images[:2], row.fuse_adds)
            with build(file, batch=(1, len(images), len(images)), runtime=runtime) as engine:
                target = " for " + engine.targets[0] if engine.targets else ""
                engine.save(out / f"{stem}.plan")
                found = inspect(engine, onnx=str(file))
                sites = found.sites or ()
                counts = {
                    name: [sum(site.is_good for site in sites if site.group in groups), sum(s.group in groups for s in sites)]
                    for name, groups in (("int8", ("conv", "linear")), ("adds", ("add",)))
                }
                rows[key] = {"label": row.label, "plan_bytes": len(engine.plan), "coverage": found.coverage, **counts}
            advance()
    title = f"engines by {runtime.title}{target}, batch 1 to {len(images)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("engine", "MB", "INT8 layers", "fused Adds"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for values in rows.values():
        cells = [f"{good} of {count}" if count else "-" for good, count in (values["int8"], values["adds"])]
        table.add_row(values["label"], f"{values['plan_bytes'] / 1e6:.2f}", *cells)
    console.print(table)
    return {"title": title, "results": rows}
