"""``qat run``: compute the outputs of an engine or ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import PLANS, inputs_option, runtime_option
from .command import OK, Command
from .inputs import by_name, load_inputs

if TYPE_CHECKING:
    import numpy as np


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{PLANS}, or an ONNX file, which ONNX Runtime runs on the CPU")
    inputs_option(parser, "what to compute with", required=True)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="outputs by name, as .npz")
    runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    import io
    import zipfile

    import numpy as np

    from ..support.files import check_target, write_whole

    check_target(args.output)
    inputs = load_inputs(args.inputs)
    outputs = _run_onnx(args.model, inputs) if args.model.endswith(".onnx") else _run_plan(args, inputs)
    buffer = io.BytesIO()
    # What np.savez does, without its keyword arguments: an output may be called "file".
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    write_whole(args.output, buffer.getvalue())
    for name, array in outputs.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    return OK


def _run_onnx(path: str, inputs: Any) -> dict[str, np.ndarray]:
    import contextlib

    from ..bench.targets import from_path
    from ..graph.run import told

    with contextlib.ExitStack() as stack:
        session = from_path(Path(path), stack)
        names = [value.name for value in session.get_outputs()]
        feeds = by_name(inputs, [value.name for value in session.get_inputs()])
        with told(f"{path}: ONNX Runtime cannot run it on {_describe(feeds)}"):
            return dict(zip(names, session.run(names, feeds), strict=True))


def _describe(feeds: dict[str, np.ndarray]) -> str:
    """Types and shapes of arrays, for messages."""
    return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())


def _run_plan(args: argparse.Namespace, inputs: Any) -> dict[str, np.ndarray]:
    from .. import tensorrt

    with tensorrt.load(args.model, runtime=args.runtime) as engine:
        return engine.run(by_name(inputs, [info.name for info in engine.inputs]))


COMMAND = Command(
    "run",
    "compute the outputs of an engine or ONNX file",
    "model.plan --inputs x.npy -o out.npz",
    arguments=_add_arguments,
    run=_run,
)
