"""What an engine runs in INT8 and what it doesn't: the result of :func:`qat.tensorrt.inspect`."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layers import EngineLayer
from .picture import draw

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_PLURAL = {"conv": "convs", "linear": "linears", "add": "Adds", "gate": "gates", "pool": "poolings"}


@dataclass(frozen=True)
class InspectedNode:
    """An ONNX node that the graph wants in INT8, or an Add, gate or pooling, and what became of it.

    Attributes:
        node: Name of the ONNX node.
        op: Its operator.
        group: ``"conv"``, ``"linear"`` (Gemm and MatMul), ``"add"``, ``"gate"`` (a product of two) or ``"pool"``.
        state: ``"int8"``, ``"float"``, ``"fused"`` (an Add, gate or pooling that costs no kernel of its own), ``"own"`` (an Add
            that does) or ``"unknown"``.
        layer: Index of its layer, ``None`` if no layer names it.
        reason: Why it does not run in INT8, or is not fused; ``None`` if it does.
    """

    node: str
    op: str
    group: str
    state: str
    layer: int | None
    reason: str | None

    @property
    def is_good(self) -> bool:
        """Whether it runs in INT8 or is fused."""
        return self.state in ("int8", "fused")


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found; prints as a table.

    Attributes:
        layers: In the order in which they run.
        sites: Nodes of the ONNX graph, ``None`` if it was not at hand.
        io: Names of the engine's inputs and outputs.
        target: What it was built for, such as ``"SM86"``; ``None`` for the local GPU.
        runtime: Name and version of TensorRT, as far as known.
    """

    layers: tuple[EngineLayer, ...]
    sites: tuple[InspectedNode, ...] | None
    io: frozenset[str] = frozenset()
    target: str | None = None
    runtime: str = ""

    @property
    def coverage(self) -> str:
        """One line, such as "20 of 20 quantized convs run in INT8, 8 of 8 Adds fused"."""
        if self.sites is None:
            products = [layer for layer in self.layers if layer.is_mac]
            count = sum(layer.is_int8 for layer in products)
            regions = sum(layer.is_region for layer in self.layers)
            inside = f", {regions} Myelin region{'s' if regions > 1 else ''} not listed" if regions else ""
            return f"{count} of {len(products)} kernels that multiply run in INT8{inside} (no ONNX graph to compare with)"
        parts = []
        for group in _PLURAL:
            members = [site for site in self.sites if site.group == group]
            if not members:
                continue
            good, unknown = sum(site.is_good for site in members), sum(site.state == "unknown" for site in members)
            text = (
                f"{good} of {len(members)} "
                + {
                    "conv": "quantized convs run in INT8",
                    "linear": "quantized linears run in INT8",
                    "add": "Adds fused",
                    "gate": "gates in INT8 or fused",
                    "pool": "poolings in INT8 or fused",
                }[group]
            )
            parts.append(text + (f" ({unknown} unknown)" if unknown else ""))
        return ", ".join(parts) or "the graph has no Q/DQ, so nothing was to run in INT8"

    @property
    def lost(self) -> tuple[InspectedNode, ...]:
        """Convolutions and matrix products that the graph wants in INT8 and that don't run so, or can't be told."""
        return tuple(site for site in self.sites or () if site.group in ("conv", "linear") and not site.is_good)

    @property
    def rules(self) -> list[dict[str, Any]]:
        """What runs in float although quantized, as rules for ``qat.QuantConfig(rules=...)`` that leave it in float.

        Its Q/DQ costs accuracy and conversions around it, and gains nothing on this GPU with this version.
        """
        # Nodes are named <module path>/<operator>.
        paths = dict.fromkeys(site.node.rpartition("/")[0] for site in self.lost if site.state == "float")
        return [{"match": glob.escape(path), "quantize": False} for path in paths if path]

    @property
    def reformats(self) -> tuple[EngineLayer, ...]:
        """Layers that only copy, convert or pad."""
        return tuple(layer for layer in self.layers if layer.is_reformat)

    @property
    def float_outputs(self) -> tuple[EngineLayer, ...]:
        """INT8 convolutions and matrix products that write a float tensor which another layer reads.

        On TensorRT-RTX these are all: a generated kernel behind each applies scales, activation and the next Q.
        """
        return tuple(
            layer
            for layer in self.layers
            if layer.is_int8 and layer.output_precision != "INT8" and not any(out.name in self.io for out in layer.outputs)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "runtime": self.runtime,
            "target": self.target,
            "coverage": self.coverage,
            "rules": self.rules,
            "reformats": len(self.reformats),
            "float_outputs": len(self.float_outputs),
            "sites": None if self.sites is None else [asdict(site) for site in self.sites],
            "layers": [
                {
                    **asdict(layer),
                    "inputs": [tensor._asdict() for tensor in layer.inputs],
                    "outputs": [tensor._asdict() for tensor in layer.outputs],
                    "precision": layer.precision,
                    "is_int8": layer.is_int8,
                }
                for layer in self.layers
            ],
            "io": sorted(self.io),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_png(self, path: str | os.PathLike[str]) -> Path:
        """Draw the layers in their order into a file; needs matplotlib. See :func:`qat.tensorrt.picture.draw`."""
        return draw(self, path)

    def __str__(self) -> str:
        rows = [self._columns(), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*table, "", *self._summary()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left")
        for column in self._columns():
            table.add_column(
                column, justify="right" if column in ("#", "ms") else "left", overflow="fold", no_wrap=column != "ONNX nodes"
            )
        for row, layer in zip(self._rows(), self.layers, strict=True):
            style = "green" if layer.is_int8 else "dim" if layer.is_reformat else ""
            # Not markup: names hold brackets.
            table.add_row(*(Text(cell) for cell in row), style=style)
        yield table
        for line in self._summary():
            yield Text(line)

    def _title(self) -> str:
        return ", ".join(part for part in (self.runtime, self.target, f"{len(self.layers)} layers") if part)

    def _columns(self) -> list[str]:
        return ["#", "kind", "in", "out", *(["ms"] if self._timed else []), "tactic", "ONNX nodes"]

    @property
    def _timed(self) -> bool:
        return any(layer.time_ms is not None for layer in self.layers)

    def _rows(self) -> Iterator[list[str]]:
        for i, layer in enumerate(self.layers):
            into = _types(tensor.dtype for tensor in layer.inputs)
            if layer.is_mac and layer.weights and len(layer.inputs) == 1:
                into += f" x {layer.weights}"
            yield [
                str(i),
                layer.kind,
                into,
                _types(tensor.dtype for tensor in layer.outputs),
                *([f"{layer.time_ms or 0.0:.4f}"] if self._timed else []),
                shorten(layer.tactic, 32),
                _nodes(layer),
            ]

    def _summary(self) -> Iterator[str]:
        yield self._title()
        yield self.coverage
        quantizing = sum(layer.kind == "Reformat" and not layer.name.startswith("Reformatting") for layer in self.reformats)
        reformat_time = f", {sum(layer.time_ms or 0.0 for layer in self.reformats):.4f} ms" if self._timed else ""
        own = f" ({quantizing} of them quantize or dequantize)" if quantizing else ""
        yield f"{len(self.reformats)} reformat layers{own}{reformat_time}"
        if any(layer.kind == "correlation" for layer in self.layers):
            yield (
                f"{len(self.float_outputs)} INT8 kernels write float: TensorRT-RTX finishes each in a generated kernel, "
                "and an Add counts as fused if that kernel computes it"
            )
        else:
            yield f"{len(self.float_outputs)} INT8 kernels write float"
        for site in self.sites or ():
            if site.reason is not None:
                yield f"{site.node} ({site.op}): {site.reason}"
        if self.rules:
            count = len(self.rules)
            what = "1 quantized layer runs" if count == 1 else f"{count} quantized layers run"
            yield f"{what} in float here: for rules that leave them so, see Inspection.rules or qat inspect --rules"


def _types(dtypes: Iterable[str]) -> str:
    """Types with their number where it is above one: ``INT8, 2 FP16``."""
    counts = Counter(dtype or "?" for dtype in dtypes)
    return ", ".join(f"{count} {dtype}" if count > 1 else dtype for dtype, count in counts.items())


def _nodes(layer: EngineLayer) -> str:
    """The nodes without those of Q/DQ; these where there are no others."""
    names = [name for name in layer.onnx_nodes if not name.endswith(("QuantizeLinear", "DequantizeLinear"))]
    if layer.is_reformat and not layer.onnx_nodes:
        return shorten(layer.name, 100)
    return shorten(" + ".join(names or layer.onnx_nodes), 160) or shorten(layer.name, 100)


def shorten(text: str, length: int) -> str:
    """A text without its middle, if it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"
