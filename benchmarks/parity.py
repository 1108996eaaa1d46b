"""Is ONNX Runtime farther from PyTorch than PyTorch is from itself?

The codes of a deep quantized network are chaotic: a value that lies on a tie falls to one side or the other with the last bit
of a convolution, and what follows grows. One comparison is one draw, so this makes several: for each seed a network with
random weights and random images, exported and run by ONNX Runtime, and the same network in PyTorch without oneDNN and in
channels-last, both against PyTorch as it is.

    python benchmarks/parity.py [--arch resnet50] [--size 224] [--batch 2] [--seeds 8] [--fuse-adds] [--out FILE]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import onnxruntime
import torch
import torchvision

import qat
from qat.export import ParityReport


def compare(arch: str, size: int, batch: int, seed: int, fuse_adds: bool) -> ParityReport:
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, weights=None).eval()
    images = torch.randn(batch, 3, size, size)
    qat.prepare(model)
    qat.calibrate(model, [images], method="max", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = qat.export_onnx(model, Path(folder) / "model.onnx", images, fuse_adds=fuse_adds)
        return qat.parity(model, path, images, codes=True, segments=True)


def spread(values: list[float]) -> str:
    """Median, and the range. No mean: a drift of nothing at all is infinitely many dB."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="a torchvision model with one output")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a comparison")
    parser.add_argument("--seeds", type=int, default=8, help="number of comparisons")
    parser.add_argument("--fuse-adds", action="store_true", help="leave out the Q/DQ of the fusable Add inputs")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    rows: dict[str, list[float]] = {"onnx": [], "drift": [], "onnx codes": [], "drift codes": []}
    segments = []
    for seed in range(args.seeds):
        report = compare(args.arch, args.size, args.batch, seed, args.fuse_adds)
        (output,) = report.outputs
        rows["onnx"].append(output.onnx.sqnr)
        rows["drift"].append(output.drift.sqnr)
        rows["onnx codes"].append(100 * report.codes_equal)
        rows["drift codes"].append(100 * report.drift_codes_equal)
        segments.append(report.segments_exact)
        print(f"seed {seed}: " + ", ".join(f"{key} {values[-1]:.2f}" for key, values in rows.items()), flush=True)
    better = sum(a >= b for a, b in zip(rows["onnx codes"], rows["drift codes"], strict=True))
    text = (
        f"\n{args.arch}{', fused Adds' if args.fuse_adds else ''}, random weights, {args.batch} images of {args.size} px, "
        f"{args.seeds} seeds; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}; "
        "median (smallest to largest)\n\n"
        "| against PyTorch | logits SQNR dB | equal codes % |\n|---|---|---|\n"
        f"| ONNX Runtime | {spread(rows['onnx'])} | {spread(rows['onnx codes'])} |\n"
        f"| PyTorch with other kernels | {spread(rows['drift'])} | {spread(rows['drift codes'])} |\n"
        f"\nONNX Runtime's codes agree at least as well as PyTorch's own in {better} of {args.seeds} comparisons.\n"
        f"Segment by segment (each fed PyTorch's own input): exact in {sum(segments)} of {len(segments)} comparisons.\n"
    )
    print(text)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
