"""``qat verify``: compare PyTorch, ONNX Runtime and an engine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import QATError
from .arguments import inputs_option, json_flag, onnx_file, runtime_option
from .command import Command
from .inputs import call_factory, load_inputs
from .output import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    onnx_file(parser)
    parser.add_argument("--engine", metavar="PLAN", help="engine built from it")
    model = "module:function, a function of yours without arguments that returns the PyTorch model; THIS RUNS YOUR CODE"
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help=model)
    inputs_option(parser, "to compare on (default: random, on which top-1 says little)")
    parser.add_argument("--batch", type=int, default=2, help="size of an open first dimension of random inputs (default: 2)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="accepted share of an output's magnitude (default: 0.01)")
    parser.add_argument("--fp32-onnx", metavar="MODEL", help="the same model exported in FP32, where MODEL is FP16 or BF16")
    parser.add_argument("--no-locate", action="store_true", help="do not look for the layer where a difference starts")
    json_flag(parser)
    runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    import contextlib

    from ..verify import verify

    if args.engine is None and args.model is None:
        raise QATError("nothing to compare with ONNX Runtime: pass --engine, --model or both")
    if args.inputs is None:
        from ..graph.reading import read_model
        from ..graph.samples import random_inputs

        inputs: Any = random_inputs(read_model(args.onnx), batch=args.batch)
    else:
        inputs = load_inputs(args.inputs)
    model = None
    if args.model is not None:
        model = call_factory(args.model)
        inputs = _to_tensors(inputs)
    with contextlib.ExitStack() as stack:
        engine = None
        if args.engine is not None:
            from .. import tensorrt

            engine = stack.enter_context(tensorrt.load(args.engine, runtime=args.runtime))
        report = verify(
            model,
            args.onnx,
            engine,
            inputs,
            tolerance=args.tolerance,
            fp32_onnx=args.fp32_onnx,
            locate=not args.no_locate,
            progress=lambda line: print(line, file=sys.stderr),
        )
    if args.json:
        print(report.to_json())
    else:
        show(report)
    return report.exit_status


def _to_tensors(inputs: Any) -> Any:
    import torch

    if isinstance(inputs, dict):
        return {name: torch.from_numpy(array) for name, array in inputs.items()}
    return torch.from_numpy(inputs)


COMMAND = Command(
    "verify",
    "compare PyTorch, ONNX Runtime and an engine",
    "model.onnx --engine model.plan --inputs images.npz",
    "model.onnx --engine model.plan --model mymodels:quantized   (runs your code)",
    arguments=_add_arguments,
    run=_run,
)
