"""INT8 engines against FP16 and TF32 engines: GPU time, what runs in INT8, and the distance from fake quantization.

Two stages, because a machine with TensorRT need not have PyTorch:

    python benchmarks/engines.py export --out DIR [--models resnet50,mobilenet_v2] [--jobs 4]
    python benchmarks/engines.py build DIR --results FILE.json [--seconds 500] [--batches 32,1,128]
    python benchmarks/engines.py table FILE.json

``export`` writes for each model, with random weights and scales calibrated on random images: the float graph, the INT8 graph
with Q/DQ on both inputs of every residual Add, and the one with fused Adds; and what PyTorch computes for the same images.
``build`` builds each graph for each batch size, measures it, and adds a row to the results; rows are kept by the hash of the
ONNX file, so a run that was cut off goes on where it stopped. Plans and listings of their layers stay in the folder.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import functools
import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from warm import warm_builder

MODELS = ("resnet50", "mobilenet_v2", "resnet18", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16")
# Row of the table: the graph that it is built of, and the precisions that the builder may choose from.
OTHERS = ("INT8 fast", "INT8 no Adds", "INT8 float gates", "INT8 no depthwise", "INT8 no attention")
USUAL = ("TF32", "FP16", "INT8 both", "INT8 fused")
INT8 = {"fp16": True, "int8": True}
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "TF32": ("float", {"fp16": False, "int8": False}),
    "FP16": ("float", {"fp16": True, "int8": False}),
    "INT8 both": ("both", INT8),
    "INT8 fused": ("fused", INT8),
    "INT8 fast": ("fast", INT8),
    "INT8 no Adds": ("no-adds", INT8),
    "INT8 float gates": ("float-gates", INT8),
    "INT8 no depthwise": ("no-depthwise", INT8),
    "INT8 no attention": ("no-attention", INT8),
}
# Other placements, exported with fused Adds for the models that they say something about.
PLACEMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {name: {"placement": "fast"} for name in ("vit_b_16", "convnext_tiny")},
    "no-adds": {name: {"add_inputs": "none"} for name in ("vit_b_16", "convnext_tiny")},
    "float-gates": {name: {"gate_inputs": False} for name in ("efficientnet_b0", "regnet_y_400mf")},
    "no-attention": {
        "vit_b_16": {"placement": "fast", "rules": [{"match": "encoder.layers.*.self_attention", "quantize": False}]}
    },
    "no-depthwise": {"convnext_tiny": {"rules": [{"match": "features.*.block.0", "quantize": False}]}},
}
OPTIONS = ("timing_cache", "tactic_sources", "workspace", "optimization_level", "timing_iterations")
ALL_BATCHES = ("resnet50", "mobilenet_v2")
IMAGES = 32
# In the folder of the graphs while they are being exported: building may begin before that ends.
RUNNING = "export-is-running"


def export_model(name: str, out: Path, opset: int) -> str:
    """All graphs of one model, and inputs and outputs of PyTorch in ``<name>.npz``."""
    import torch
    import torchvision

    import qat
    from qat.export import export_float
    from qat.nn.add import QuantAdd
    from qat.support.files import whole_file

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(IMAGES, 3, 224, 224)
    with torch.no_grad():
        normalize(model, images)
    arrays = {"images": images.numpy()}
    with torch.no_grad():
        arrays["float"] = model(images).numpy()
        export_float(model, out / f"{name}-float.onnx", images[:2], opset=opset)
        for graph, fuse, placement in placements(name):
            quantized = copy.deepcopy(model)
            qat.prepare(quantized, qat.QuantConfig.from_dict(placement), example_inputs=images[:2])
            qat.calibrate(quantized, [images], progress=False)
            qat.export_onnx(quantized, out / f"{name}-{graph}.onnx", images[:2], opset=opset, fuse_adds=fuse)
            for module in quantized.modules():
                if isinstance(module, QuantAdd):
                    module.fuse = fuse
            arrays[graph] = quantized(images).numpy()
    with whole_file(out / f"{name}.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # names of files, not of its parameter
    return name


def placements(name: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Graphs of a model: their name, whether Adds are fused, and the settings."""
    yield "both", False, {}
    yield "fused", True, {}
    for placement, models in PLACEMENTS.items():
        if name in models:
            yield placement, True, models[name]


def normalize(model: Any, images: Any) -> None:
    """Let no activations vanish, as they do in a deep network with its initial parameters.

    Batch norm gets the statistics of ``images``; layer scales of 1e-6 and heads of zeros become random.
    """
    import torch

    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.unique().numel() == 1:
            parameter.normal_(std=0.02)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(images)
    model.eval()


def export(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    running = args.out / RUNNING
    running.touch()
    try:
        with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(export_model, name, args.out, args.opset) for name in args.models]
            for future in concurrent.futures.as_completed(futures):
                print("exported", future.result(), flush=True)
    finally:
        running.unlink()


def build(args: argparse.Namespace) -> None:
    """Build and measure; with several jobs, build the engines of several models side by side, then measure alone."""
    until = time.time() + args.seconds
    if args.jobs > 1:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda model: supervise(args, (model,), until, model), args.models))
    supervise(args, args.models, until)


def supervise(args: argparse.Namespace, models: tuple[str, ...], until: float, only_plans_of: str = "") -> None:
    """All engines in one process: its first build takes half a minute longer. One that crashes is left out of the next."""
    note = note_of(args.results, only_plans_of)
    crashed: list[str] = []
    while time.time() < until:
        command = [sys.executable, "-X", "faulthandler", __file__, "work", str(args.folder), "--results", str(args.results)]
        command += ["--models", ",".join(models), "--batches", ",".join(map(str, args.batches))]
        command += ["--duration", str(args.duration), "--until", str(until), "--skip", ";".join(crashed)]
        command += ["--variants", ",".join(args.variants), "--only-plans-of", only_plans_of]
        for name in ("timing_cache", "workspace", "optimization_level", "timing_iterations"):
            if getattr(args, name) is not None:
                command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        if args.tactic_sources:
            command += ["--tactic-sources", ",".join(args.tactic_sources)]
        status = subprocess.run(command, check=False).returncode
        if status == 0 or not note.exists():
            return
        crashed.append(note.read_text())
        print(f"CRASHED with status {status}: {crashed[-1]}", flush=True)


def work(args: argparse.Namespace) -> None:
    """Build and measure what the results do not hold yet; the results are saved after each."""
    from qat.errors import QATError
    from qat.support.files import write_text

    rows = read(args.results)
    builder = warm_builder()
    note = note_of(args.results, args.only_plans_of)
    done = set(args.skip)
    if args.only_plans_of and args.timing_cache:
        args.timing_cache = own_copy(args.timing_cache, args.only_plans_of)
    while time.time() < args.until:
        waiting = (args.folder / RUNNING).exists() and any(not arrays_of(args.folder, model).exists() for model in args.models)
        job = next((job for job in wanted(args) if job.key not in rows and job.key not in done), None)
        if job is None:
            if not waiting:
                break
            time.sleep(1)
            continue
        note.write_text(job.key)
        title = f"{job.model:16} {job.variant:10} batch {job.batch:3}"
        try:
            begin = time.monotonic()
            if not job.plan.exists():
                build_plan(job, args)
            if args.only_plans_of:
                print(f"{title}: built in {time.monotonic() - begin:.1f} s", flush=True)
                done.add(job.key)
                continue
            rows[job.key] = {**job.row, **measure(job, args)}
        except QATError as error:
            print(f"{title}: {error}", flush=True)
            done.add(job.key)
            continue
        write_text(args.results, json.dumps(rows, indent=1))
        print(f"{title}: {rows[job.key]}", flush=True)
    note.unlink(missing_ok=True)
    del builder


def note_of(results: Path, only_plans_of: str) -> Path:
    """Names the engine that is being built, should the process crash."""
    return results.with_suffix(f".{only_plans_of}.current" if only_plans_of else ".current")


def own_copy(cache: Path, model: str) -> Path:
    """Processes side by side must not write the same timing cache."""
    copied = cache.with_name(f"{model}-{cache.name}")
    if cache.exists() and not copied.exists():
        copied.write_bytes(cache.read_bytes())
    return copied


def arrays_of(folder: Path, model: str) -> Path:
    return folder / f"{model}.npz"


def read(results: Path) -> dict[str, dict[str, Any]]:
    return json.loads(results.read_text()) if results.exists() else {}


@dataclass(frozen=True)
class Job:
    """One engine: a row of the results."""

    model: str
    variant: str
    batch: int
    search: str
    file: Path
    plan: Path
    key: str

    @property
    def row(self) -> dict[str, Any]:
        return {"model": self.model, "variant": self.variant, "batch": self.batch, "search": self.search}


def wanted(args: argparse.Namespace) -> list[Job]:
    """In the order of their worth: the first batch size of all models, TF32 last."""
    jobs = []
    for batch in args.batches:
        for variants in (("FP16", "INT8 fused", "INT8 both"), OTHERS, ("TF32",)):
            for model in args.models:
                # The arrays are written last: a model without them is still being exported.
                if not arrays_of(args.folder, model).exists() or (batch != args.batches[0] and model not in ALL_BATCHES):
                    continue
                for variant in variants:
                    file = args.folder / f"{model}-{VARIANTS[variant][0]}.onnx"
                    if variant not in args.variants or not file.exists():
                        continue
                    digest = digest_of(file, file.stat().st_mtime_ns)
                    words = (variant, str(batch), *searched(args))
                    plan = args.folder / f"{' '.join((model, *words, digest))}.plan".replace(" ", "-")
                    jobs.append(Job(model, variant, batch, " ".join(searched(args)), file, plan, " ".join((digest, *words))))
    return jobs


@functools.cache
def digest_of(file: Path, written: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def searched(args: argparse.Namespace) -> list[str]:
    """How the builder was told to search, where not as it does by default."""
    settings = {"level": args.optimization_level, "iterations": args.timing_iterations}
    return [f"{name} {value}" for name, value in settings.items() if value is not None]


def build_plan(job: Job, args: argparse.Namespace) -> None:
    import qat.tensorrt

    flags = VARIANTS[job.variant][1]
    options: dict[str, Any] = {**flags, **{name: getattr(args, name) for name in OPTIONS}}
    with qat.tensorrt.build(job.file, batch=job.batch, check=False, verbose_log=False, **options) as engine:
        engine.save(job.plan)


def measure(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Run one engine: latency in ms. The listing of its layers stays beside its plan."""
    import qat.bench
    import qat.tensorrt

    graph, _ = VARIANTS[job.variant]
    with np.load(arrays_of(args.folder, job.model)) as data:
        images, expected = data["images"], data[graph]
        quantization = relative(expected, data["float"])
    repeat = -(-job.batch // len(images))
    images, expected = (np.ascontiguousarray(np.concatenate([a] * repeat)[: job.batch]) for a in (images, expected))
    with qat.tensorrt.load(job.plan) as engine:
        (output,) = engine.run(images).values()
        found = qat.bench.latency(engine, images, duration=args.duration, throughput=True)
        replayed = qat.bench.latency(engine, images, duration=args.duration / 2, cuda_graph=True)
        times = qat.tensorrt.layer_times(engine, images)
        listing = qat.tensorrt.inspect(engine, onnx=str(job.file) if importlib.util.find_spec("onnx") else None, times=times)
        if engine.layer_information:
            job.plan.with_suffix(".layers.json").write_text(engine.layer_information)
        job.plan.with_suffix(".times.json").write_text(json.dumps(times, indent=1))
        version = engine.runtime.module.__version__
    return {
        "median": round(found.compute.median, 4),
        "min": round(found.compute.minimum, 4),
        # All runs enqueued at once between two events: what a bare loop takes.
        "bare_loop": round(1000 / found.throughput, 4) if found.throughput else None,
        "cuda_graph": round(replayed.compute.median, 4),
        "p99": round(found.compute.p99, 4),
        "cv": round(found.compute.variation, 2),
        "enqueue": round(found.enqueue.median, 4) if found.enqueue else None,
        "relative_error": round(relative(output, expected), 5),
        # Of the fake-quantized model to the float one: what the engine's error is to be compared with.
        "quantization_error": round(quantization, 5),
        "top1": round(float((output.argmax(1) == expected.argmax(1)).mean()), 4),
        "coverage": listing.coverage,
        "tensorrt": version,
    }


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def table(args: argparse.Namespace) -> None:
    """The results as Markdown: times of the usual engines, then of other placements, then what runs in INT8."""
    rows = [row for row in read(args.results).values() if row["search"] == args.search]
    groups = [(name, batch) for batch in sorted({row["batch"] for row in rows}) for name in MODELS]
    found = {group: {row["variant"]: row for row in rows if (row["model"], row["batch"]) == group} for group in groups}
    int8 = USUAL[2:]
    names = [variant.removeprefix("INT8 ") for variant in int8]
    head = ["model", "batch", *USUAL, *(f"FP16 : {name}" for name in names)]
    head += [f"error {name}" for name in names] + [f"quantization error {name}" for name in names]
    print_row(*head)
    print_row(*["---"] * len(head))
    for group, of in found.items():
        if of:
            times = [f"{of[variant]['median']:.3f}" if variant in of else "" for variant in USUAL]
            ratios = [ratio(of, variant) for variant in int8]
            kinds = ("relative_error", "quantization_error")
            errors = [f"{of[variant].get(kind, math.nan):.4f}" if variant in of else "" for kind in kinds for variant in int8]
            print_row(*group, *times, *ratios, *errors)
    if any("cuda_graph" in row for row in rows):
        print("\nReplayed as a CUDA graph:\n")
        print_row("model", "batch", *USUAL, *(f"FP16 : {name}" for name in names))
        print_row(*["---"] * (2 + len(USUAL) + len(names)))
        for group, of in found.items():
            if any("cuda_graph" in row for row in of.values()):
                times = [f"{of[v]['cuda_graph']:.3f}" if "cuda_graph" in of.get(v, {}) else "" for v in USUAL]
                print_row(*group, *times, *(ratio(of, variant, of_what="cuda_graph") for variant in int8))
    others = [(group, of, variant) for group, of in found.items() for variant in of if variant not in USUAL]
    if others:
        print()
        print_row("model", "batch", "placement", "ms", "FP16 : it", "fused : it", "error")
        print_row(*["---"] * 7)
        for group, of, variant in others:
            row = of[variant]
            ratios = [ratio(of, variant), ratio(of, variant, "INT8 fused")]
            print_row(*group, variant, f"{row['median']:.3f}", *ratios, f"{row['relative_error']:.4f}")
    print()
    for row in rows:
        if VARIANTS[row["variant"]][1]["int8"]:
            print(f"- {row['model']}, batch {row['batch']}, {row['variant']}: {row['coverage']}")
    for bound in (False, True):
        overheads = [
            row["median"] / row["bare_loop"] - 1 for row in rows if row.get("bare_loop") and enqueue_bound(row) is bound
        ]
        if overheads:
            kind = "bound by enqueueing" if bound else "not bound by enqueueing"
            print(
                f"\nMedian against a bare loop, {len(overheads)} engines {kind}: {min(overheads):+.1%} to {max(overheads):+.1%}"
            )


def enqueue_bound(row: dict[str, Any]) -> bool:
    """Whether the host takes about as long to start a run as the GPU takes to do it."""
    return row["enqueue"] is not None and row["enqueue"] > 0.9 * row["median"]


def ratio(of: dict[str, dict[str, Any]], variant: str, base: str = "FP16", of_what: str = "median") -> str:
    before, after = (of.get(name, {}).get(of_what) for name in (base, variant))
    return f"{before / after:.2f}" if before and after else ""


def print_row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("export", help="graphs and what PyTorch computes; needs PyTorch")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--models", type=names, default=MODELS)
    sub.add_argument("--opset", type=int, default=17, help="17 for TensorRT 8.6")
    sub.add_argument("--jobs", type=int, default=4)
    sub.set_defaults(run=export)
    for name, function in (("build", build), ("work", work)):
        sub = commands.add_parser(name, help="build and measure" if name == "build" else "one process of build")
        sub.add_argument("folder", type=Path)
        sub.add_argument("--results", type=Path, required=True)
        sub.add_argument("--models", type=names, default=MODELS)
        sub.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=(32, 1, 128))
        sub.add_argument("--duration", type=float, default=1.0, help="seconds of measuring an engine")
        sub.add_argument("--timing-cache", type=Path)
        sub.add_argument("--tactic-sources", type=names, help="by default those of TensorRT")
        sub.add_argument("--workspace", type=int, help="bytes")
        sub.add_argument("--optimization-level", type=int, help="0 to 5; by default that of TensorRT")
        sub.add_argument("--timing-iterations", type=int, help="runs of a kernel to average; by default that of TensorRT")
        sub.add_argument("--variants", type=names, default=tuple(VARIANTS))
        sub.set_defaults(run=function)
        if name == "build":
            sub.add_argument("--seconds", type=float, default=1e9, help="start no build after this time")
            sub.add_argument("--jobs", type=int, default=1, help="models built for side by side, before all are measured")
        else:
            sub.add_argument("--only-plans-of", default="", help="build for this model and do not measure")
            sub.add_argument("--until", type=float, default=1e18)
            sub.add_argument("--skip", type=lambda text: tuple(text.split(";")), default=())
    sub = commands.add_parser("table", help="the results as a table")
    sub.add_argument("results", type=Path)
    sub.add_argument("--search", default="", help='which builds, such as "iterations 8"; by default those with no such setting')
    sub.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
