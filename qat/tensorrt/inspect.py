"""What an engine runs in INT8, what it doesn't, and why."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QATError
from ..graph.wishes import Graph, Wish, between
from .layers import EngineLayer, Listing, read_json, read_log, with_times

if TYPE_CHECKING:
    import onnx
    from rich.console import Console, ConsoleOptions, RenderResult

_PLURAL = {"conv": "convs", "linear": "linears", "add": "Adds", "gate": "gates", "pool": "poolings"}


@dataclass(frozen=True)
class Site:
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
    sites: tuple[Site, ...] | None
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
    def lost(self) -> tuple[Site, ...]:
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
        from .picture import draw

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
                _shorten(layer.tactic, 32),
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


def inspect(
    engine: Any,
    *,
    onnx: onnx.ModelProto | bytes | str | os.PathLike[str] | None = None,
    times: Mapping[str, float] | None = None,
    target: str = "SM86",
    runtime: Any = None,
) -> Inspection:
    """Tell what of a quantized model runs in INT8, layer by layer.

    Args:
        engine: An engine; the path of an ONNX file, or its model or bytes, which TensorRT-RTX then builds for ``target``
            (no GPU needed); the path of an engine; or the path of what a build left: the inspector's ``.json``, or the
            verbose log as ``.log`` or ``.txt``.
        onnx: The graph, to compare with; by default the file that the engine was built from. Needs the onnx package;
            without the graph, the layers alone are told.
        times: Milliseconds by layer name, from a profiler.
        target: Compute capability to build an ONNX file for, such as ``"SM86"``.
        runtime: What to build or load with; by default TensorRT-RTX for an ONNX file.

    Returns:
        Layers, coverage, and a reason for every node that lost INT8.

    Raises:
        QATError: If nothing lists the layers, or the build fails.
    """
    listing, graph, built_for, title = _read(engine, onnx, target, runtime)
    layers = listing.layers if times is None else with_times(listing.layers, times)
    sites = None if graph is None else tuple(_sites(graph, layers, built_for))
    return Inspection(layers, sites, listing.io, built_for, title)


def _read(engine: Any, model: Any, target: str, runtime: Any) -> tuple[Listing, Graph | None, str | None, str]:
    """Layers, graph, target and runtime of whatever was passed."""
    if hasattr(engine, "SerializeToString"):
        model = engine if model is None else model
        engine = engine.SerializeToString()
    if isinstance(engine, (str, os.PathLike)):
        path = Path(engine)
        if path.suffix in (".json", ".log", ".txt"):
            listing = _read_report(path)
            return listing, None if model is None else _graph(model), None, ""
        if path.suffix != ".onnx":
            from .engine import load

            engine = load(path, runtime=runtime)
    built_for = None
    if isinstance(engine, (str, bytes, os.PathLike)):
        from .build import build

        source = engine
        # Graphs with broken rules are what this is for: no check before.
        engine = build(source, targets=(target,), runtime=runtime or "tensorrt_rtx", check=False, progress=False)
        model = source if model is None else model
        built_for = target
    if not hasattr(engine, "log") or not hasattr(engine, "runtime"):
        raise QATError(f"engine: expected an Engine, an ONNX model or a path, got {type(engine).__name__}")
    targets = tuple(getattr(engine, "targets", ()) or ())
    built_for = built_for or (str(targets[0]) if len(targets) == 1 else None)
    if model is None:
        stored = getattr(engine, "onnx_path", None)
        graph = _graph(stored) if stored is not None and Path(stored).is_file() and _onnx_module() is not None else None
    else:
        graph = _graph(model)
    return _layers_of(engine), graph, built_for, str(getattr(engine.runtime, "title", ""))


def _layers_of(engine: Any) -> Listing:
    messages = [message for _, message in engine.log]
    # TensorRT-RTX's log is of the engine that is on disk; its inspector would need the target's GPU.
    if messages and getattr(engine.runtime, "is_rtx", False):
        return read_log(messages)
    try:
        information = engine.layer_information
        if information is not None:
            return read_json(information)
    except QATError:
        # No GPU, or an inspector that tells names alone: the log of the build tells as much.
        if not messages:
            raise
    if not messages:
        raise QATError("engine: it was loaded, not built here, and its layers can't be read without its GPU. Inspect the ONNX")
    return read_log(messages)


def _read_report(path: Path) -> Listing:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise QATError(f"{path}: {error.strerror}. Pass an existing file") from error
    return read_json(text) if path.suffix == ".json" else read_log([text.replace("\r\n", "\n")])


def _onnx_module() -> Any | None:
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    return onnx


def _graph(model: Any) -> Graph:
    if hasattr(model, "graph"):
        return Graph(model)
    module = _onnx_module()
    if module is None:
        raise QATError(
            "onnx: reading the graph needs the onnx package: `pip install onnx`. Without `onnx`, layers are told alone"
        )
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if isinstance(model, bytes):
            return Graph(module.load_model_from_string(model))
        # Weights in other files are not needed.
        return Graph(module.load(os.fspath(model), load_external_data=False))
    except (DecodeError, OSError) as error:
        name = "the bytes" if isinstance(model, bytes) else os.fspath(model)
        raise QATError(f"onnx: {name}: no ONNX model ({error}). Pass what the engine was built from") from error


# What became of each node


def _sites(graph: Graph, layers: tuple[EngineLayer, ...], target: str | None) -> Iterator[Site]:
    if not graph.is_quantized:
        return
    where = _Where(graph, layers)
    for wish in graph.wishes():
        if wish.group == "add":
            yield _add_site(wish, where)
        elif wish.group in ("gate", "pool"):
            yield _other_site(wish, where)
        else:
            yield _product_site(wish, where, target)


class _Where:
    """Which layers compute which nodes."""

    def __init__(self, graph: Graph, layers: tuple[EngineLayer, ...]) -> None:
        self.layers = layers
        self.by_node: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            if not layer.is_region:
                for name in layer.onnx_nodes:
                    self.by_node.setdefault(name, []).append(i)
        self.products = {out.name for layer in layers if layer.is_mac for out in layer.outputs}
        self.regions: dict[str, int] = {}
        for i, layer in enumerate(layers):
            if layer.is_region and layer.onnx_nodes:
                # A region's name tells its ends, its metadata all nodes.
                ends = layer.onnx_nodes == layer.fused
                inside = between(graph, layer.onnx_nodes[0], layer.onnx_nodes[-1]) if ends else ()
                for name in (*inside, *layer.onnx_nodes):
                    self.regions.setdefault(name, i)
        self.all_regions = [i for i, layer in enumerate(layers) if layer.is_region]

    def layers_of(self, node: str) -> list[int]:
        return self.by_node.get(node, [])

    def region_of(self, node: str) -> tuple[int | None, str] | None:
        """The region that hides a node which no layer names, and how to call it."""
        if node in self.regions:
            index = self.regions[node]
        elif len(self.all_regions) == 1:
            index = self.all_regions[0]
        elif self.all_regions:
            return None, f"inside one of {len(self.all_regions)} Myelin regions"
        else:
            return None
        return index, f"inside a Myelin region, {_shorten(self.layers[index].name, 100)}"


def _product_site(wish: Wish, where: _Where, target: str | None) -> Site:
    candidates = where.layers_of(wish.node)
    kernels = [i for i in candidates if where.layers[i].is_mac]
    # A kernel's tags may name its neighbours, too: the one that is called after the node comes first.
    own = (wish.node, f"{wish.node}_myl")
    kernels = [i for i in kernels if where.layers[i].name == own[0] or where.layers[i].name.startswith(own[1])] or kernels
    for i in kernels:
        if where.layers[i].is_int8:
            return _site(wish, "int8", i)
    if not kernels and (region := where.region_of(wish.node)) is not None and wish.obstacle is None:
        return _site(wish, "unknown", region[0], f"{region[1]}, whose inner types TensorRT does not list")
    index = next(iter(kernels or candidates), None)
    if wish.obstacle is not None:
        return _site(wish, "float", index, wish.obstacle)
    if index is None:
        return _site(wish, "unknown", None, "no layer names it: give every ONNX node a name of its own")
    layer = where.layers[index]
    size = f" ({wish.detail})" if wish.detail else ""
    if not kernels:
        reason = f"it is part of a {layer.kind} kernel, which computes in float{size}"
    elif layer.dequantizes_weight:
        reason = f"its weight is dequantized when the {layer.kind} kernel runs{size}"
    elif target is not None and target.startswith("SM") and target[2:].isdigit() and int(target[2:]) < 80:
        reason = f"{target} is too old: TensorRT-RTX runs INT8 from SM80 on"
    else:
        what = layer.precision or "an unknown type"
        why = "this GPU has no INT8 kernel of that size, or a slower one"
        if wish.float_reader is not None:
            why = (
                f"{wish.float_reader} reads its result in float, and no INT8 kernel of that size writes it; quantize that, too"
            )
        reason = f"its kernel reads {what} though the graph allows INT8: {why}{size}"
    return _site(wish, "float", index, reason)


def _add_site(wish: Wish, where: _Where) -> Site:
    candidates = where.layers_of(wish.node)
    for i in candidates:
        layer = where.layers[i]
        # In the kernel of the product, or in the one that TensorRT-RTX generates behind it.
        if layer.is_mac or (layer.kind == "kgen" and any(tensor.name in where.products for tensor in layer.inputs)):
            return _site(wish, "fused", i)
    if candidates:
        return _site(wish, "own", candidates[0], wish.obstacle or "TensorRT gave it a kernel of its own")
    region = where.region_of(wish.node)
    if region is not None:
        return _site(wish, "unknown", region[0], region[1])
    return _site(wish, "unknown", None, "no layer names it")


def _other_site(wish: Wish, where: _Where) -> Site:
    candidates = where.layers_of(wish.node)
    if not candidates:
        region = where.region_of(wish.node)
        return _site(wish, "unknown", region[0] if region else None, region[1] if region else "no layer names it")
    index = candidates[0]
    layer = where.layers[index]
    if layer.is_mac or (layer.kind == "kgen" and any(tensor.name in where.products for tensor in layer.inputs)):
        return _site(wish, "fused", index)
    read = [tensor.dtype for tensor in layer.inputs[: 2 if wish.group == "gate" else 1]]
    if read and set(read) == {"INT8"}:
        return _site(wish, "int8", index)
    types = " and ".join(dict.fromkeys(filter(None, read))) or "no listed type"
    return _site(wish, "float", index, wish.obstacle or f"its {layer.kind} kernel reads {types}")


def _site(wish: Wish, state: str, layer: int | None, reason: str | None = None) -> Site:
    return Site(wish.node, wish.op, wish.group, state, layer, reason)


# Text


def _types(dtypes: Iterable[str]) -> str:
    """Types with their number where it is above one: ``INT8, 2 FP16``."""
    counts = Counter(dtype or "?" for dtype in dtypes)
    return ", ".join(f"{count} {dtype}" if count > 1 else dtype for dtype, count in counts.items())


def _nodes(layer: EngineLayer) -> str:
    """The nodes without those of Q/DQ; these where there are no others."""
    names = [name for name in layer.onnx_nodes if not name.endswith(("QuantizeLinear", "DequantizeLinear"))]
    if layer.is_reformat and not layer.onnx_nodes:
        return _shorten(layer.name, 100)
    return _shorten(" + ".join(names or layer.onnx_nodes), 160) or _shorten(layer.name, 100)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"
