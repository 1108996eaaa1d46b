"""Time and memory of prepare and export_onnx.

    python benchmarks/export.py [--arch resnet50] [--size 224] [--repeat 3]

Prints the settings and a Markdown table.
"""

from __future__ import annotations

import argparse
import functools
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
import torchvision

import qat


def peak_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepared(arch: str, x: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None).eval()
    qat.prepare(model)
    qat.calibrate(model, [x], method="max", progress=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="a torchvision model")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median is shown, the first one beside it")
    args = parser.parse_args()
    x = torch.randn(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    print(
        f"{args.arch}, 1x3x{args.size}x{args.size}, {args.repeat} runs, {torch.get_num_threads()} threads, "
        f"{platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, onnx {onnx.__version__}, "
        f"onnxscript {onnxscript.__version__}\n"
    )
    print("| step | first s | median s | peak RSS so far MiB | file MiB |")
    print("|---|---|---|---|---|")

    def row(step: str, times: list[float], size: str = "") -> None:
        print(f"| {step} | {times[0]:.2f} | {statistics.median(times):.2f} | {peak_mib():.0f} | {size} |", flush=True)

    floats = [torchvision.models.get_model(args.arch, weights=None) for _ in range(args.repeat)]
    row("prepare", [seconds(functools.partial(qat.prepare, model)) for model in floats])
    del floats
    model = prepared(args.arch, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        variants: tuple[dict[str, Any], ...] = ({}, {"opset": 17}, {"int8_weights": True}, {"external_data": True})
        for options in variants:
            step = ", ".join(["export_onnx", *(f"{key}={value}" for key, value in options.items())])
            times = [seconds(functools.partial(qat.export_onnx, model, path, x, **options)) for _ in range(args.repeat)]
            files = [p for p in Path(folder).iterdir() if "external_data" in options or p.suffix == ".onnx"]
            row(step, times, f"{sum(p.stat().st_size for p in files) / 2**20:.1f}")
        qat.export_onnx(model, path, x)
        row("parity, outputs", [seconds(lambda: qat.parity(model, path, x)) for _ in range(args.repeat)])
        row("parity, codes and segments", [seconds(lambda: qat.parity(model, path, x, codes=True, segments=True))])


if __name__ == "__main__":
    main()
