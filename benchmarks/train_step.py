"""What a training step costs: float, quantized by this package, and quantized by others; one process each, in one run.

    python benchmarks/train_step.py --model resnet50 --batch 128 --device cuda --amp bf16 --channels-last
    python benchmarks/train_step.py --model resnet18 --batch 32 --size 96 --device cpu --threads 2 --rounds 5

With ``--together`` all processes start and compile side by side, and are measured one after the other when all are ready. Same
model, images and seed for all: cross entropy, SGD with momentum, random images that stay on the device. Variants whose name
ends in ``-compiled`` run under ``torch.compile`` with ``qat.compile_options()``, in ``-default`` without; ``@`` and a mode may
follow, as in ``qat-compiled@reduce-overhead``. Those in ``-graphed`` are the eager step replayed as a CUDA graph.

``ms`` is the median of steps that are each waited for; ``in a row`` a step of many that are not, as a loop of training makes
them; ``GPU ms`` what the kernels take together, without what the host takes to start them. ``torch`` has this package's
placement, each site a ``torch.fake_quantize_per_tensor_affine`` or ``_per_channel_affine``; ``modelopt``, ``brevitas`` and
``torchao`` place their own sites, by their defaults for INT8. The others are not installed with this package:
pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

VARIANTS = ("float", "qat", "lsq", "torch", "modelopt", "brevitas", "torchao")
READY = "ready to measure"
DEFAULT = ("float", "qat", "torch", "modelopt", "float-compiled", "qat-compiled", "lsq-compiled", "torch-compiled")


def quantized(model: Any, images: Any, variant: str) -> Any:
    """``model`` with the fake quantization of a variant, calibrated on ``images``."""
    import torch

    if variant in ("qat", "lsq", "torch"):
        import qat

        qat.prepare(model, qat.QuantConfig(learn_scales=variant == "lsq"), example_inputs=images[:2])
        qat.calibrate(model, [images], method="max", progress=False)
        return with_torch_operators(model) if variant == "torch" else model
    if variant == "modelopt":
        import modelopt.torch.quantization as mtq

        return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(images))
    if variant == "brevitas":
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.graph.quantize import layerwise_quantize

        model = layerwise_quantize(model.eval())
        with torch.no_grad(), calibration_mode(model):
            model(images)
        return model
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model.train(), (images,)).module()
    return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))


def with_torch_operators(model: Any) -> Any:
    """Every site computed by torch's own operator, which multiplies by the reciprocal of the scale."""
    import torch

    from qat.core.quantizer import Quantizer, WeightQuantizer

    class PerTensor(Quantizer):
        def forward(self, x: Any) -> Any:
            zero: Any = self.zero
            return torch.fake_quantize_per_tensor_affine(x, self.scale, zero, self.fmt.qmin, self.fmt.qmax)

    class PerChannel(WeightQuantizer):
        def forward(self, x: Any) -> Any:
            zero: Any = self.zero
            assert self.axis is not None
            return torch.fake_quantize_per_channel_affine(x, self.range_scale(x), zero, self.axis, self.fmt.qmin, self.fmt.qmax)

    for site in model.modules():
        if isinstance(site, Quantizer):
            site.zero = torch.zeros(site.amax.shape, dtype=torch.int32, device=site.amax.device)
            site.__class__ = PerTensor if site.axis is None else PerChannel
    return model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    import torch
    import torchvision

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = torchvision.models.get_model(args.model, num_classes=args.classes).to(device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.randint(0, args.classes, (args.batch,), device=device)
    if args.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    name, _, how = args.variant.partition("-")
    how, _, mode = how.partition("@")
    if name != "float":
        model = quantized(model, images, name)
    if name != "torchao":
        model.train()
    step_model = model
    if how == "compiled":
        import qat

        step_model = torch.compile(model, options=qat.compile_options(mode or None))
    elif how == "default":
        step_model = torch.compile(model, mode=mode or None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(step_model(images), labels)
        loss.backward()
        optimizer.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begin = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begin
    for _ in range(args.warm_up):
        step()
    wait()
    run = step
    if how == "graphed":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    if args.wait:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the others need it meanwhile
        print(READY, flush=True)
        sys.stdin.readline()
        # The device may have lowered its clocks meanwhile.
        for _ in range(args.warm_up):
            run()
        wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        run()
        wait()
        times.append(1000 * (time.perf_counter() - begin))
    begin = time.perf_counter()
    for _ in range(args.steps):
        run()
    wait()
    in_a_row = 1000 * (time.perf_counter() - begin) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    kernels = time_kernels(run) if device.type == "cuda" else {}
    measured = {"times": times, "in_a_row": in_a_row, "first": first, "peak": peak, "kernels": kernels}
    return {**measured, "device": where, "torch": torch.__version__}


def time_kernels(run: Callable[[], None], steps: int = 3) -> dict[str, float]:
    """Milliseconds a step that the GPU spends in each kernel."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            total[event.name] += event.time_range.elapsed_us() / 1000 / steps
    return dict(total.most_common())


class Process:
    """A variant in a process of its own, which gets ready and then waits."""

    def __init__(self, variant: str, args: argparse.Namespace) -> None:
        shared = [
            "--" + name.replace("_", "-") + f"={getattr(args, name)}" for name in SETTINGS if getattr(args, name) is not None
        ]
        shared += ["--channels-last"] if args.channels_last else []
        command = [sys.executable, __file__, "--one", variant, "--wait", *shared]
        self.variant = variant
        # A file, since a pipe that nobody reads would stop the process.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def get_ready(self) -> None:
        """Wait until it could start to measure, or has failed."""
        for line in self._output():
            if line.strip() == READY:
                break

    def measured(self) -> dict[str, Any] | str:
        """Let it measure: what it found, or the last line of its error."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        said = list(self._output())
        if self._process.wait() == 0:
            found: dict[str, Any] = json.loads(said[-1])
            return found
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or [f"status {self._process.returncode}"])[-1]

    def _output(self) -> Iterator[str]:
        assert self._process.stdout is not None
        return iter(self._process.stdout.readline, "")


def run(args: argparse.Namespace) -> int:
    """All variants, round by round, so that what disturbs the machine disturbs all of them."""
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        chosen = [variant for variant in args.variants if variant not in failed]
        for group in [chosen] if args.together else [[variant] for variant in chosen]:
            processes = [Process(variant, args) for variant in group]
            for process in processes:
                process.get_ready()
            print(READY, file=sys.stderr, flush=True)
            for process in processes:
                answer = process.measured()
                if isinstance(answer, str):
                    failed[process.variant] = answer
                    print(f"{process.variant}: {answer}", file=sys.stderr, flush=True)
                else:
                    found.setdefault(process.variant, []).append(answer)
                    print(f"{process.variant}: {statistics.median(answer['times']):.1f} ms", file=sys.stderr, flush=True)
    report(args, found, failed)
    if args.json:
        from qat.support.files import write_text

        write_text(args.json, json.dumps({"found": found, "failed": failed}))
    return 0


def ratio_of(times: list[float], base: list[float]) -> str:
    """The median of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times, base, strict=False)]
    return f"{statistics.median(ratios):.3f}" if ratios else ""


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> None:
    """A Markdown table; a variant is compared with the float step of its own kind: eager, compiled or graphed."""
    if not found:
        print("no variant ran: " + "; ".join(f"{variant}: {why}" for variant, why in failed.items()))
        return
    some = next(iter(found.values()))[0]
    layout = ", channels-last" if args.channels_last else ""
    print(f"{args.model}, batch {args.batch}, {args.size} px, {args.amp}{layout}; {some['device']}, torch {some['torch']}\n")
    heads = ("step", "ms", "to float", "in a row", "to float", "GPU ms", "to float", "peak GiB", "to float", "first step s")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    medians = {variant: [statistics.median(one["times"]) for one in rounds] for variant, rounds in found.items()}
    for variant, rounds in found.items():
        base = "-".join(["float", *variant.split("-")[1:]])
        ratio = ratio_of(medians[variant], medians.get(base, []))
        row = [one["in_a_row"] for one in rounds]
        rows = [f"{statistics.median(row):.1f}", ratio_of(row, [one["in_a_row"] for one in found.get(base, [])])]
        peak, base_peak = (found[name][0]["peak"] if name in found else None for name in (variant, base))
        memory = ["" if peak is None else f"{peak:.2f}", "" if peak is None or base_peak is None else f"{peak / base_peak:.2f}"]
        first = statistics.median(one["first"] for one in rounds)
        gpu = [
            statistics.median([sum(one["kernels"].values()) for one in found.get(name, [])] or [0]) for name in (variant, base)
        ]
        busy = [f"{gpu[0]:.1f}" if gpu[0] else "", f"{gpu[0] / gpu[1]:.3f}" if gpu[1] else ""]
        cells = [variant, f"{statistics.median(medians[variant]):.1f}", ratio, *rows, *busy, *memory, f"{first:.1f}"]
        print(f"| {' | '.join(cells)} |")
    for variant, rounds in found.items() if args.kernels else ():
        print(f"\n{variant}, ms a step")
        for name, ms in list(rounds[0]["kernels"].items())[: args.kernels]:
            print(f"{ms:8.3f} {name[:150]}")
    for variant, why in failed.items():
        print(f"\n{variant} failed: {why}")


SETTINGS = ("model", "batch", "size", "classes", "device", "amp", "threads", "steps", "warm_up", "seed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--variants", type=lambda text: tuple(text.split(",")), default=DEFAULT)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--steps", type=int, default=20, help="measured ones")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those, behind the first")
    parser.add_argument("--rounds", type=int, default=1, help="processes a variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", type=int, default=0, help="show the so many longest kernels of each variant")
    parser.add_argument("--json", help="file for all that was measured, every kernel's time too")
    parser.add_argument("--together", action="store_true", help="start all at once, and measure when all are ready")
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", dest="variant", help="measure this variant here, and print JSON")
    args = parser.parse_args()
    unknown = [name for name in args.variants if re.sub("-((compiled|default)(@[a-z-]+)?|graphed)$", "", name) not in VARIANTS]
    if unknown:
        parser.error(
            f"no variant {unknown[0]}; choose from {', '.join(VARIANTS)}, each also with -compiled or -default (and @MODE) "
            "or -graphed behind"
        )
    if args.variant:
        print(json.dumps(measure(args)))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
