"""``simplify``: onnxslim on a Q/DQ graph, and the proof that nothing was lost.

onnxslim was chosen over onnxscript's optimizer because it removes more; on the models of this project's tests both keep Q/DQ,
node names and metadata, and the outputs to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto

from ..errors import QATError
from .check import check_onnx
from .graph import reads
from .reading import load_model, read_model
from .run import run_model
from .samples import random_inputs
from .writing import check_model_target, model_draft

if TYPE_CHECKING:
    from rich.table import Table

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_SITES = "qat.sites"
# What onnxslim's passes raise on graphs that they don't foresee.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Simplification:
    """What :func:`simplify` did; prints as a table.

    Attributes:
        path: The file that was read.
        out: The file that was written, if any.
        before: Number of nodes by operator.
        after: The same, simplified.
        merged: Q and DQ nodes that are gone, and the equal one that stands for each; ``None`` for one that nobody read.
        differences: Largest absolute difference of each output, as a share of its largest magnitude; 0 if equal to the bit.
    """

    path: str
    out: str | None
    before: Mapping[str, int]
    after: Mapping[str, int]
    merged: Mapping[str, str | None]
    differences: Mapping[str, float]

    @property
    def is_exact(self) -> bool:
        """Whether the outputs are equal to the bit."""
        return not any(self.differences.values())

    def _rows(self) -> Iterator[tuple[str, int, int]]:
        for operator in sorted({*self.before, *self.after}):
            yield operator, self.before.get(operator, 0), self.after.get(operator, 0)
        yield "all", sum(self.before.values()), sum(self.after.values())

    def _summary(self) -> Iterator[str]:
        worst = max(self.differences.values(), default=0.0)
        yield "outputs: equal to the bit" if self.is_exact else f"outputs: differ by up to {worst:.1e} of their magnitude"
        if self.merged:
            yield f"{len(self.merged)} Q/DQ nodes merged into equal ones or unused"
        yield "nothing written" if self.out is None else f"written: {self.out}"

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"Operators of {Path(self.path).name}", caption="\n".join(self._summary()))
        for column in ("operator", "before", "after"):
            table.add_column(column, justify="left" if column == "operator" else "right")
        for operator, before, after in self._rows():
            if operator == "all":
                table.add_section()
            table.add_row(operator, str(before), str(after), style=None if before == after else "bold green")
        return table

    def __str__(self) -> str:
        lines = [f"{'operator':<24}{'before':>8}{'after':>8}"]
        lines += [f"{operator:<24}{before:>8}{after:>8}" for operator, before, after in self._rows()]
        return "\n".join([*lines, *self._summary()])


def simplify(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    tolerance: float = 1e-4,
) -> Simplification:
    """Simplify an ONNX file without touching its quantization.

    The result has the same Q/DQ pairs but for those that were equal, computes the same through ONNX Runtime and breaks no rule
    of :func:`qat.export.check_onnx` that the original keeps, or nothing is written. Metadata and the names of sites are kept,
    so that :func:`qat.parity` works on the result.

    Args:
        path: The file to read.
        out: The file to write, which may be ``path``; ``None`` only tells what would change.
        inputs: Arrays by input name to compare the outputs on; by default random ones.
        tolerance: Largest difference of an output that is accepted, as a share of its largest magnitude. Folding batch norms
            into float convolutions changes the order of roundings.

    Returns:
        Operators before and after, and how the outputs compare.

    Raises:
        QATError: If the file cannot be read, simplified or run, or the result fails a check.

    Example:
        >>> import tempfile, torch, qat
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1)).eval()
        >>> images = torch.ones(2, 3, 8, 8)
        >>> _ = qat.prepare(model), qat.calibrate(model, [images], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = simplify(qat.export_onnx(model, f"{folder}/model.onnx", images))
        >>> result.is_exact, result.after["QuantizeLinear"]
        (True, 2)
    """
    source = Path(path)
    external = any(tensor.data_location == TensorProto.EXTERNAL for tensor in read_model(source).graph.initializer)
    if out is not None:
        check_model_target(out, external_data=external)
    findings = check_onnx(source)
    original = load_model(source)
    _name_nodes(original)
    slimmed = _slim(original, source)
    merged = _explain(original, slimmed, source)
    _keep_metadata(original, slimmed, merged)
    with contextlib.ExitStack() as stack:
        target = out
        if target is None:
            target = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.onnx")
        file = stack.enter_context(model_draft(slimmed, target, external_data=external))
        _refuse_worse(source, findings, file)
        feeds = dict(random_inputs(original) if inputs is None else inputs)
        differences = _compare(source, file, feeds)
        worst = max(differences, key=lambda key: differences[key], default=None)
        if worst is not None and not differences[worst] <= tolerance:
            raise QATError(
                f"{str(source)!r}: simplified, output {worst!r} differs by {differences[worst]:.1e} of its magnitude "
                f"(tolerance={tolerance}). Nothing is written; use the file as it is"
            )
    before, after = (Counter(node.op_type for node in model.graph.node) for model in (original, slimmed))
    return Simplification(str(source), None if out is None else str(Path(out)), before, after, merged, differences)


def _name_nodes(model: ModelProto) -> None:
    """Give nodes without a name of their own one, so that they can be told apart afterwards."""
    taken = {node.name for node in model.graph.node}
    seen = {""}
    for i, node in enumerate(model.graph.node):
        if node.name in seen:
            name = f"{node.op_type}_{i}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def _slim(model: ModelProto, source: Path) -> ModelProto:
    import onnxslim

    copy = ModelProto()
    copy.CopyFrom(model)
    try:
        slimmed = onnxslim.slim(copy)
    except _FAILURES as error:
        raise QATError(f"{str(source)!r}: onnxslim cannot simplify it ({error}). Use the file as it is") from error
    for kind in ("input", "output"):
        names = [[value.name for value in getattr(m.graph, kind)] for m in (model, slimmed)]
        if names[0] != names[1]:
            raise QATError(
                f"{str(source)!r}: onnxslim changed the {kind}s from {names[0]} to {names[1]}. Use the file as it is"
            )
    return slimmed


def _explain(original: ModelProto, slimmed: ModelProto, source: Path) -> dict[str, str | None]:
    """The Q and DQ nodes that are gone, each with the equal one that is left; ``None`` for one that no output needs.

    Raises:
        QATError: If a pair is gone without an equal one.
    """
    left = {node.name for node in slimmed.graph.node if node.op_type in _QDQ}
    numbers = _value_numbers(original)
    survivors = {numbers[node.output[0]]: node.name for node in original.graph.node if node.name in left}
    live = _live(original)
    gone: dict[str, str | None] = {}
    for node in original.graph.node:
        if node.op_type not in _QDQ or node.name in left:
            continue
        gone[node.name] = survivors.get(numbers[node.output[0]])
        if gone[node.name] is None and node.name in live:
            raise QATError(
                f"{str(source)!r}: simplified, {node.name} ({node.op_type}) is gone without an equal one. Nothing is written; "
                "use the file as it is"
            )
    return gone


def _value_numbers(model: ModelProto) -> dict[str, str]:
    """Equal texts for tensors that are computed in the same way from the same values."""
    numbers: dict[str, str] = {}
    for tensor in model.graph.initializer:
        bare = TensorProto()
        bare.CopyFrom(tensor)
        bare.name = ""
        numbers[tensor.name] = hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
    for node in model.graph.node:
        attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
        key = repr((node.domain, node.op_type, attributes, [numbers.get(name, name) for name in node.input]))
        digest = hashlib.sha256(key.encode()).hexdigest()
        numbers.update({output: f"{digest}/{i}" for i, output in enumerate(node.output)})
    return numbers


def _live(model: ModelProto) -> set[str]:
    """Names of the nodes that an output needs."""
    needed = {value.name for value in model.graph.output}
    live: set[str] = set()
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            live.add(node.name)
            needed.update(reads(node))
    return live


def _keep_metadata(original: ModelProto, slimmed: ModelProto, merged: Mapping[str, str | None]) -> None:
    """The entries of the original; sites whose pair was merged point to the one that is left."""
    del slimmed.metadata_props[:]
    slimmed.metadata_props.extend(original.metadata_props)
    slimmed.producer_name, slimmed.producer_version = original.producer_name, original.producer_version
    for entry in slimmed.metadata_props:
        if entry.key == _SITES and any(merged.values()):
            try:
                sites = json.loads(entry.value)
                entry.value = json.dumps({site: [merged.get(n) or n for n in nodes] for site, nodes in sites.items()})
            except (ValueError, AttributeError, TypeError) as error:
                raise QATError(f"its metadata entry {_SITES} is no table of sites: {error}. Export it again") from error


def _refuse_worse(source: Path, findings: list[Any], file: Path) -> None:
    """Neither more errors nor more losses of any rule than before."""
    before = Counter((finding.level, finding.rule) for finding in findings)
    after = check_onnx(file)
    for (level, rule), number in Counter((finding.level, finding.rule) for finding in after).items():
        if level != "note" and number > before[level, rule]:
            example = next(finding for finding in after if (finding.level, finding.rule) == (level, rule))
            raise QATError(
                f"{str(source)!r}: simplified, it breaks a rule. {example} Nothing is written; use the file as it is"
            )


def _compare(source: Path, file: Path, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    reference, result = (_run(path, feeds, source) for path in (source, file))
    return {name: _difference(reference[name], result[name]) for name in reference}


def _run(path: Path, feeds: dict[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    blame = f"{str(source)!r}: ONNX Runtime cannot run it, so it cannot be compared"
    # Its own rewrites would blur the comparison.
    return run_model(path, feeds, blame=blame, remedy=". Check inputs")


def _difference(reference: np.ndarray, result: np.ndarray) -> float:
    """Largest absolute difference as a share of the largest magnitude; infinite if shapes or NaN differ."""
    if reference.shape != result.shape or reference.dtype != result.dtype:
        return float("inf")
    if reference.tobytes() == result.tobytes() or np.array_equal(reference, result):
        return 0.0
    if not np.issubdtype(reference.dtype, np.number):
        return float("inf")
    a, b = reference.astype(np.float64), result.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    return float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), np.finfo(np.float32).tiny))
