"""Throughput of quantization-aware training with QATCallback on several devices, and whether all ranks have the same ranges.

    python benchmarks/ddp.py --devices 1 2 --model resnet50 --batch 128 --precision bf16-mixed
    python benchmarks/ddp.py --devices 1 2 --accelerator cpu --model resnet18 --batch 4 --size 64 --steps 6

One run of Lightning's own DDP a number of devices; images are random, different on every rank, and stay on the device.
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


def train(args: argparse.Namespace, devices: int) -> None:
    """One run; rank 0 writes its figures as JSON to ``args.result``."""
    import lightning as L
    import torch
    import torchvision
    from torch.nn import functional as F

    import qat
    from qat.quantizer import quantizers

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
            torch.manual_seed(0)
            self.model = torchvision.models.get_model(args.model, weights=None)
            if args.channels_last:
                self.model = self.model.to(memory_format=torch.channels_last)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

        def train_dataloader(self) -> Any:
            generator = torch.Generator().manual_seed(self.global_rank)
            x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
            x = x.to(self.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
            y = torch.randint(0, 1000, (args.batch,), generator=generator).to(self.device)
            return Repeated((x, y))

    class Watch(L.Callback):
        """Time behind the warm-up, and the ranges of all ranks."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARM_UP:
                self.synchronize()
                self.begin = time.perf_counter()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.synchronize()
            self.seconds = time.perf_counter() - self.begin
            sites = [site.amax.detach().flatten() for _, site in quantizers(pl_module)]
            ranges = torch.cat([torch.zeros(0, device=pl_module.device), *sites])
            everyone = trainer.strategy.all_gather(ranges).reshape(devices, -1)
            self.equal = bool((everyone == everyone[0]).all())
            self.ranges = ranges.numel()

        def synchronize(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    watch = Watch()
    quantized = qat.QATCallback(calibration={"batches": 2, "progress": False}, log_ranges=None)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp",
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
        step = watch.seconds / args.steps
        found = {
            "devices": devices,
            "step_ms": 1000 * step,
            "images_per_second": devices * args.batch / step,
            "ranges": watch.ranges,
            "ranges_equal": watch.equal,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() and args.accelerator != "cpu" else "CPU",
            "torch": torch.__version__,
        }
        Path(args.result).write_text(json.dumps(found))


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
    parser.add_argument("--float", action="store_true", help="the float model, for comparison")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        train(args, args.devices[0])
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for devices in args.devices:
            result = Path(folder) / f"{devices}.json"
            options = ["--accelerator", args.accelerator, "--model", args.model, "--precision", args.precision]
            options += [f"--{name}={getattr(args, name)}" for name in ("batch", "size", "steps")]
            options += [f"--{name}" for name in ("channels-last", "float") if getattr(args, name.replace("-", "_"))]
            command = [sys.executable, __file__, "--devices", str(devices), *options, "--result", str(result)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
            rows.append(json.loads(result.read_text()))
            print(json.dumps(rows[-1]), flush=True)
    print(
        f"\n{rows[0]['device']}, torch {rows[0]['torch']}, {args.model}{', float' if args.float else ''}, batch {args.batch} a device, {args.precision}\n"
    )
    print(table(rows))
    return int(not all(row["ranges_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
