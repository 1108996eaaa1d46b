"""``qat inspect``: list the layers of an engine and their precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import QATError
from .arguments import PLANS, json_flag, runtime_option
from .command import FOUND, OK, Command
from .output import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    text = f"{PLANS}, an ONNX file (built by TensorRT-RTX), or what a build left: the inspector's .json or a verbose .log"
    parser.add_argument("file", metavar="FILE", help=text)
    parser.add_argument("--onnx", metavar="MODEL", help="the ONNX file of the engine: tells which sites lost INT8 and why")
    parser.add_argument("--target", default="SM86", metavar="SM86", help="GPU to build an ONNX file for (default: SM86)")
    parser.add_argument("--times", action="store_true", help="measure each layer of an engine on random inputs; needs its GPU")
    parser.add_argument("--png", metavar="OUT", help="draw the layers")
    parser.add_argument("--rules", metavar="OUT", help="write settings (YAML) that leave in float what runs in float anyway")
    json_flag(parser)
    runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    from .. import tensorrt
    from ..support.files import check_target, write_text

    if not Path(args.file).is_file():
        raise QATError(f"{args.file}: no such file")
    for path, is_text in ((args.png, False), (args.rules, True)):
        if path:
            check_target(path, text=is_text)
    engine: Any = args.file
    times = None
    if args.times:
        from ..bench.targets import random_array

        if Path(args.file).suffix in (".onnx", ".json", ".log", ".txt"):
            raise QATError(f"--times: {args.file} is no engine. Build one with qat build, and pass its plan")
        engine = tensorrt.load(args.file, runtime=args.runtime)
        inputs = {info.name: random_array(info.dtype_name, tuple(info.opt)) for info in engine.inputs}
        times = tensorrt.layer_times(engine, inputs)
    inspection = tensorrt.inspect(engine, onnx=args.onnx, times=times, target=args.target, runtime=args.runtime)
    if args.json:
        print(inspection.to_json())
    else:
        show(inspection)
    if args.png:
        inspection.to_png(args.png)
    if args.rules:
        import yaml

        write_text(args.rules, yaml.safe_dump({"rules": inspection.rules}, sort_keys=False))
    return FOUND if inspection.lost else OK


COMMAND = Command(
    "inspect",
    "list the layers of an engine, their precision, and why a site lost INT8",
    "model.plan --onnx model.onnx",
    "model.onnx --target SM89 --png layers.png   (built by TensorRT-RTX, no GPU needed)",
    arguments=_add_arguments,
    run=_run,
)
