"""``qat check``: find what TensorRT would refuse or not run in INT8."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .arguments import compute_capability, json_flag, onnx_file
from .command import FOUND, OK, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    onnx_file(parser)
    parser.add_argument("--target", choices=("8.6", "10", "11", "rtx"), help="version of TensorRT (default: rules of all)")
    parser.add_argument("--sm", type=compute_capability, help="compute capability of the GPU, e.g. SM86")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for notes, too")
    parser.add_argument("--all", action="store_true", help="list every node, however many break one rule")
    json_flag(parser)


def _run(args: argparse.Namespace) -> int:
    from ..graph.check import check_onnx

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


COMMAND = Command(
    "check",
    "find what TensorRT would refuse or not run in INT8",
    "model.onnx --target 8.6",
    arguments=_add_arguments,
    run=_run,
)
