"""``qat bench``: measure the latency of an engine, an ONNX file or a PyTorch model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import PLANS, batches, inputs_option
from .command import OK, Command
from .inputs import call_factory, load_inputs
from .output import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    text = f"{PLANS}, an ONNX file, or module:function, which is called and returns a PyTorch module and its example inputs"
    parser.add_argument("target", metavar="TARGET", help=text)
    parser.add_argument("--batch", type=batches, metavar="1,2,4", help="batch sizes; several give a table")
    inputs_option(parser, "to run on (default: random, for engines and ONNX files)")
    parser.add_argument("--warm-up", type=float, default=0.2, metavar="S", help="seconds before measuring (default: 0.2)")
    parser.add_argument("--duration", type=float, default=3.0, metavar="S", help="seconds to measure (default: 3)")
    parser.add_argument("--min-runs", type=int, default=10, metavar="N", help="runs at least (default: 10)")
    parser.add_argument("--copies", action="store_true", help="copy inputs and outputs from and to host memory each run")
    parser.add_argument("--throughput", action="store_true", help="measure throughput with one synchronisation at the end")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the run once and replay it")
    parser.add_argument("--no-spin", action="store_true", help="sleep while waiting for the GPU instead of polling")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, too")


def _run(args: argparse.Namespace) -> int:
    from ..bench import latency, sweep
    from ..support.files import check_target

    if args.json:
        check_target(args.json, text=True)
    target, inputs = args.target, None
    if ":" in target and not Path(target).exists():
        made = call_factory(target)
        target, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if args.inputs is not None:
        inputs = load_inputs(args.inputs)
    options = {
        "warm_up": args.warm_up,
        "duration": args.duration,
        "min_runs": args.min_runs,
        "copies": args.copies,
        "throughput": args.throughput,
        "cuda_graph": args.cuda_graph,
        "spin_wait": not args.no_spin,
    }
    several = args.batch is not None and len(args.batch) > 1
    result: Any
    if several or (args.batch and inputs is not None):
        result = sweep(target, args.batch, inputs, **options)
    else:
        result = latency(target, inputs, batch=args.batch[0] if args.batch else None, **options)
    show(result)
    if args.json:
        result.save(args.json)
    return OK


COMMAND = Command(
    "bench",
    "measure the latency of an engine, an ONNX file or a PyTorch model",
    "model.plan --batch 1,2,4 --json latency.json",
    "model.plan --cuda-graph --copies",
    "mymodels:resnet --batch 32   (calls resnet() of mymodels.py)",
    arguments=_add_arguments,
    run=_run,
)
