"""TensorRT engines of a recipe's models: what they cost and whether they still see what the ONNX files see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..bench import latency
from ..export import export_float, export_onnx
from ..tensorrt import Engine, Inspection, Runtime, build, find_runtime, inspect
from .evaluation import Accuracy, accuracy
from .images import ImageData
from .settings import ClassifierSettings
from .training import stage

TENSORRT_8_OPSET = 17


@dataclass(frozen=True)
class Row:
    """One engine of the table.

    Attributes:
        label: Row of the table.
        model: Which of the recipe's models.
        fuse_adds: Whether the Q/DQ on the fusable Add inputs is left out; ``None`` for the float model.
    """

    label: str
    model: str
    fuse_adds: bool | None


ROWS = {
    "float": Row("float, FP16", "float", None),
    "ptq": Row("PTQ", "ptq", False),
    "ptq_fused": Row("PTQ, fused Adds", "ptq", True),
    "qat": Row("QAT", "qat", False),
    "qat_fused": Row("QAT, fused Adds", "qat", True),
}


@dataclass(frozen=True)
class EngineResult:
    """Figures of one engine; what needs a GPU is ``None`` without one.

    Attributes:
        label: Row of the table.
        plan_bytes: Size of the engine.
        coverage: What of the quantized graph runs in INT8, in words.
        int8: Quantized convolutions and linear layers in INT8, of all of them; both 0 for a float engine.
        adds: Fused additions, of all quantized ones.
        top1: Accuracy in ``[0, 1]``.
        stderr: Of the test set.
        balanced: Mean recall over classes.
        agreement: Share of test images of the same class as the ONNX file with the same Q/DQ says, if that was measured.
        ms: Median GPU time of one image.
        ms_batch: Median GPU time of ``settings.engine_batch`` images.
    """

    label: str
    plan_bytes: int
    coverage: str
    int8: tuple[int, int] = (0, 0)
    adds: tuple[int, int] = (0, 0)
    top1: float | None = None
    stderr: float | None = None
    balanced: float | None = None
    agreement: float | None = None
    ms: float | None = None
    ms_batch: float | None = None


def engine_results(
    models: Mapping[str, nn.Module],
    predicted: Mapping[str, NDArray[Any]],
    data: ImageData,
    settings: ClassifierSettings,
    out: Path,
    console: Console,
) -> tuple[dict[str, EngineResult], str]:
    """Export for the TensorRT that is installed, build, and on a GPU measure.

    Args:
        models: Float, PTQ and QAT model, on the CPU.
        predicted: Classes that ONNX Runtime found for the test images, by the keys of ``ROWS``, where it was asked.
        data: The recipe's data.
        settings: The recipe's settings.
        out: Folder for graphs (``*-engine.onnx``), plans, and what TensorRT found by timing kernels (``timing.cache``).
        console: For the progress bar.

    Returns:
        Results by row, and the title of their table, which says what ran where.

    Raises:
        QATError: If no TensorRT is installed, or it refuses a graph.
    """
    runtime = find_runtime()
    gpu = gpu_name()
    target = ""
    example = torch.stack([data.test[i][0] for i in range(2)])
    images = torch.stack([data.test[i % len(data.test)][0] for i in range(settings.engine_batch)])  # type: ignore[arg-type]
    # PTQ and QAT are the same network: timed once, they get the same kernels, in a fraction of the time.
    timing_cache = out / "timing.cache" if runtime.timing_cache else None
    results = {}
    with stage(console, "engines", len(ROWS)) as advance:
        for key, row in ROWS.items():
            stem = key.replace("_", "-")
            file = export_for(runtime, models[row.model], out / f"{stem}-engine.onnx", example, row.fuse_adds)
            # The largest batch of the test loader, and the one that is measured.
            largest = max(4 * settings.batch_size, settings.engine_batch)
            batch = (1, settings.engine_batch, largest)
            with build(file, batch=batch, timing_cache=timing_cache, runtime=runtime) as engine:
                target = " for " + engine.targets[0] if engine.targets else ""
                engine.save(out / f"{stem}.plan")
                found = inspect(engine, onnx=str(file))
                int8, adds = _good(found, "conv", "linear"), _good(found, "add")
                result = EngineResult(row.label, len(engine.plan), found.coverage, int8, adds)
                if gpu is not None:
                    result = _measured(engine, result, predicted.get(key), images, data, settings)
            results[key] = result
            advance()
    where = "; there is no GPU here to run them on" if gpu is None else f" on {gpu}"
    return results, f"engines by {runtime.title}{target}{where}"


def gpu_name() -> str | None:
    """The CUDA device, if there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def export_for(runtime: Runtime, model: nn.Module, path: Path, example: Tensor, fuse_adds: bool | None) -> Path:
    """Export in the form that a version wants: precision as builder flags, or in the graph.

    Args:
        runtime: The TensorRT to export for.
        model: A float model, or a calibrated one.
        path: The file to write.
        example: Images ``(2, 3, H, W)``.
        fuse_adds: As in :func:`qat.export_onnx`; ``None`` for a float model.
    """
    options: dict[str, Any] = {"precision": "fp32" if runtime.weak_typing else "fp16"}
    if not runtime.strong_typing:
        options["opset"] = TENSORRT_8_OPSET
    if fuse_adds is None:
        return export_float(model, path, example, **options)
    return export_onnx(model, path, example, fuse_adds=fuse_adds, **options)


def _measured(
    engine: Engine,
    result: EngineResult,
    expected: NDArray[Any] | None,
    images: Tensor,
    data: ImageData,
    settings: ClassifierSettings,
) -> EngineResult:
    found, labels = [], []
    for batch, label in data.loader(data.test, 4 * settings.batch_size):
        (logits,) = engine.run(batch.numpy()).values()
        found.append(logits.argmax(1))
        labels.append(label.numpy())
    classes = np.concatenate(found)
    scored: Accuracy = accuracy(classes, np.concatenate(labels))
    times = [latency(engine, images[:size].numpy(), duration=1.0).compute.median for size in (1, len(images))]
    agreement = None if expected is None else float((classes == expected).mean())
    return replace(
        result,
        top1=scored.top1,
        stderr=scored.stderr,
        balanced=scored.balanced,
        agreement=agreement,
        ms=times[0],
        ms_batch=times[1],
    )


def _good(found: Inspection, *groups: str) -> tuple[int, int]:
    members = [site for site in found.sites or () if site.group in groups]
    return sum(site.is_good for site in members), len(members)


def engine_table(results: Mapping[str, EngineResult], title: str, batch: int) -> Table:
    """The table of the engines."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("engine")
    for column in ("top-1 %", "as ONNX", "ms, 1 image", f"ms, {batch}", "MB"):
        table.add_column(column, justify="right")
    table.add_column("INT8 layers", justify="right")
    table.add_column("fused Adds", justify="right")
    for r in results.values():
        table.add_row(
            r.label,
            "-" if r.top1 is None or r.stderr is None else f"{100 * r.top1:.2f} ± {100 * r.stderr:.2f}",
            "-" if r.agreement is None else f"{r.agreement:.2%}",
            "-" if r.ms is None else f"{r.ms:.3f}",
            "-" if r.ms_batch is None else f"{r.ms_batch:.3f}",
            f"{r.plan_bytes / 1e6:.2f}",
            *(f"{good} of {count}" if count else "-" for good, count in (r.int8, r.adds)),
        )
    return table


def to_dict(results: Mapping[str, EngineResult], title: str) -> dict[str, Any]:
    """What ``metrics.json`` holds of the engines."""
    return {"title": title, "results": {key: asdict(result) for key, result in results.items()}}
