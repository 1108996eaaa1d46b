"""``qat report``: write one HTML file about a quantized model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import QATError
from .arguments import PLANS, runtime_option
from .command import OK, Command
from .inputs import call_factory


def _add_arguments(parser: argparse.ArgumentParser) -> None:
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
    engine = f"what to tell about INT8: {PLANS}, or what a build left, as for qat inspect"
    parser.add_argument("--engine", metavar="FILE", help=engine)
    parser.add_argument("--onnx", metavar="MODEL", help="the ONNX file of the engine: tells which sites lost INT8 and why")
    runtime_option(parser)


def _run(args: argparse.Namespace) -> int:
    import time

    from ..support.files import check_target

    start = time.perf_counter()
    if args.onnx is not None and args.engine is None:
        raise QATError("--onnx: is the file that an engine was built from. Pass --engine, too")
    if args.out:
        check_target(args.out, text=True)
    from ..report import write_report

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
        from .. import tensorrt

        if not Path(args.engine).is_file():
            raise QATError(f"--engine {args.engine}: no such file")
        subject["inspection"] = tensorrt.inspect(args.engine, onnx=args.onnx, runtime=args.runtime)
    model, batches = subject.pop("model"), subject.pop("batches")
    path = write_report(model, batches, out, **subject)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - start:.1f} s")
    return OK


def _recipe_subject(args: argparse.Namespace) -> dict[str, Any]:
    from ..recipes.saved import open_run

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

    from ..report import write_report

    made = call_factory(spec)
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


COMMAND = Command(
    "report",
    "write one HTML file about a quantized model: errors, sensitivity, ranges, structure",
    "runs/resnet --out resnet.html",
    "runs/resnet --engine qat.plan --onnx runs/resnet/qat.onnx",
    "--model mymodels:quantized   (runs your code: returns a calibrated model and batches)",
    arguments=_add_arguments,
    run=_run,
)
