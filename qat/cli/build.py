"""``qat build``: build an engine from an ONNX file."""

from __future__ import annotations

import argparse
import sys

from ..errors import QATError
from .arguments import onnx_file, profile_batch, profile_shapes, runtime_option, size
from .command import OK, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    onnx_file(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="plan to write")
    parser.add_argument("--fp16", action=switch, help="FP16 kernels (default: yes where typing is weak)")
    parser.add_argument("--bf16", action=switch, help="BF16 kernels (default: no)")
    parser.add_argument("--int8", action=switch, help="INT8 kernels (default: if the graph holds Q/DQ)")
    parser.add_argument("--tf32", action=switch, default=True, help="round FP32 inputs to TF32 (default: yes)")
    parser.add_argument("--strongly-typed", action=switch, help="compute in the graph's types (default: by the version)")
    batch = "size of the open first dimension: one, or smallest, most frequent, largest (default: 1,8,32)"
    parser.add_argument("--batch", type=profile_batch, default=(1, 8, 32), metavar="N|MIN,OPT,MAX", help=batch)
    shapes = "shapes of an input; one, or MIN:OPT:MAX; several by commas or by repeating the option"
    parser.add_argument("--shapes", type=profile_shapes, action="append", default=[], metavar="NAME=1x3x224x224", help=shapes)
    parser.add_argument("--target", action="append", metavar="SM86", help="TensorRT-RTX: GPU to build for; may be repeated")
    parser.add_argument("--workspace", type=size, metavar="4G", help="largest scratch memory of a layer")
    parser.add_argument("--timing-cache", metavar="FILE", help="measured tactics, read and updated")
    parser.add_argument(
        "--timing-iterations", type=int, metavar="N", help="runs of a kernel to average (trtexec: 8; default: 1)"
    )
    parser.add_argument("--opt-level", type=int, choices=range(6), help="0 builds fastest, 5 searches longest (default: 3)")
    parser.add_argument("--hardware-compatibility", metavar="LEVEL", help="let the engine run on other GPUs, e.g. ampere_plus")
    parser.add_argument("--version-compatible", action="store_true", help="let the engine load in later minor versions")
    parser.add_argument("--fp32-layer", action="append", default=[], metavar="NODE", help="keep this ONNX node in FP32")
    parser.add_argument("--mark", action="append", default=[], metavar="TENSOR", help="return this ONNX tensor, too")
    parser.add_argument("--check", action=switch, default=True, help="look for broken rules first (default: yes)")
    runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    from .. import tensorrt
    from ..support.files import check_target

    # A build takes minutes.
    check_target(args.output)
    optional = {"targets": args.target} if args.target else {}
    engine = tensorrt.build(
        args.onnx,
        fp16=args.fp16,
        bf16=args.bf16,
        int8=args.int8,
        tf32=args.tf32,
        strongly_typed=args.strongly_typed,
        shapes={name: shape for group in args.shapes for name, shape in group.items()} or None,
        batch=args.batch,
        workspace=args.workspace,
        timing_cache=args.timing_cache,
        timing_iterations=args.timing_iterations,
        optimization_level=args.opt_level,
        hardware_compatibility=args.hardware_compatibility,
        version_compatible=args.version_compatible,
        outputs=args.mark,
        fp32_layers=args.fp32_layer,
        progress=sys.stderr.isatty(),
        check=args.check,
        runtime=args.runtime,
        **optional,
    )
    with engine:
        engine.save(args.output)
        print(f"{args.output}: {len(engine.plan) / 2**20:.1f} MiB, {engine.runtime.title}")
        try:
            inspection = tensorrt.inspect(engine)
        except QATError as error:
            print(f"no layer listing: {error}")
            return OK
    print(inspection.coverage)
    for site in inspection.lost:
        print(f"  {site.node} ({site.op}): {site.reason}")
    return OK


COMMAND = Command(
    "build",
    "build an engine from an ONNX file with the TensorRT that is installed",
    "model.onnx -o model.plan",
    "model.onnx -o model.plan --batch 1,8,32 --workspace 4G --timing-cache tactics.bin",
    "model.onnx -o model.plan --shapes images=1x3x224x224:8x3x224x224:32x3x224x224",
    "model.onnx -o model.plan --target SM86   (TensorRT-RTX)",
    arguments=_add_arguments,
    run=_run,
)
