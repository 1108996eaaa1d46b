"""Time TensorRT's first build on this machine, and note what it uses meanwhile.

    python benchmarks/first_build.py export FILE.onnx       # needs PyTorch: a residual network of two blocks, INT8 with Q/DQ
    python benchmarks/first_build.py run FILE.onnx --limit 150 --settings lazy,default --out FOLDER

``run`` needs TensorRT and a GPU, neither PyTorch nor ONNX. Each setting is a process of its own, which builds the network twice
and tells when each stage ended. Beside it the parent notes CPU time, memory, bytes read and GPU memory every second.
A process that does not end within the limit is stopped; where ``cuda-gdb`` is installed, the stacks of its threads are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Name: environment, and arguments of qat.tensorrt.build. cuBLAS and cuDNN, without which convolutions do, are asked
# for no tactics unless a setting says so.
OWN = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
LAZY = {"CUDA_MODULE_LOADING": "LAZY"}
SETTINGS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "default": ({}, {"tactic_sources": OWN}),
    "lazy": (LAZY, {"tactic_sources": OWN}),
    "eager": ({"CUDA_MODULE_LOADING": "EAGER"}, {"tactic_sources": OWN}),
    # Refuses what the driver would have to compile from PTX.
    "lazy-no-jit": ({**LAZY, "CUDA_DISABLE_PTX_JIT": "1"}, {"tactic_sources": OWN}),
    "lazy-cache": ({**LAZY, "CUDA_CACHE_MAXSIZE": str(4 << 30)}, {"tactic_sources": OWN}),
    "lazy-level-1": (LAZY, {"tactic_sources": OWN, "optimization_level": 1}),
    "lazy-no-sources": (LAZY, {"tactic_sources": ()}),
    "lazy-all-sources": (LAZY, {}),
}


def export(path: Path) -> None:
    import torch
    from torch import nn

    import qat

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(x + self.conv2(self.relu(self.conv1(x))))

    torch.manual_seed(0)
    stem, pool = nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(stem, nn.ReLU(), Block(64), Block(64), pool, nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.randn(8, 3, 64, 64)
    qat.prepare(model)
    qat.calibrate(model, [images], progress=False)
    qat.export_onnx(model, path, images, opset=17, fuse_adds=True)


def build(path: Path, arguments: dict[str, Any]) -> None:
    """Build twice; tell the seconds since the start behind each stage."""
    start = time.perf_counter()

    def tell(stage: str) -> None:
        print(f"{time.perf_counter() - start:8.1f} s  {stage}", flush=True)

    from warm import warm_builder

    import qat.tensorrt

    tell("imported")
    kept = warm_builder()
    tell("builder made")
    for number in ("first", "second"):
        engine = qat.tensorrt.build(path, batch=8, progress=False, check=False, **arguments)
        tell(f"{number} engine, {len(engine.plan)} bytes")
    del kept


def watch(process: subprocess.Popen[bytes], limit: float, samples: Path) -> bool:
    """Note what a process uses until it ends; False if that took longer than the limit."""
    start = time.perf_counter()
    with samples.open("w", encoding="utf-8") as file:
        while process.poll() is None and time.perf_counter() - start < limit:
            file.write(json.dumps({"s": round(time.perf_counter() - start, 1), **usage(process.pid)}) + "\n")
            time.sleep(1)
    return process.poll() is not None


def usage(pid: int) -> dict[str, Any]:
    """CPU seconds in user and kernel mode, MiB of memory, MiB read from disk, threads that run; MiB on the GPU."""
    found: dict[str, Any] = {}
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tick = os.sysconf("SC_CLK_TCK")
        found = {"user": int(fields[11]) / tick, "system": int(fields[12]) / tick, "threads": int(fields[17])}
        found["rss"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") >> 20
        read = Path(f"/proc/{pid}/io").read_text().split("read_bytes:")[1].split()[0]
        found["read"] = int(read) >> 20
    except (OSError, IndexError):
        return found
    query = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    found["gpu"] = done.stdout.strip()
    return found


def stacks(pid: int, path: Path) -> None:
    debugger = shutil.which("cuda-gdb")
    if debugger is None:
        return
    command = [debugger, "-p", str(pid), "-batch", "-ex", "set pagination off", "-ex", "thread apply all bt 30"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        path.write_text("cuda-gdb did not answer within 60 s\n")
        return
    path.write_text(done.stdout + done.stderr)


def run(path: Path, names: list[str], limit: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        environment |= SETTINGS[name][0]
        command = [sys.executable, __file__, "build", str(path), "--settings", name]
        process = subprocess.Popen(command, env=environment)
        if not watch(process, limit, out / f"{name}.jsonl"):
            stacks(process.pid, out / f"{name}.stacks.txt")
            process.kill()
            print(f"{limit:8.1f} s  stopped", flush=True)
        process.wait()
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        print(*lines[:: max(1, len(lines) // 8)], lines[-1] if lines else "", sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("export", "run", "build"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--settings", default="lazy,default", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one setting")
    parser.add_argument("--out", type=Path, default=Path("first-build"))
    args = parser.parse_args()
    if args.stage == "export":
        export(args.path)
    elif args.stage == "build":
        build(args.path, SETTINGS[args.settings][1])
    else:
        run(args.path, args.settings.split(","), args.limit, args.out)


if __name__ == "__main__":
    main()
