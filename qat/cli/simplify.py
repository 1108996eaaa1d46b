"""``qat simplify``: simplify an ONNX file and prove it unchanged."""

from __future__ import annotations

import argparse

from .arguments import inputs_option, onnx_file
from .command import OK, Command
from .inputs import by_name, load_inputs
from .output import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    onnx_file(parser)
    parser.add_argument("out", metavar="OUT", nargs="?", help="file to write; without it, only tell what would change")
    inputs_option(parser, "to compare the outputs on (default: random)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="accepted share of an output's magnitude (default: 1e-4)")


def _run(args: argparse.Namespace) -> int:
    from ..graph.reading import read_model
    from ..graph.simplify import simplify

    inputs = None
    if args.inputs is not None:
        graph = read_model(args.onnx).graph
        stored = {tensor.name for tensor in graph.initializer}
        inputs = by_name(load_inputs(args.inputs), [value.name for value in graph.input if value.name not in stored])
    show(simplify(args.onnx, args.out, inputs=inputs, tolerance=args.tolerance))
    return OK


COMMAND = Command(
    "simplify",
    "simplify an ONNX file and prove it unchanged",
    "model.onnx small.onnx",
    arguments=_add_arguments,
    run=_run,
)
