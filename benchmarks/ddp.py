"""Throughput of quantization-aware training with QATCallback on several devices, and whether all ranks have the same ranges.

    python benchmarks/ddp.py --devices 1 2 --model resnet50 --batch 512 --precision bf16-mixed --channels-last
    python benchmarks/ddp.py --devices 1 2 --model resnet50 --batch 128 --precision bf16-mixed --compile reduce-overhead
    python benchmarks/ddp.py --devices 1 2 --accelerator cpu --model resnet18 --batch 4 --size 64 --steps 6

One run of Lightning's own DDP (with ``--plain`` of torch's, by torchrun) a number of devices; images are random, different on
every rank, and stay on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WARM_UP = 10


def make_model(args: argparse.Namespace) -> Any:
    """The float network with random weights, the same in every process."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def compiled(args: argparse.Namespace, model: Any) -> Any:
    """The same model, whose steps are compiled if that was asked for: with the first one."""
    import qat

    if args.compile:
        model.compile(options=qat.compile_options(args.compile))
    return model


def make_batch(args: argparse.Namespace, rank: int, device: Any) -> tuple[Any, Any]:
    """Random images and labels of one process, on its device."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    x = x.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    return x, torch.randint(0, 1000, (args.batch,), generator=generator).to(device)


def make_optimizer(model: Any) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def ddp_options(args: argparse.Namespace) -> dict[str, Any]:
    """What DistributedDataParallel is asked for beyond its defaults."""
    return {"broadcast_buffers": False, "gradient_as_bucket_view": True} if args.lean else {}


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_signals(args: argparse.Namespace, device: Any) -> None:
    """With ``--signal-check`` ask all ranks whether one was told to end: the host waits for the step before.

    Lightning's Trainer does so each step since 2.5.2 (https://github.com/Lightning-AI/pytorch-lightning/issues/21487).
    """
    import torch

    if args.signal_check and torch.distributed.get_world_size() > 1:
        told = torch.tensor([0], device=device)
        torch.distributed.broadcast(told, src=0)
        told.item()


def ranges_of(model: Any, device: Any) -> Any:
    """All ranges in a row; none of the float model."""
    import torch

    from qat.core.quantizer import quantizers

    return torch.cat([torch.zeros(0, device=device), *(site.amax.detach().flatten() for _, site in quantizers(model))])


def report(args: argparse.Namespace, devices: int, seconds: float, everyone: Any) -> None:
    """Write the figures of a run; ``everyone`` has the ranges of a process in each row."""
    import torch

    step = seconds / args.steps
    found = {
        "devices": devices,
        "step_ms": 1000 * step,
        "images_per_second": devices * args.batch / step,
        "ranges": everyone.shape[1],
        "ranges_equal": bool((everyone == everyone[0]).all()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and args.accelerator != "cpu" else "CPU",
        "torch": torch.__version__,
    }
    Path(args.result).write_text(json.dumps(found))


def train(args: argparse.Namespace, devices: int) -> None:
    """One run by Lightning; rank 0 writes its figures as JSON to ``args.result``."""
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    import qat

    class SameStream(DDPStrategy):
        """Lightning's, but made on the stream that training uses: it otherwise makes one, and gradients wait for that."""

        def configure_ddp(self) -> None:
            device_ids = self.determine_ddp_device_ids()
            self.model = DistributedDataParallel(self.model, device_ids=device_ids, **ddp_options(args))

    class Repeated:
        """One batch, over and over. Not a list: Lightning would take that for several loaders."""

        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def __len__(self) -> int:
            return int(args.steps) + WARM_UP

        def __iter__(self) -> Iterator[Any]:
            return iter([self.batch] * len(self))

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = compiled(args, make_model(args))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Any:
            return make_optimizer(self)

        def train_dataloader(self) -> Any:
            return Repeated(make_batch(args, self.global_rank, self.device))

    class Watch(L.Callback):
        """Time of the steps behind the warm-up, without what follows the last one, and the ranges of all ranks."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARM_UP:
                synchronize()
                self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARM_UP + args.steps - 1:
                synchronize()
                self.seconds = time.perf_counter() - self.begin

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.everyone = trainer.strategy.all_gather(ranges_of(pl_module, pl_module.device)).reshape(devices, -1)

    watch = Watch()
    quantized = qat.QATCallback(calibration={"batches": 2, "progress": False}, log_ranges=None)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=devices,
        strategy="auto" if devices == 1 else SameStream() if args.same_stream else DDPStrategy(**ddp_options(args)),
        precision=args.precision,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*([] if args.float else [quantized]), watch],
    )
    trainer.fit(Classifier())
    if trainer.is_global_zero:
        report(args, devices, watch.seconds, watch.everyone)


def train_plain(args: argparse.Namespace, devices: int) -> None:
    """The same without Lightning, in a process that torchrun started."""
    import torch
    from torch import distributed
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    import qat

    rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and args.accelerator != "cpu"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    model, (x, y) = make_model(args).to(device), make_batch(args, rank, device)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16-mixed")

    if not args.float:
        qat.prepare(model)
        with autocast():
            qat.calibrate(model, [(x, y)] * 2, progress=False)
        qat.batchnorm.freeze_batch_norm(model)
    compiled(args, model)
    options: dict[str, Any] = {"device_ids": [rank] if on_gpu else None, **ddp_options(args)}
    wrapped = model if devices == 1 else DistributedDataParallel(model, **options)
    optimizer = make_optimizer(wrapped)
    begin = 0.0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            synchronize()
            begin = time.perf_counter()
        check_signals(args, device)
        with autocast():
            loss = F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronize()
    seconds = time.perf_counter() - begin
    own = ranges_of(model, device)
    everyone = [torch.empty_like(own) for _ in range(devices)]
    distributed.all_gather(everyone, own)
    if rank == 0:
        report(args, devices, seconds, torch.stack(everyone))
    distributed.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    """The runs as Markdown, relative to the first."""
    lines = [
        "| devices | step, ms | images a second | to the first | ranges | equal on all ranks |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["images_per_second"] / rows[0]["images_per_second"]
        values = f"{row['step_ms']:.1f} | {row['images_per_second']:.0f} | {ratio:.2f} | {row['ranges']}"
        lines.append(f"| {row['devices']} | {values} | {'yes' if row['ranges_equal'] else 'NO'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=128, help="images a device and step")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", metavar="MODE", help="compiled steps: default, reduce-overhead or max-autotune")
    parser.add_argument("--lean", action="store_true", help="DDP with broadcast_buffers=False, gradient_as_bucket_view=True")
    parser.add_argument("--same-stream", action="store_true", help="Lightning's DDP on the stream of training")
    parser.add_argument("--plain", action="store_true", help="a loop of one's own instead of Lightning's Trainer")
    parser.add_argument("--signal-check", action="store_true", help="in the loop of --plain, wait as Lightning's Trainer does")
    parser.add_argument("--float", action="store_true", help="the float model, for comparison")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.precision not in ("32-true", "bf16-mixed") and args.plain:
        parser.error("--plain: 32-true or bf16-mixed")
    if args.plain and args.same_stream:
        parser.error("--same-stream: is about Lightning's DDP, not that of --plain")
    if args.signal_check and not args.plain:
        parser.error("--signal-check: is for --plain, Lightning's Trainer does it by itself")
    if args.result:
        (train_plain if args.plain else train)(args, args.devices[0])
        return 0
    names = ("channels-last", "float", "plain", "lean", "same-stream", "signal-check")
    flags = [name for name in names if getattr(args, name.replace("-", "_"))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for devices in args.devices:
            result = Path(folder) / f"{devices}.json"
            options = ["--accelerator", args.accelerator, "--model", args.model, "--precision", args.precision]
            options += [f"--{name}={getattr(args, name)}" for name in ("batch", "size", "steps")]
            options += [f"--{name}" for name in flags]
            options += ["--compile", args.compile] if args.compile else []
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if args.plain else []
            command = [sys.executable, *launcher, __file__, "--devices", str(devices), *options, "--result", str(result)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
            rows.append(json.loads(result.read_text()))
            print(json.dumps(rows[-1]), flush=True)
    first, kind = rows[0], ", ".join([args.model, *flags, *([f"compiled ({args.compile})"] if args.compile else [])])
    print(f"\n{first['device']}, torch {first['torch']}, {kind}, batch {args.batch} a device, {args.precision}\n")
    print(table(rows))
    return int(not all(row["ranges_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
