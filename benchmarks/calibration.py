"""What calibration costs: each method on one histogram, and one pass over images.

``python benchmarks/calibration.py methods`` times the four methods on 2048 bins, and the entropy search also as the plain loop
over bins that it replaces. ``python benchmarks/calibration.py resnet`` calibrates torchvision's ResNet-50 on random images and
shows that memory stays flat. ``python benchmarks/calibration.py pass --device cuda`` compares calibrating ResNet-50, with the
search of the ranges, to bare forward passes over the same images, which are on the device already, and to nvidia-modelopt if
that is installed. ``--out FILE`` appends the tables to a file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def entropy_loop(counts: np.ndarray) -> list[float]:
    """Kullback-Leibler divergence when 128, 129, … bins are kept, one bin at a time: the published algorithm, step by step."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    found = []
    for kept in range(128, len(bins) + 1):
        level = np.digitize(np.arange(kept), np.linspace(0, kept, 129)) - 1
        mass, members = np.zeros(128), np.zeros(128)
        for j in range(kept):
            if bins[j] > 0:
                mass[level[j]] += bins[j]
                members[level[j]] += 1
        approximation = np.zeros(kept)
        for j in range(kept):
            if bins[j] > 0:
                approximation[j] = mass[level[j]] / members[level[j]]
        reference = bins[:kept].copy()
        reference[-1] += bins[kept:].sum()
        if not approximation.any():
            found.append(np.inf)
            continue
        reference /= reference.sum()
        approximation /= approximation.sum()
        divergence = 0.0
        for p, q in zip(reference, approximation, strict=True):
            if p > 0:
                divergence += p * np.log(p / q) if q > 0 else np.inf
        found.append(divergence)
    return found


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median wall time in milliseconds, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def time_methods(bins: int, repeats: int) -> list[str]:
    """Rows of the table of methods."""
    from qat.calibration.methods import amax_by_entropy, amax_by_max, amax_by_mse, amax_by_percentile

    rng = np.random.default_rng(0)
    counts = np.histogram(np.abs(rng.laplace(size=1_000_000)), bins=bins)[0]
    tensor, width = torch.from_numpy(counts), 1 / bins
    methods = {"max": amax_by_max, "percentile": amax_by_percentile, "mse": amax_by_mse, "entropy": amax_by_entropy}
    rows = ["| method | ms a tensor |", "|---|---|"]
    for name, method in methods.items():
        rows.append(f"| {name} | {median_ms(functools.partial(method, tensor, width, 1.0), repeats):.2f} |")
    begin = time.perf_counter()
    entropy_loop(counts)
    rows.append(f"| entropy, plain loop over bins | {1000 * (time.perf_counter() - begin):.0f} |")
    return rows


def resident_mib() -> tuple[float, float]:
    """Memory of this process now and at its highest, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() / 2**20, peak / 1024


def time_resnet(images: int, batch: int, size: int, every: int) -> list[str]:
    """Rows of the table of memory, and the time of the pass."""
    import torchvision

    import qat

    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    begin = time.perf_counter()
    with torch.no_grad():
        for done in range(0, images, batch):
            model(torch.randn(min(batch, images - done), 3, size, size))
    floats = time.perf_counter() - begin
    before, _ = resident_mib()
    qat.prepare(model)
    rows = ["| images | memory now, MiB | highest, MiB |", "|---|---|---|"]

    def loader() -> Iterator[Tensor]:
        shown = 0
        for done in range(0, images, batch):
            yield torch.randn(min(batch, images - done), 3, size, size)
            seen = min(done + batch, images)
            if seen - shown >= every or seen == images:
                rows.append("| {} | {:.0f} | {:.0f} |".format(seen, *resident_mib()))
                shown = seen

    seconds = {}
    begin = time.perf_counter()
    result = qat.calibrate(model, loader(), method="max", progress=False)
    seconds["one pass"] = time.perf_counter() - begin
    for method in ("percentile", "mse", "entropy"):
        begin = time.perf_counter()
        result.ranges(method)
        seconds[f"{method}, {len(result.histograms)} histograms"] = time.perf_counter() - begin
    rows += ["", f"Memory before: {before:.0f} MiB (after a float pass).", "", "| step | seconds |", "|---|---|"]
    rows.append(f"| float forward passes alone | {floats:.1f} |")
    rows += [f"| {step} | {value:.2f} |" for step, value in seconds.items()]
    return rows


def time_pass(args: argparse.Namespace) -> list[str]:
    """Rows of the table of whole calibrations."""
    import torchvision

    import qat

    device = torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval().to(device, memory_format=layout)
    generator = torch.Generator(device).manual_seed(1)
    shape = args.batch, 3, args.size, args.size
    batches = [
        torch.randn(shape, generator=generator, device=device).to(memory_format=layout)
        for _ in range(-(-args.images // args.batch))
    ]
    # Of random weights and images: one pass sets the statistics of the normalizations, so that no activation vanishes.
    with torch.no_grad():
        model.train()(batches[0])
    model.eval()

    def forward(model: torch.nn.Module) -> None:
        for batch in batches:
            model(batch)

    def floats(model: torch.nn.Module) -> None:
        with torch.no_grad():
            forward(model)

    def prepared(model: torch.nn.Module) -> torch.nn.Module:
        qat.prepare(model)
        return model

    def calibrated(model: torch.nn.Module) -> qat.calibration.Calibration:
        return qat.calibrate(model, batches, method="entropy", progress=False)

    def seconds(make: Callable[[torch.nn.Module], torch.nn.Module], run: Callable[[torch.nn.Module], object]) -> float:
        """Median time of ``run`` on what ``make`` gives for a copy of the model, after one run to warm up."""
        times = []
        for _ in range(1 + args.repeats):
            made = make(copy.deepcopy(model))
            synchronize(device)
            begin = time.perf_counter()
            with torch.autocast(device.type, enabled=args.amp):
                run(made)
            synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    found = {"float forward passes": seconds(lambda model: model, floats)}
    found["qat.calibrate, entropy"] = seconds(prepared, calibrated)
    results: list[qat.calibration.Calibration] = []

    def collected(model: torch.nn.Module) -> torch.nn.Module:
        results.append(calibrated(prepared(model)))
        return model

    found["of which the search"] = seconds(collected, lambda _: results[-1].ranges("entropy"))
    if importlib.util.find_spec("modelopt") is not None:
        import modelopt.torch.quantization as mtq

        found["modelopt, max"] = seconds(lambda model: model, lambda model: mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward))
        method = "entropy" if args.peer_entropy else "percentile"
        found[f"modelopt, {method}"] = seconds(
            with_modelopt_histograms, lambda model: calibrate_modelopt(model, forward, method)
        )
    bare = found["float forward passes"]
    rows = ["| what | seconds | ratio to float |", "|---|---|---|"]
    return rows + [f"| {name} | {value:.3f} | {value / bare:.2f} |" for name, value in found.items()]


def with_modelopt_histograms(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with modelopt's quantizers, not calibrated, and its histograms at all inputs."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import HistogramCalibrator

    model = mtq.quantize(model, {**mtq.INT8_DEFAULT_CFG, "algorithm": None})
    for name, module in model.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module._calibrator = HistogramCalibrator(8, None, False)
    return model


def calibrate_modelopt(model: torch.nn.Module, forward: Callable[[torch.nn.Module], None], method: str) -> None:
    """Inputs by ``method``, weights by their maximum: modelopt's own loop over the quantizers takes one method for both."""
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.nn import TensorQuantizer

    sites = [module for module in model.modules() if isinstance(module, TensorQuantizer) and module.is_enabled]
    for site in sites:
        site.disable_quant()
        site.enable_calib()
    with torch.no_grad():
        forward(model)
    for site in sites:
        site.load_calib_amax(*([method] if isinstance(site._calibrator, HistogramCalibrator) else []))
        site.disable_calib()
        site.enable_quant()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "resnet", "pass"))
    parser.add_argument("--bins", type=int, default=2048, help="of the histogram (methods)")
    parser.add_argument("--repeats", type=int, help="the median of that many calls (methods: 20, pass: 5)")
    parser.add_argument("--images", type=int, default=512, help="to calibrate on (resnet, pass)")
    parser.add_argument("--batch", type=int, default=32, help="images a batch (resnet, pass)")
    parser.add_argument("--size", type=int, default=224, help="side of an image (resnet, pass)")
    parser.add_argument("--every", type=int, default=64, help="images between two looks at the memory (resnet)")
    parser.add_argument("--device", default="cpu", help="of model and images (pass)")
    parser.add_argument("--channels-last", action="store_true", help="memory format of model and images (pass)")
    parser.add_argument("--amp", action="store_true", help="autocast to the default dtype of the device (pass)")
    parser.add_argument("--peer-entropy", action="store_true", help="modelopt: entropy, minutes, not percentile (pass)")
    parser.add_argument("--threads", type=int, default=None, help="of torch; methods: 1, else all")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    args.repeats = args.repeats or (5 if args.what == "pass" else 20)
    if args.threads or args.what == "methods":
        torch.set_num_threads(args.threads or 1)
    if args.what == "methods":
        rows, setting = time_methods(args.bins, args.repeats), f"methods --bins {args.bins} --repeats {args.repeats}"
    elif args.what == "pass":
        rows = time_pass(args)
        setting = f"pass --images {args.images} --batch {args.batch} --size {args.size} --repeats {args.repeats}"
        setting += f" --device {args.device}"
        for flag in ("channels_last", "amp", "peer_entropy"):
            setting += f" --{flag.replace('_', '-')}" if getattr(args, flag) else ""
    else:
        rows = time_resnet(args.images, args.batch, args.size, args.every)
        setting = f"resnet --images {args.images} --batch {args.batch} --size {args.size} --every {args.every}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{versions}, {platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(args.device).type == "cuda":
        machine += f", {torch.cuda.get_device_name(args.device)}"
    text = "\n".join([f"`python benchmarks/calibration.py {setting}` ({machine})", "", *rows, ""])
    print(text)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
