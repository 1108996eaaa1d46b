"""``qat``: the functions of the package from the shell.

Exit status: 0 if all is well, 1 for findings or a mismatch, 2 for input that cannot be worked with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import QATError

if TYPE_CHECKING:
    import numpy as np

OK, FOUND, INVALID = 0, 1, 2
_PLANS = "an engine (.plan, .engine, .trt)"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status.
    """
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except QATError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return INVALID
    except ModuleNotFoundError as error:
        # Deployment machines have no more than they need.
        if error.name is None or error.name.startswith("qat"):
            raise
        print(f"error: this command needs {error.name}, which is not installed here", file=sys.stderr)
        return INVALID
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("error: interrupted, nothing is written", file=sys.stderr)
        return 128 + 2


def make_parser() -> argparse.ArgumentParser:
    """The command line; imports neither torch nor onnx nor TensorRT."""
    parser = argparse.ArgumentParser(
        prog="qat",
        description="From a Q/DQ ONNX file to a measured, verified INT8 engine.",
        epilog="Exit status: 0 all is well, 1 findings or a mismatch, 2 invalid input.",
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="\n".join(["examples:", *(f"  qat {name} {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _add_check(command("check", _check, "find what TensorRT would refuse or not run in INT8", "model.onnx --target 8.6"))
    _add_simplify(command("simplify", _simplify, "simplify an ONNX file and prove it unchanged", "model.onnx small.onnx"))
    _add_build(
        command(
            "build",
            _build,
            "build an engine from an ONNX file with the TensorRT that is installed",
            "model.onnx -o model.plan",
            "model.onnx -o model.plan --batch 1,8,32 --workspace 4G --timing-cache tactics.bin",
            "model.onnx -o model.plan --shapes images=1x3x224x224:8x3x224x224:32x3x224x224",
            "model.onnx -o model.plan --target SM86   (TensorRT-RTX)",
        )
    )
    _add_run(command("run", _run, "compute the outputs of an engine or ONNX file", "model.plan --inputs x.npy -o out.npz"))
    _add_bench(
        command(
            "bench",
            _bench,
            "measure the latency of an engine, an ONNX file or a PyTorch model",
            "model.plan --batch 1,2,4 --json latency.json",
            "model.plan --cuda-graph --copies",
            "mymodels:resnet --batch 32   (calls resnet() of mymodels.py)",
        )
    )
    _add_inspect(
        command(
            "inspect",
            _inspect,
            "list the layers of an engine, their precision, and why a site lost INT8",
            "model.plan --onnx model.onnx",
            "model.onnx --target SM89 --png layers.png   (built by TensorRT-RTX, no GPU needed)",
        )
    )
    _add_verify(
        command(
            "verify",
            _verify,
            "compare PyTorch, ONNX Runtime and an engine",
            "model.onnx --engine model.plan --inputs images.npz",
            "model.onnx --engine model.plan --model mymodels:quantized   (runs your code)",
        )
    )
    _add_report(
        command(
            "report",
            _report,
            "write one HTML file about a quantized model: errors, sensitivity, ranges, structure",
            "runs/resnet --out resnet.html",
            "runs/resnet --engine qat.plan --onnx runs/resnet/qat.onnx",
            "--model mymodels:quantized   (runs your code: returns a calibrated model and batches)",
        )
    )
    return parser


# Arguments that several commands have.


def _onnx_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("onnx", metavar="MODEL", help="ONNX file")


def _inputs_option(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("--inputs", metavar="FILE", required=required, help=f"x.npy for one input, or in.npz by name; {text}")


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _runtime_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", choices=("tensorrt", "tensorrt_rtx"), help="default: the one that is installed")


# Values of arguments. argparse turns the ValueError of a bad one into a message with the option's name.


def _batches(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _profile_batch(text: str) -> int | tuple[int, int, int]:
    sizes = _batches(text)
    if len(sizes) == 1:
        return sizes[0]
    low, opt, high = sizes
    return low, opt, high


def _size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if unit > 1 else text) * unit)


def _profile_shapes(text: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """``name=1x3x8x8`` or ``name=min:opt:max``, several parted by commas."""
    shapes = {}
    for entry in text.split(","):
        name, found, given = entry.rpartition("=")
        parts = [tuple(int(size) for size in part.split("x")) for part in given.split(":")]
        if not found or not name or len(parts) not in (1, 3):
            raise ValueError(text)
        low, opt, high = parts * 3 if len(parts) == 1 else parts
        shapes[name] = (low, opt, high)
    return shapes


def _compute_capability(text: str) -> int:
    return int(text.upper().removeprefix("SM"))


# What a message of argparse calls the value.
_batches.__name__ = "list of batch sizes such as 1,2,4"
_profile_batch.__name__ = "batch size, or smallest, most frequent and largest such as 1,8,32,"
_size.__name__ = "number of bytes such as 512M or 4G"
_profile_shapes.__name__ = "shape such as name=1x3x224x224 or name=MIN:OPT:MAX"
_compute_capability.__name__ = "compute capability such as SM86"


# Files.


def _load_inputs(path: str) -> Any:
    """One array, or arrays by name. Pickled objects, which could run code, are refused."""
    import zipfile
    import zlib

    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise QATError(f"--inputs {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise QATError(f"--inputs {path}: damaged, or neither .npy nor .npz of plain arrays: {error}") from error


def _named(inputs: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Inputs by the names that ``names`` wants."""
    if not isinstance(inputs, dict):
        if len(names) != 1:
            raise QATError(f"--inputs: one array for the inputs {list(names)}. Pass an .npz that names them")
        return {names[0]: inputs}
    if set(inputs) != set(names):
        raise QATError(f"--inputs: arrays {sorted(inputs)}, the inputs are {sorted(names)}")
    return inputs


def _write(path: str, content: bytes) -> None:
    from .support.files import write_whole

    write_whole(path, content)


def _factory(spec: str) -> Any:
    """What the function ``module:function`` returns; this runs the user's code."""
    module, _, function = spec.partition(":")
    # A console script, unlike `python -m`, does not look in the current folder.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise QATError(f"{spec}: there is no module {error.name!r} here or installed") from error
    except AttributeError as error:
        raise QATError(f"{spec}: {module!r} has no function {function!r}") from error
    return found()


def _show(report: Any) -> None:
    """Print a report, as a table where rich is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(report)
        return
    # Names in brackets are no markup; files and pipes have no width.
    Console(width=None if sys.stdout.isatty() else 128, markup=False, highlight=False).print(report)


# The commands.


def _add_check(parser: argparse.ArgumentParser) -> None:
    _onnx_file(parser)
    parser.add_argument("--target", choices=("8.6", "10", "11", "rtx"), help="version of TensorRT (default: rules of all)")
    parser.add_argument("--sm", type=_compute_capability, help="compute capability of the GPU, e.g. SM86")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for notes, too")
    parser.add_argument("--all", action="store_true", help="list every node, however many break one rule")
    _json_flag(parser)


def _check(args: argparse.Namespace) -> int:
    from .graph.check import check_onnx

    findings = check_onnx(args.onnx, target=args.target, sm=args.sm)
    levels = Counter(finding.level for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_findings(findings, None if args.all else 5)
        counts = ", ".join(f"{levels[level]} {level}{'' if levels[level] == 1 else 's'}" for level in ("error", "note"))
        losses = f"{levels['loss']} loss{'' if levels['loss'] == 1 else 'es'} of INT8"
        print(f"{args.onnx}: {counts.replace(', ', f', {losses}, ')}")
    return FOUND if levels["error"] or levels["loss"] or (args.strict and findings) else OK


def _print_findings(findings: Sequence[Any], limit: int | None) -> None:
    """Worst first; of many nodes with one problem, the first few."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for finding in sorted(findings, key=lambda finding: ("error", "loss", "note").index(finding.level)):
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    for (level, rule), members in groups.items():
        for finding in members[:limit]:
            print(f"{level}: {finding}")
        if limit is not None and len(members) > limit:
            print(f"{level}: {len(members) - limit} more nodes like these ({rule}; --all lists them)")


def _add_simplify(parser: argparse.ArgumentParser) -> None:
    _onnx_file(parser)
    parser.add_argument("out", metavar="OUT", nargs="?", help="file to write; without it, only tell what would change")
    _inputs_option(parser, "to compare the outputs on (default: random)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="accepted share of an output's magnitude (default: 1e-4)")


def _simplify(args: argparse.Namespace) -> int:
    from .graph.reading import read_model
    from .graph.simplify import simplify

    inputs = None
    if args.inputs is not None:
        graph = read_model(args.onnx).graph
        stored = {tensor.name for tensor in graph.initializer}
        inputs = _named(_load_inputs(args.inputs), [value.name for value in graph.input if value.name not in stored])
    _show(simplify(args.onnx, args.out, inputs=inputs, tolerance=args.tolerance))
    return OK


def _add_build(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    _onnx_file(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="plan to write")
    parser.add_argument("--fp16", action=switch, help="FP16 kernels (default: yes where typing is weak)")
    parser.add_argument("--bf16", action=switch, help="BF16 kernels (default: no)")
    parser.add_argument("--int8", action=switch, help="INT8 kernels (default: if the graph holds Q/DQ)")
    parser.add_argument("--tf32", action=switch, default=True, help="round FP32 inputs to TF32 (default: yes)")
    parser.add_argument("--strongly-typed", action=switch, help="compute in the graph's types (default: by the version)")
    batch = "size of the open first dimension: one, or smallest, most frequent, largest (default: 1,8,32)"
    parser.add_argument("--batch", type=_profile_batch, default=(1, 8, 32), metavar="N|MIN,OPT,MAX", help=batch)
    shapes = "shapes of an input; one, or MIN:OPT:MAX; several by commas or by repeating the option"
    parser.add_argument("--shapes", type=_profile_shapes, action="append", default=[], metavar="NAME=1x3x224x224", help=shapes)
    parser.add_argument("--target", action="append", metavar="SM86", help="TensorRT-RTX: GPU to build for; may be repeated")
    parser.add_argument("--workspace", type=_size, metavar="4G", help="largest scratch memory of a layer")
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
    _runtime_option(parser)


def _build(args: argparse.Namespace) -> int:
    from . import tensorrt

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


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_PLANS}, or an ONNX file, which ONNX Runtime runs on the CPU")
    _inputs_option(parser, "what to compute with", required=True)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="outputs by name, as .npz")
    _runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    import io
    import zipfile

    import numpy as np

    inputs = _load_inputs(args.inputs)
    outputs = _run_onnx(args.model, inputs) if args.model.endswith(".onnx") else _run_plan(args, inputs)
    buffer = io.BytesIO()
    # What np.savez does, without its keyword arguments: an output may be called "file".
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    _write(args.output, buffer.getvalue())
    for name, array in outputs.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    return OK


def _run_onnx(path: str, inputs: Any) -> dict[str, np.ndarray]:
    import contextlib

    from .bench.targets import from_path
    from .graph.run import told

    with contextlib.ExitStack() as stack:
        session = from_path(Path(path), stack)
        names = [value.name for value in session.get_outputs()]
        feeds = _named(inputs, [value.name for value in session.get_inputs()])
        with told(f"{path}: ONNX Runtime cannot run it on {_describe(feeds)}"):
            return dict(zip(names, session.run(names, feeds), strict=True))


def _describe(feeds: dict[str, np.ndarray]) -> str:
    """Types and shapes of arrays, for messages."""
    return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())


def _run_plan(args: argparse.Namespace, inputs: Any) -> dict[str, np.ndarray]:
    from . import tensorrt

    with tensorrt.load(args.model, runtime=args.runtime) as engine:
        return engine.run(_named(inputs, [info.name for info in engine.inputs]))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    text = f"{_PLANS}, an ONNX file, or module:function, which is called and returns a PyTorch module and its example inputs"
    parser.add_argument("target", metavar="TARGET", help=text)
    parser.add_argument("--batch", type=_batches, metavar="1,2,4", help="batch sizes; several give a table")
    _inputs_option(parser, "to run on (default: random, for engines and ONNX files)")
    parser.add_argument("--warm-up", type=float, default=0.2, metavar="S", help="seconds before measuring (default: 0.2)")
    parser.add_argument("--duration", type=float, default=3.0, metavar="S", help="seconds to measure (default: 3)")
    parser.add_argument("--min-runs", type=int, default=10, metavar="N", help="runs at least (default: 10)")
    parser.add_argument("--copies", action="store_true", help="copy inputs and outputs from and to host memory each run")
    parser.add_argument("--throughput", action="store_true", help="measure throughput with one synchronisation at the end")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the run once and replay it")
    parser.add_argument("--no-spin", action="store_true", help="sleep while waiting for the GPU instead of polling")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, too")


def _bench(args: argparse.Namespace) -> int:
    from .bench import latency, sweep

    target, inputs = args.target, None
    if ":" in target and not Path(target).exists():
        made = _factory(target)
        target, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if args.inputs is not None:
        inputs = _load_inputs(args.inputs)
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
    _show(result)
    if args.json:
        result.save(args.json)
    return OK


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    text = f"{_PLANS}, an ONNX file (built by TensorRT-RTX), or what a build left: the inspector's .json or a verbose .log"
    parser.add_argument("file", metavar="FILE", help=text)
    parser.add_argument("--onnx", metavar="MODEL", help="the ONNX file of the engine: tells which sites lost INT8 and why")
    parser.add_argument("--target", default="SM86", metavar="SM86", help="GPU to build an ONNX file for (default: SM86)")
    parser.add_argument("--times", action="store_true", help="measure each layer of an engine on random inputs; needs its GPU")
    parser.add_argument("--png", metavar="OUT", help="draw the layers")
    parser.add_argument("--rules", metavar="OUT", help="write settings (YAML) that leave in float what runs in float anyway")
    _json_flag(parser)
    _runtime_option(parser)


def _inspect(args: argparse.Namespace) -> int:
    from . import tensorrt

    if not Path(args.file).is_file():
        raise QATError(f"{args.file}: no such file")
    engine: Any = args.file
    times = None
    if args.times:
        from .bench.targets import random_array

        if Path(args.file).suffix in (".onnx", ".json", ".log", ".txt"):
            raise QATError(f"--times: {args.file} is no engine. Build one with qat build, and pass its plan")
        engine = tensorrt.load(args.file, runtime=args.runtime)
        inputs = {info.name: random_array(info.dtype_name, tuple(info.opt)) for info in engine.inputs}
        times = tensorrt.layer_times(engine, inputs)
    inspection = tensorrt.inspect(engine, onnx=args.onnx, times=times, target=args.target, runtime=args.runtime)
    if args.json:
        print(inspection.to_json())
    else:
        _show(inspection)
    if args.png:
        inspection.to_png(args.png)
    if args.rules:
        import yaml

        from .support.files import write_whole

        write_whole(args.rules, yaml.safe_dump({"rules": inspection.rules}, sort_keys=False).encode())
    return FOUND if inspection.lost else OK


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _onnx_file(parser)
    parser.add_argument("--engine", metavar="PLAN", help="engine built from it")
    model = "module:function, a function of yours without arguments that returns the PyTorch model; THIS RUNS YOUR CODE"
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help=model)
    _inputs_option(parser, "to compare on (default: random, on which top-1 says little)")
    parser.add_argument("--batch", type=int, default=2, help="size of an open first dimension of random inputs (default: 2)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="accepted share of an output's magnitude (default: 0.01)")
    parser.add_argument("--fp32-onnx", metavar="MODEL", help="the same model exported in FP32, where MODEL is FP16 or BF16")
    parser.add_argument("--no-locate", action="store_true", help="do not look for the layer where a difference starts")
    _json_flag(parser)
    _runtime_option(parser)


def _verify(args: argparse.Namespace) -> int:
    import contextlib

    from .verify import verify

    if args.engine is None and args.model is None:
        raise QATError("nothing to compare with ONNX Runtime: pass --engine, --model or both")
    if args.inputs is None:
        from .graph.reading import read_model
        from .graph.samples import random_inputs

        inputs: Any = random_inputs(read_model(args.onnx), batch=args.batch)
    else:
        inputs = _load_inputs(args.inputs)
    model = None
    if args.model is not None:
        model = _factory(args.model)
        inputs = _to_tensors(inputs)
    with contextlib.ExitStack() as stack:
        engine = None
        if args.engine is not None:
            from . import tensorrt

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
        _show(report)
    return report.exit_status


def _add_report(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "folder", metavar="RUN", nargs="?", help="folder that a recipe wrote: its fine-tuned network is looked at"
    )
    model = (
        "function of yours without arguments that returns (model, batches), the model prepared and calibrated, or a dict of "
    )
    model += "arguments of qat.report.write_report; THIS RUNS YOUR CODE"
    subject.add_argument("--model", metavar="MODULE:FUNCTION", help=model)
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html, in RUN if that is given)")
    parser.add_argument("--title", help="title of the report")
    parser.add_argument("--images", type=int, metavar="N", help="RUN: validation images to look at (default: 128)")
    parser.add_argument("--data-dir", metavar="DIR", help="RUN: folder that holds the data (default: as the recipe was told)")
    parser.add_argument("--exact", action="store_true", help="measure the sensitivity of each layer instead of estimating it")
    engine = f"what to tell about INT8: {_PLANS}, or what a build left, as for qat inspect"
    parser.add_argument("--engine", metavar="FILE", help=engine)
    parser.add_argument("--onnx", metavar="MODEL", help="the ONNX file of the engine: tells which sites lost INT8 and why")
    _runtime_option(parser)


def _report(args: argparse.Namespace) -> int:
    import time

    from .report import write_report

    start = time.perf_counter()
    if args.onnx is not None and args.engine is None:
        raise QATError("--onnx: is the file that an engine was built from. Pass --engine, too")
    if args.folder is not None:
        subject, out = _recipe_subject(args), args.out or str(Path(args.folder) / "report.html")
    else:
        if args.images is not None or args.data_dir is not None:
            raise QATError("--images, --data-dir: are for the folder of a recipe. Your function chooses the batches")
        subject, out = _own_subject(args.model), args.out or "report.html"
    if args.title is not None:
        subject["title"] = args.title
    if args.exact:
        subject["exact"] = True
    if args.engine is not None:
        from . import tensorrt

        if not Path(args.engine).is_file():
            raise QATError(f"--engine {args.engine}: no such file")
        subject["inspection"] = tensorrt.inspect(args.engine, onnx=args.onnx, runtime=args.runtime)
    model, batches = subject.pop("model"), subject.pop("batches")
    path = write_report(model, batches, out, **subject)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - start:.1f} s")
    return OK


def _recipe_subject(args: argparse.Namespace) -> dict[str, Any]:
    from .recipes.saved import open_run

    options = {} if args.images is None else {"images": args.images}
    found = open_run(args.folder, data_dir=args.data_dir, **options)
    return {
        "model": found.model,
        "batches": found.batches,
        "title": found.title,
        "results": found.results,
        "placement": found.placement,
        "baseline_state": found.baseline_state,
        "baseline_name": found.baseline_name,
    }


def _own_subject(spec: str) -> dict[str, Any]:
    import inspect

    from .report import write_report

    made = _factory(spec)
    if isinstance(made, tuple) and len(made) == 2:
        made = {"model": made[0], "batches": made[1]}
    known = set(inspect.signature(write_report).parameters) - {"path"}
    if not isinstance(made, dict) or not {"model", "batches"} <= set(made) or not set(made) <= known:
        given = f"a dict of {', '.join(map(str, made))}" if isinstance(made, dict) else f"a {type(made).__name__}"
        raise QATError(
            f"--model {spec}: returned {given}; return (model, batches), or a dict of model, batches and, as you like, "
            f"{', '.join(sorted(known - {'model', 'batches'}))}"
        )
    return {"title": spec, **made}


def _to_tensors(inputs: Any) -> Any:
    import torch

    if isinstance(inputs, dict):
        return {name: torch.from_numpy(array) for name, array in inputs.items()}
    return torch.from_numpy(inputs)


if __name__ == "__main__":
    sys.exit(main())
