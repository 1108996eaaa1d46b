"""Is ONNX Runtime farther from PyTorch than PyTorch is from itself?

The codes of a deep quantized network are chaotic: a value that lies on a tie falls to one side or the other with the last bit
of a convolution, and what follows grows. One comparison is one draw, so this makes several: for each seed a network with
random weights and random images, exported and run by ONNX Runtime, and the same network in PyTorch once more, both against
PyTorch as it is. What PyTorch does differently is the yardstick, so there are several: without oneDNN; without it and in
channels-last; with its sums added up in another order; and all of it, which is what ``qat.parity`` prints.

    python benchmarks/parity.py [--arch resnet50] [--size 224] [--batch 2] [--seeds 8] [--fuse-adds] [--out FILE]
    python benchmarks/parity.py --kernels [--arch resnet50] [--size 224] [--batch 1] [--out FILE]

With ``--kernels`` it looks at each convolution alone, fed what PyTorch computed: how exact it is in each runtime, and which
runtimes and kernels give PyTorch's very bits.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import qat
from qat.export import ParityReport
from qat.nn.add import fusing_adds
from qat.support.modes import looking_at
from qat.verify.differences import Difference
from qat.verify.onnx_parity import _float32, _recorded, _ReversedSums

# What PyTorch does differently: oneDNN kernels, channels-last, sums from last to first.
YARDSTICKS = {
    "PyTorch without oneDNN": (False, False, False),
    "PyTorch without oneDNN, channels-last": (False, True, False),
    "PyTorch, other order of sums": (True, False, True),
    "PyTorch, all of it (qat.parity)": (False, True, True),
}


def compare(
    arch: str, size: int, batch: int, seed: int, fuse_adds: bool
) -> tuple[ParityReport, dict[str, tuple[float, float]]]:
    """The report, and for each yardstick the SQNR of the logits in dB and the share of equal activation codes."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, weights=None).eval()
    images = torch.randn(batch, 3, size, size)
    qat.prepare(model)
    qat.calibrate(model, [images], method="max", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = qat.export_onnx(model, Path(folder) / "model.onnx", images, fuse_adds=fuse_adds)
        report = qat.parity(model, path, images, codes=True, segments=True)

    def run(onednn: bool, channels_last: bool, reverse: bool) -> tuple[torch.Tensor, dict[Any, Any]]:
        x = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        order = _ReversedSums() if reverse else contextlib.nullcontext()
        with _recorded(model, keep_inputs=False, enabled=True) as calls, _float32(vendor_kernels=onednn), order:
            logits = model(x)
        found = (call for site_calls in calls.values() for call in site_calls if not call.is_weight)
        return logits, {(call.site, call.index): call.codes for call in found}

    shares = {}
    with looking_at(model), fusing_adds(model, fuse_adds):
        logits, codes = run(True, False, False)
        # The same codes as in the report: a site that several layers call stands in the file once.
        codes = {(site.site, site.call): codes[site.site, site.call] for site in report.sites}
        for name, changes in YARDSTICKS.items():
            other, other_codes = run(*changes)
            equal = sum(int((codes[key] == other_codes[key]).sum()) for key in codes)
            share = 100 * equal / sum(array.size for array in codes.values())
            shares[name] = (Difference.between(logits.numpy(), other.numpy()).sqnr, share)
    return report, shares


def spread(values: list[float]) -> str:
    """Median, and the range. No mean: a drift of nothing at all is infinitely many dB."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def convolutions(model: nn.Module, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]]:
    """Quantized input, quantized weight, and stride, padding, dilation, groups of every convolution that runs."""
    found = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.conv2d:
                found.append((args[0], args[1].detach(), tuple(args[3:])))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Record():
        model(images)
    return found


def onnx_convolution(x: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...]) -> torch.Tensor:
    stride, padding, dilation, groups = options
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups
    )
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(t.shape)) for n, t in (("x", x), ("w", weight))]
    graph = helper.make_graph([node], "conv", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    # As qat.parity runs a file: other layouts of the optimizer have kernels of their own.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy(), "w": weight.numpy()})[0])


def kernels(arch: str, size: int, batch: int, seed: int = 0) -> str:
    """Rounding errors of each convolution against float64, and bits shared with PyTorch's default kernels."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, weights=None).eval()
    images = torch.randn(batch, 3, size, size)
    qat.prepare(model)
    qat.calibrate(model, [images], method="max", progress=False)
    last = torch.channels_last
    rows: dict[str, list[tuple[float, bool]]] = {}
    for x, weight, options in convolutions(model, images):
        exact = F.conv2d(x.double(), weight.double(), None, *options)
        results = {"PyTorch": F.conv2d(x, weight, None, *options)}
        results["PyTorch, channels-last"] = F.conv2d(x.contiguous(memory_format=last), weight, None, *options)
        with warnings.catch_warnings():
            # The switch also sets a TF32 flag, and warns where that flag means nothing.
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with torch.backends.mkldnn.flags(enabled=False):
                results["PyTorch without oneDNN"] = F.conv2d(x, weight, None, *options)
                both = F.conv2d(x.contiguous(memory_format=last), weight, None, *options)
        results["PyTorch without oneDNN, channels-last"] = both
        results["PyTorch, channels reversed"] = F.conv2d(*_reversed(x, weight), None, *options)
        results["ONNX Runtime"] = onnx_convolution(x, weight, options)
        for name, result in results.items():
            error = (result - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            rows.setdefault(name, []).append((float(error), torch.equal(result, results["PyTorch"])))
    count = len(rows["PyTorch"])
    text = (
        f"\n{arch}, {count} convolutions, {batch} images of {size} px; torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, {platform.machine()}\n\n"
        "| runtime | error against float64, mean of all convolutions | convolutions with PyTorch's bits |\n|---|---|---|\n"
    )
    for name, entries in rows.items():
        text += f"| {name} | {statistics.mean(e for e, _ in entries):.2e} | {sum(same for _, same in entries)} of {count} |\n"
    return text


def _reversed(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The input channels of each group from last to first."""
    return x.unflatten(1, (-1, weight.shape[1])).flip(2).flatten(1, 2), weight.flip(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="a torchvision model with one output")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a comparison")
    parser.add_argument("--seeds", type=int, default=8, help="number of comparisons")
    parser.add_argument("--fuse-adds", action="store_true", help="leave out the Q/DQ of the fusable Add inputs")
    parser.add_argument("--kernels", action="store_true", help="look at each convolution alone")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    if args.kernels:
        report(kernels(args.arch, args.size, args.batch), args.out)
        return
    rows: dict[str, list[tuple[float, float]]] = {}
    segments = []
    for seed in range(args.seeds):
        found, shares = compare(args.arch, args.size, args.batch, seed, args.fuse_adds)
        (output,) = found.outputs
        assert found.codes_equal is not None
        for name, figures in {"ONNX Runtime": (output.onnx.sqnr, 100 * found.codes_equal), **shares}.items():
            rows.setdefault(name, []).append(figures)
        segments.append(found.segments_exact)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1][1]:.2f} %" for name, values in rows.items()), flush=True)
    text = (
        f"\n{args.arch}{', fused Adds' if args.fuse_adds else ''}, random weights, {args.batch} images of {args.size} px, "
        f"{args.seeds} seeds; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}; "
        "median (smallest to largest)\n\n"
        "| against PyTorch | logits SQNR dB | equal codes % | ONNX Runtime's codes at least as equal |\n|---|---|---|---|\n"
    )
    ours = [share for _, share in rows["ONNX Runtime"]]
    for name, values in rows.items():
        better = sum(a >= b for a, (_, b) in zip(ours, values, strict=True))
        of = "" if name == "ONNX Runtime" else f"{better} of {args.seeds}"
        text += f"| {name} | {spread([v for v, _ in values])} | {spread([v for _, v in values])} | {of} |\n"
    text += f"\nSegment by segment (each fed PyTorch's own input): exact in {sum(segments)} of {len(segments)} comparisons.\n"
    report(text, args.out)


def report(text: str, out: Path | None) -> None:
    print(text)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
