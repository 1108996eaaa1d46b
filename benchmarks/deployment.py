"""Does all of qat.tensorrt and qat.bench work on a machine with TensorRT, a GPU, and neither PyTorch nor ONNX?

    python benchmarks/deployment.py export DIR     # needs PyTorch: small graphs, and what PyTorch computes
    python benchmarks/deployment.py run DIR        # needs TensorRT 8.6 or 10: one line a check, exit status 1 if one fails

The checks share a process, since TensorRT takes most of a minute to get ready for its first build. A library that crashes
takes its process along: that check has failed, and the others go on in a new one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from warm import warm_builder


def export(folder: Path) -> None:
    import onnx
    import torch
    from onnx import numpy_helper
    from torch import nn

    import qat
    from qat.export import export_float
    from qat.nn.add import QuantAdd

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU()

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(x + y)

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = nn.Sequential(stem, Block(64), Block(64), head)
    images = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        arrays = {"images": images.numpy(), "float": model(images).numpy()}
        export_float(model, folder / "float.onnx", images[:2], opset=17)
        qat.prepare(model)
        qat.calibrate(model, [images], progress=False)
        for name, fuse in (("both", False), ("fused", True)):
            qat.export_onnx(model, folder / f"{name}.onnx", images[:2], opset=17, fuse_adds=fuse)
            for module in model.modules():
                if isinstance(module, QuantAdd):
                    module.fuse = fuse
            arrays[name] = model(images).numpy()
    encoder = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).eval()
    tokens = torch.randn(16, 48, 64)
    qat.prepare(encoder, qat.QuantConfig(placement="fast", head=()))
    qat.calibrate(encoder, [tokens], progress=False)
    qat.export_onnx(encoder, folder / "attention.onnx", tokens[:2], opset=17)
    with torch.no_grad():
        arrays |= {"tokens": tokens.numpy(), "attention": encoder(tokens).numpy()}
    softmax = [node.name for node in onnx.load(folder / "attention.onnx").graph.node if node.op_type == "Softmax"]
    arrays["softmax"] = np.array(softmax)
    changed = onnx.load(folder / "both.onnx")
    scale = next(t for t in changed.graph.initializer if t.name == "2.conv1.input_quantizer/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(8), scale.name))
    onnx.save(changed, folder / "changed.onnx")
    np.savez(folder / "arrays.npz", **arrays)


@dataclass(frozen=True)
class Place:
    """Where the graphs are, and how to build them here."""

    folder: Path
    tactic_sources: tuple[str, ...] | None

    def build(self, name: str = "both", **options: Any) -> Any:
        return self.rebuild(str(self.folder / f"{name}.onnx"), **options)

    def rebuild(self, path: str, **options: Any) -> Any:
        import qat.tensorrt

        defaults = {"batch": (1, 8, 16), "tactic_sources": self.tactic_sources, "check": False}
        return qat.tensorrt.build(path, **{**defaults, **options})

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.folder / "arrays.npz") as data:
            return data["tokens" if name == "attention" else "images"], data[name]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def refusal(call: Callable[[], Any], *words: str) -> str:
    from qat.errors import QATError

    try:
        call()
    except QATError as error:
        message = str(error)
    else:
        raise AssertionError(f"no error; expected one that says {words}")
    assert all(word in message for word in words), f"the error does not say {words}: {message}"
    return message.splitlines()[0]


def int8_equals_pytorch(at: Place) -> str:
    said = []
    for name in ("both", "fused"):
        images, expected = at.arrays(name)
        with at.build(name) as engine:
            for batch in (1, 8, 16):
                (found,) = engine.run(images[:batch]).values()
                assert found.dtype == np.float32
                assert found.shape == (batch, 10)
                said.append(f"{name} {batch}: {relative(found, expected[:batch]):.4f}")
    return "relative error " + ", ".join(said)


def fp16_and_tf32_equal_pytorch(at: Place) -> str:
    images, expected = at.arrays("float")
    errors = []
    for options in ({"fp16": True}, {"fp16": False}, {"fp16": False, "tf32": False}):
        with at.build("float", **options) as engine:
            (found,) = engine.run(images).values()
            errors.append(relative(found, expected))
    assert errors[2] < 1e-5, f"FP32 differs by {errors[2]}"
    assert errors[2] <= errors[1] < 1e-2
    assert errors[0] < 1e-2
    return "relative error FP16 {:.1e}, TF32 {:.1e}, FP32 {:.1e}".format(*errors)


def timing_cache_speeds_up(at: Place) -> str:
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        at.build(timing_cache=at.folder / "timing.cache").close()
        seconds.append(time.perf_counter() - begin)
    return f"{seconds[0]:.1f} s, then {seconds[1]:.1f} s"


def layers_by_log_and_inspector_agree(at: Place) -> str:
    import qat.tensorrt

    with at.build("fused") as engine:
        by_json = qat.tensorrt.inspect(engine)
        log = at.folder / "fused.log"
        log.write_text("\n".join(message for _, message in engine.log))
    by_log = qat.tensorrt.inspect(str(log))
    counts = [sum(layer.is_int8 for layer in found.layers) for found in (by_json, by_log)]
    assert counts[0] == counts[1] == 5, f"INT8 kernels: {counts}"
    return by_json.coverage


def saved_engine_gives_the_same_bits(at: Place) -> str:
    import qat.tensorrt

    images, _ = at.arrays("both")
    path = at.folder / "both.plan"
    with at.build() as engine:
        engine.save(path)
        (expected,) = engine.run(images).values()
    with qat.tensorrt.load(path) as engine:
        (found,) = engine.run(images).values()
    assert np.array_equal(found, expected)
    return f"{path.stat().st_size} bytes"


def run_plan(plan: Path, arrays: Any) -> Any:
    import qat.tensorrt

    return qat.tensorrt.load(plan).run(arrays)


def bad_plans_are_refused(at: Place) -> str:
    with at.build() as engine:
        plan = engine.plan
    said = []
    for name, content in (("truncated", plan[: len(plan) // 2]), ("text", b"not a plan" * 100)):
        path = at.folder / f"{name}.plan"
        path.write_bytes(content)
        said.append(refusal(functools.partial(run_plan, path, at.arrays("both")[0]), path.name))
    return "; ".join(said)


def bad_inputs_are_refused(at: Place) -> str:
    images, _ = at.arrays("both")
    with at.build() as engine:
        name = engine.inputs[0].name
        said = [
            refusal(lambda: engine.run(images.astype(np.float64)), name, "float64"),
            refusal(lambda: engine.run(np.concatenate([images, images])), name, "16"),
            refusal(lambda: engine.run(images[:, :, ::2]), name),
            refusal(lambda: engine.run({"nonsense": images}), name, "missing"),
            refusal(lambda: engine.run(np.asfortranarray(images)), name),
        ]
        (found,) = engine.run(images).values()
    assert np.isfinite(found).all()
    return "; ".join(said)


def contexts_share_the_engine(at: Place) -> str:
    images, expected = at.arrays("both")
    errors = []
    with at.build() as engine:
        errors.append(relative(next(iter(engine.run(images).values())), expected))
        contexts = [engine.context(), engine.context()]
        stream = engine.cuda.create_stream()
        for context, batch in zip(contexts, (16, 3), strict=True):
            context.set_inputs(images[:batch])
            context.upload(stream)
            context.enqueue(stream)
            context.download(stream)
            engine.cuda.synchronize(stream)
            (found,) = context.outputs.values()
            errors.append(relative(found, expected[:batch]))
            context.close()
        engine.cuda.destroy_stream(stream)
        assert engine.layer_information
        errors.append(relative(next(iter(engine.run(images).values())), expected))
    assert max(errors) < 1e-2, f"{errors}"
    return "run, two contexts, run: relative error " + ", ".join(f"{error:.4f}" for error in errors)


def memory_is_given_back(at: Place) -> str:
    from qat.tensorrt.cuda import Cuda

    images, _ = at.arrays("both")
    cuda, free = Cuda(), []
    for _ in range(6):
        with at.build() as engine:
            engine.run(images)
        gc.collect()
        free.append(cuda.free_memory())
    lost = (free[1] - free[-1]) / 2**20
    assert lost < 8, f"{lost:.1f} MiB less after four more engines"
    return f"{lost:.1f} MiB less after four more engines"


def extra_outputs_are_returned(at: Place) -> str:
    images, expected = at.arrays("both")
    names = ("1.conv2.input_quantizer/output", "1.quant_add0.b_quantizer/output")
    with at.build(outputs=names) as engine:
        found = engine.run(images)
    assert set(names) < set(found)
    steps = [found[name] / np.abs(found[name])[found[name] != 0].min() for name in names]
    assert all(np.abs(step - np.rint(step)).max() < 1e-2 for step in steps), "not multiples of a scale"
    return f"relative error {relative(found['output'], expected):.4f}; {', '.join(names)} are multiples of a scale"


def layers_kept_in_fp32_are_exact(at: Place) -> str:
    images, expected = at.arrays("float")
    import qat.tensorrt

    with at.build("float") as engine:
        kernels = [
            name
            for layer in qat.tensorrt.inspect(engine).layers
            for name in layer.onnx_nodes
            if "Conv" in name or "Gemm" in name
        ]
        (half,) = engine.run(images).values()
    with at.build("float", tf32=False, fp32_layers=kernels) as engine:
        (found,) = engine.run(images).values()
    errors = relative(half, expected), relative(found, expected)
    assert errors[1] < errors[0] / 2, f"{errors}"
    return f"FP16 {errors[0]:.1e}, {len(kernels)} layers in FP32 {errors[1]:.1e}"


def attention_is_half_beside_qdq(at: Place) -> str:
    tokens, expected = at.arrays("attention")
    with np.load(at.folder / "arrays.npz") as data:
        softmax = [str(name) for name in data["softmax"]]
    assert softmax
    errors = []
    for options in ({}, {"fp32_layers": softmax}, {"fp16": False}):
        with at.build("attention", batch=16, **options) as engine:
            (found,) = engine.run(tokens).values()
        errors.append(relative(found, expected))
    assert max(errors) < 1e-2, f"{errors}"
    return "relative error {:.1e}, softmax in FP32 {:.1e}, all of it {:.1e}".format(*errors)


def calibrators_calibrate(at: Place) -> str:
    import qat.tensorrt as t

    images, expected = at.arrays("float")
    said = []
    for kind in (t.MinMaxCalibrator, t.EntropyCalibrator, t.EntropyCalibrator2, t.LegacyCalibrator):
        cache = at.folder / f"{kind.__name__}.cache"
        cache.unlink(missing_ok=True)
        with at.build("float", batch=(8, 8, 8), calibrator=kind([images[:8], images[8:]], cache=cache)) as engine:
            (found,) = engine.run(images[:8]).values()
        # A line a tensor: its name, and the bits of its scale.
        assert b"\ninput: " in cache.read_bytes()
        with at.build("float", batch=(8, 8, 8), calibrator=kind([], cache=cache)) as engine:
            (again,) = engine.run(images[:8]).values()
        said.append(f"{kind.__name__} {relative(found, expected[:8]):.3f} (from its cache {relative(again, expected[:8]):.3f})")
    return "relative error " + ", ".join(said)


def latency_equals_a_bare_loop(at: Place) -> str:
    import qat.bench

    images, _ = at.arrays("both")
    said = []
    with at.build() as engine:
        for graph in (False, True):
            # The second pass enqueues all runs, and synchronises once: a bare loop between two events.
            found = qat.bench.latency(engine, images, duration=1.0, throughput=True, cuda_graph=graph)
            bare = 1000 / found.throughput
            said.append(f"{'graph' if graph else 'engine'} {found.compute.median:.4f} ms, bare loop {bare:.4f} ms")
        copies = qat.bench.latency(engine, images, duration=0.5, copies=True)
        assert copies.h2d is not None
        assert copies.d2h is not None
        wrong = qat.bench.demonstrate_no_sync(engine, images)
    return "; ".join(said) + f"; H2D {copies.h2d.median:.4f}, D2H {copies.d2h.median:.4f} ms; {wrong}".replace("\n", " ")


def verification_passes_a_good_engine(at: Place) -> str:
    """Needs onnx and onnxruntime beside TensorRT."""
    from qat.verify import verify

    images, _ = at.arrays("both")
    with at.build() as engine:
        report = verify(None, at.folder / "both.onnx", engine, images, build=at.rebuild)
    assert report.ok, str(report)
    return " ".join(str(report).split())


def verification_tells_an_engine_of_another_file(at: Place) -> str:
    """One scale of that file is wrong. Needs onnx and onnxruntime beside TensorRT."""
    from qat.verify import verify

    images, _ = at.arrays("both")
    with at.build("changed") as engine:
        report = verify(None, at.folder / "both.onnx", engine, images, build=at.rebuild)
    assert not report.ok
    assert report.departure is not None
    assert report.departure.cause == "engine", str(report)
    return " ".join(str(report).split())


CHECKS = (
    latency_equals_a_bare_loop,
    int8_equals_pytorch,
    timing_cache_speeds_up,
    saved_engine_gives_the_same_bits,
    bad_plans_are_refused,
    bad_inputs_are_refused,
    layers_by_log_and_inspector_agree,
    fp16_and_tf32_equal_pytorch,
    extra_outputs_are_returned,
    contexts_share_the_engine,
    memory_is_given_back,
    calibrators_calibrate,
    layers_kept_in_fp32_are_exact,
    attention_is_half_beside_qdq,
    verification_passes_a_good_engine,
    verification_tells_an_engine_of_another_file,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("export", "run", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="which checks; all by default")
    parser.add_argument("--tactic-sources", help="names, by comma; by default TensorRT's choice")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one check")
    args = parser.parse_args()
    if args.command == "export":
        export(args.folder)
        return 0
    names = args.names or [check.__name__ for check in CHECKS]
    if unknown := set(names) - {check.__name__ for check in CHECKS}:
        parser.error(f"no check {', '.join(sorted(unknown))}")
    if args.command == "check":
        builder = warm_builder()
        sources = tuple(args.tactic_sources.split(",")) if args.tactic_sources else None
        for check in CHECKS:
            if check.__name__ in names:
                attempt(check, Place(args.folder, sources))
        del builder
        return 0
    command = [sys.executable, "-X", "faulthandler", "-u", __file__]
    command += ["--tactic-sources", args.tactic_sources] if args.tactic_sources else []
    # The names last, behind what they belong to: argparse takes them in one piece only.
    command += ["check", str(args.folder)]
    return int(run(command, names, args.timeout) > 0)


STARTED, PASSED, FAILED = "started", "ok", "FAILED"


def attempt(check: Callable[[Place], str], at: Place) -> None:
    """Run one check and print its line, and before it one that :func:`run` knows it by."""
    print(STARTED, check.__name__, flush=True)
    begin = time.perf_counter()
    try:
        said, verdict = check(at), PASSED
    except Exception:  # a check that failed is what is to be reported
        said, verdict = traceback.format_exc(), FAILED
    print(f"{verdict} {check.__name__} ({time.perf_counter() - begin:.0f} s): {said}", flush=True)


def run(command: Sequence[str], names: Sequence[str], timeout: float) -> int:
    """Run checks in one process, and in another what one that crashed or hung left over; how many failed."""
    left, failed = list(names), 0
    while left:
        process = subprocess.Popen([*command, *left], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        current = None
        for line in process.stdout:
            word, _, rest = line.partition(" ")
            if word == STARTED:
                current = rest.strip()
                left.remove(current)
                watch.cancel()
                watch = threading.Timer(timeout, process.kill)
                watch.start()
                continue
            if word in (PASSED, FAILED):
                failed += word == FAILED
                current = None
            print(line, end="", flush=True)
        watch.cancel()
        status = process.wait()
        if current is not None:
            failed += 1
            print(f"{FAILED} {current}: the process ended with status {status}", flush=True)
        elif status != 0:
            print(f"{FAILED}: no check could start, status {status}", flush=True)
            return failed + len(left)
    return failed


if __name__ == "__main__":
    sys.exit(main())
