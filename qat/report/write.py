"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import QATError
from ..support.files import check_target, write_text
from ..support.version import __version__
from . import charts, rows
from .blocks import Structure, joined
from .findings import Findings, look_at
from .layout import lay_out
from .rows import ResultTable

if TYPE_CHECKING:
    from ..preparation import Report
    from ..tensorrt import Inspection

_MISSING = "{}: is not installed, and the report needs it. pip install -e '.[report]'"
_ONE = {"add": "Add", "pool": "pooling"}


def write_report(
    model: nn.Module,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    title: str = "Quantization report",
    results: Mapping[str, Mapping[str, Any]] | Sequence[ResultTable] = (),
    baseline_state: Mapping[str, Tensor] | None = None,
    baseline_name: str = "an earlier state",
    inspection: Inspection | None = None,
    placement: Report | None = None,
    exact: bool = False,
) -> Path:
    """Analyse ``model`` and write all that was found into one HTML file.

    The file holds its plots, style and scripts: it loads nothing, from anywhere. It tells where the sites are, the error of
    each layer, a ranking by sensitivity, histograms with the chosen ranges, what is clipped, and what the arguments add.

    Costs about 15 evaluations of the model, and 4 backward passes, for each batch; a few dozen samples are enough for a look.

    Args:
        model: Prepared and calibrated. Afterwards it is what it was.
        batches: As for ``qat.calibrate``: tensors, mappings, or tuples and lists ``(inputs, target, ...)``. All are held in
            memory.
        path: The file; it is replaced as a whole.
        title: Of the report.
        results: Accuracy, latency, size and the like, as rows of named columns: ``{"PTQ": {"top-1 %": 76.1, "ms": 0.8}}``; or
            several tables.
        baseline_state: ``state_dict`` of an earlier state of the model, such as before training, to tell what changed.
        baseline_name: What that state is called.
        inspection: Of the engine that was built from the model: ``qat.tensorrt.inspect(...)``.
        placement: What ``qat.prepare`` returned: adds what was left in float, and why.
        exact: Measure the sensitivity of each layer (about half an evaluation a layer) instead of estimating it.

    Returns:
        The path.

    Raises:
        QATError: If no site quantizes, the batches are empty, the folder is missing, or jinja2 or
            plotly is not installed. Nothing is written then.
    """
    target = Path(path)
    # Before the analyses, which take a while.
    check_target(target, text=True)
    tables = _tables(results)
    environment, plotly = _environment(), _plotly()
    found = look_at(model, batches, exact=exact, baseline_state=baseline_state)
    script = _read("report.js")
    text = environment.from_string(_read("report.html")).render(
        title=title,
        style=_trusted(_read("report.css")),
        plotly=_trusted(plotly),
        script=_trusted(script),
        script_hashes=_trusted(" ".join(f"'sha256-{_digest(part)}'" for part in (plotly, script))),
        results=rows.result_tables(tables),
        changes=None if found.changes is None else rows.change_rows(found.changes),
        baseline=baseline_name,
        engine=None if inspection is None else rows.engine_rows(inspection),
        left=() if placement is None else placement.left,
        sensitivity_note=_ranking_note(found),
        **_content(found, inspection),
        **_structure(found.structure),
        **_summary(found, bool(tables), inspection),
    )
    write_text(target, text)
    return target


def _tables(results: Any) -> list[ResultTable]:
    if isinstance(results, Mapping):
        results = [ResultTable(results)] if results else []
    tables = list(results) if isinstance(results, Sequence) else [results]
    for table in tables:
        rows_are_named = isinstance(table, ResultTable) and isinstance(table.rows, Mapping)
        if not rows_are_named or not all(isinstance(row, Mapping) for row in table.rows.values()):
            raise QATError("results: must be rows of named columns, such as {'PTQ': {'top-1 %': 76.1}}, or ResultTables")
    return tables


def _content(found: Findings, inspection: Inspection | None) -> dict[str, Any]:
    """Tables and plots."""
    activations = rows.activation_rows(found.ranges, found.clipped)
    weights = rows.weight_rows(found.weights, found.clipped)
    figures: dict[str, Any] = {
        "errors": charts.error_chart(found.errors),
        "sensitivity": charts.sensitivity_chart(found.sensitivity),
        "histogram-activations": charts.histogram_chart("magnitude |x|"),
        "histogram-weights": charts.histogram_chart("value"),
    }
    if found.changes is not None and found.changes.weights:
        figures["changes"] = charts.change_chart(found.changes)
    if inspection is not None:
        figures["coverage"] = charts.coverage_chart(rows.engine_counts(inspection))
    histograms = {"activations": charts.activation_data(found.ranges), "weights": charts.weight_data(found.weights)}
    return {
        "errors": rows.error_rows(found.errors),
        "sensitivity": rows.sensitivity_rows(found.sensitivity),
        "activations": activations,
        "weights": weights,
        "options": {"activations": [row.path for row in activations], "weights": [row.path for row in weights]},
        "data": {"charts": figures, "histograms": histograms},
    }


def _structure(found: Structure) -> dict[str, Any]:
    """Drawings of the blocks, each with a letter, and the letters in the order in which they run."""
    blocks = [
        {
            "letter": _letter(number),
            "name": kind.block.name,
            "count": len(kind.paths),
            "paths": joined([path for path in kind.paths if path]),
            "drawing": lay_out(kind.block),
        }
        for number, kind in enumerate(found.kinds)
    ]
    steps: list[tuple[int, list[str]]] = []
    for number, path in found.order:
        if steps and steps[-1][0] == number:
            steps[-1][1].append(path)
        else:
            steps.append((number, [path]))
    order = [
        {
            "number": number,
            "letter": _letter(number),
            "text": joined(paths) if all(paths) else found.kinds[number].block.name,
        }
        for number, paths in steps
    ]
    return {"blocks": blocks, "order": order}


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ...

    Example:
        >>> _letter(0), _letter(27)
        ('A', 'AB')
    """
    rest, last = divmod(number, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("A") + last)


def _summary(found: Findings, has_results: bool, inspection: Inspection | None) -> dict[str, Any]:
    """The top of the page and its end."""
    layers = found.errors.layers
    kinds = Counter(layer.kind for layer in layers)
    worst = min(layers, key=lambda layer: layer.sqnr)
    first = found.sensitivity.layers[0]
    activations = {site.path: site for site in found.ranges.sites}
    most = max(activations, key=lambda path: found.clipped.rates.get(path, 0.0), default=None)
    kinds_text = ", ".join(f"{count} {_ONE.get(kind, kind)}{'' if count == 1 else 's'}" for kind, count in kinds.items())
    cards = [
        {
            "name": "SQNR of the output",
            "value": f"{charts.number(found.errors.output_sqnr, '.1f')} dB",
            "note": f"cosine {charts.number(found.errors.output_cosine, '.5f')}; higher is better",
        },
        {"name": "Quantized layers", "value": str(len(layers)), "note": kinds_text},
        {"name": "Lowest SQNR alone", "value": f"{charts.number(worst.sqnr, '.1f')} dB", "note": worst.path},
        {"name": "Most sensitive", "value": charts.number(first.change, ".2e"), "note": first.path},
    ]
    if most is not None:
        rate = found.clipped.rates.get(most, 0.0)
        cards.append({"name": "Largest clip rate", "value": f"{rate:.3%}", "note": most})
    sections = [
        *([("results", "Results")] if has_results else []),
        ("structure", "Structure"),
        ("errors", "Errors"),
        ("sensitivity", "Sensitivity"),
        ("activations", "Activations"),
        ("weights", "Weights"),
        *([("changes", "Training")] if found.changes is not None else []),
        *([("engine", "Engine")] if inspection is not None else []),
    ]
    sites = f"{len(found.ranges.sites)} activation and {len(found.weights)} weight quantizers"
    lead = f"{len(layers)} quantized layers with {sites}, looked at on {found.samples} samples."
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    footer = f"Made {made} by torch-qat {__version__} with PyTorch {torch.__version__}. Analyses: {times}."
    return {"cards": cards, "sections": sections, "lead": lead, "footer": footer}


def _ranking_note(found: Findings) -> str:
    if found.sensitivity.exact:
        return "Measured, each layer by a complete evaluation."
    return "Estimated to first order from a few gradients: compare neighbours in the ranking exactly before you rely on them."


def _ending(text: str, length: int) -> str:
    """The last ``length`` characters: the end of a path tells more than its start."""
    return text if len(text) <= length else "…" + text[1 - length :]


def _folding(text: str) -> Any:
    """``text``, escaped, that may break behind each dot and underscore of a path."""
    from markupsafe import Markup, escape

    return Markup("").join(escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[._/])", text))


def _environment() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise QATError(_MISSING.format("jinja2")) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(ending=_ending, folding=_folding)
    return environment


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise QATError(_MISSING.format("plotly")) from error
    # Strings in it may look like the end of the element that holds it.
    return re.sub(r"</(?=script)", r"<\\/", str(get_plotlyjs()), flags=re.IGNORECASE)


def _trusted(text: str) -> Any:
    """Our own text, which is not to be escaped."""
    from markupsafe import Markup

    return Markup(text)


def _digest(script: str) -> str:
    """As a content security policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _read(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
