"""What calibration costs: each method on one histogram, and one pass over images.

``python benchmarks/calibration.py methods`` times the four methods on 2048 bins, and the entropy search also as the plain loop
over bins that it replaces. ``python benchmarks/calibration.py resnet`` calibrates torchvision's ResNet-50 on random images and
shows that memory stays flat. ``--out FILE`` appends the tables to a file.
"""

from __future__ import annotations

import argparse
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
        rows.append(f"| {name} | {median_ms(lambda method=method: method(tensor, width, 1.0), repeats):.2f} |")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "resnet"))
    parser.add_argument("--bins", type=int, default=2048, help="of the histogram (methods)")
    parser.add_argument("--repeats", type=int, default=20, help="the median of that many calls (methods)")
    parser.add_argument("--images", type=int, default=512, help="to calibrate on (resnet)")
    parser.add_argument("--batch", type=int, default=32, help="images a batch (resnet)")
    parser.add_argument("--size", type=int, default=224, help="side of an image (resnet)")
    parser.add_argument("--every", type=int, default=64, help="images between two looks at the memory (resnet)")
    parser.add_argument("--threads", type=int, default=None, help="of torch; methods: 1, resnet: all")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    if args.threads or args.what == "methods":
        torch.set_num_threads(args.threads or 1)
    if args.what == "methods":
        rows, setting = time_methods(args.bins, args.repeats), f"methods --bins {args.bins} --repeats {args.repeats}"
    else:
        rows = time_resnet(args.images, args.batch, args.size, args.every)
        setting = f"resnet --images {args.images} --batch {args.batch} --size {args.size} --every {args.every}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{versions}, {platform.machine()}, {torch.get_num_threads()} threads"
    text = "\n".join([f"`python benchmarks/calibration.py {setting}` ({machine})", "", *rows, ""])
    print(text)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
