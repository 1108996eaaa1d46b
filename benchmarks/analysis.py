"""What the analyses and the report cost, in evaluations of the quantized model.

    python benchmarks/analysis.py --model resnet50 --images 64 --size 96
    python benchmarks/analysis.py --model resnet18 --images 16 --size 64 --no-exact

Random weights and images: the cost does not depend on them. One evaluation is a pass of the quantized model over all images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> int:
    import torch
    import torchvision

    import qat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--no-exact", dest="exact", action="store_false", help="leave the exact sensitivities out")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    batches = [torch.randn(args.batch, 3, args.size, args.size) for _ in range(-(-args.images // args.batch))]
    qat.prepare(model, example_inputs=batches[0][:1])
    qat.calibrate(model, batches, progress=False)

    def evaluate() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    evaluate()
    one = min(seconds(evaluate) for _ in range(3))
    where = f"{torch.get_num_threads()} threads of a CPU, torch {torch.__version__}"
    print(f"{args.model}, {args.images} images of {args.size} px, {where}")
    print(f"one evaluation {one:.2f} s\n\n| | s | evaluations |\n|---|---|---|", flush=True)
    found: dict[str, Callable[[], Any]] = {
        "layer_errors": lambda: qat.analysis.layer_errors(model, batches),
        "estimate_sensitivity": lambda: qat.analysis.estimate_sensitivity(model, batches),
    }
    if args.exact:
        found['sensitivity, switch="on"'] = lambda: qat.analysis.sensitivity(model, batches, switch="on")
        found['sensitivity, switch="off"'] = lambda: qat.analysis.sensitivity(model, batches, switch="off")
    with tempfile.TemporaryDirectory() as folder:
        found["report"] = lambda: qat.report.write_report(model, batches, Path(folder) / "report.html")
        for name, function in found.items():
            took = seconds(function)
            print(f"| {name} | {took:.1f} | {took / one:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
