"""The stage of a recipe that writes its models as ONNX and compares each file with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ..export import ParityReport, export_float, export_onnx, parity
from .training import stage

# Row of the table, or what is written besides; the model; options of the export.
Job = tuple[str, str, dict[str, Any]]


def write_all(
    models: Mapping[str, nn.Module],
    jobs: list[Job],
    images: Tensor,
    out: Path,
    console: Console,
    *,
    of_float: Callable[[nn.Module, Path, Tensor], dict[str, Any]],
    of_int8: Callable[[ParityReport], dict[str, Any]],
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Write the files and compare each on ``images``.

    Args:
        models: By name; a float one is called ``float`` or ``float_...``.
        jobs: What to write.
        images: Inputs, of which the first two are also the example that is traced.
        out: Folder of the files.
        console: For the progress.
        of_float: What is kept of the comparison of a float model and its file.
        of_int8: What is kept of that of a quantized one.

    Returns:
        The files and what the comparisons found, by the first entry of the jobs.
    """
    files: dict[str, Path] = {}
    found: dict[str, dict[str, Any]] = {}
    with stage(console, "export and parity", len(jobs)) as advance:
        for key, name, options in jobs:
            path = files[key] = out / f"{key.replace('_', '-')}.onnx"
            if name.startswith("float"):
                export_float(models[name], path, images[:2])
                found[key] = of_float(models[name], path, images)
            else:
                export_onnx(models[name], path, images[:2], **options)
                found[key] = of_int8(parity(models[name], path, images, codes=True))
            advance()
    return files, found


def fused_jobs() -> Iterable[Job]:
    """Fine-tuned quantized, once more with fused Adds."""
    yield "qat_fused", "qat", {"fuse_adds": True}
    yield "qat_fused_int8", "qat", {"fuse_adds": True, "int8_weights": True}
