"""``inspect``: the layers of an engine beside the graph that it was built from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QATError
from .inspection import InspectedNode, Inspection, shorten
from .layers import EngineLayer, Listing, read_json, read_log, with_times

if TYPE_CHECKING:
    import onnx

    from ..graph.graph import Graph
    from ..graph.wishes import Wish

# Its name of before, which pickles may hold.
Site = InspectedNode


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
    read = _read(engine, onnx, target, runtime)
    layers = read.listing.layers if times is None else with_times(read.listing.layers, times)
    sites = None if read.graph is None else tuple(_sites(read.graph, layers, read.built_for, read.is_rtx))
    return Inspection(layers, sites, read.listing.io, read.built_for, read.title)


@dataclass(frozen=True)
class _Read:
    """Layers, graph, target and runtime of whatever was passed."""

    listing: Listing
    graph: Graph | None
    is_rtx: bool
    built_for: str | None = None
    title: str = ""


def _read(engine: Any, model: Any, target: str, runtime: Any) -> _Read:
    if hasattr(engine, "SerializeToString"):
        model = engine if model is None else model
        engine = engine.SerializeToString()
    if isinstance(engine, (str, os.PathLike)):
        path = Path(engine)
        if path.suffix in (".json", ".log", ".txt"):
            listing = _read_report(path)
            is_rtx = any(layer.kind == "correlation" for layer in listing.layers)
            return _Read(listing, None if model is None else _graph(model), is_rtx)
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
        is_there = stored is not None and Path(stored).is_file() and importlib.util.find_spec("onnx") is not None
        graph = _graph(stored) if is_there else None
    else:
        graph = _graph(model)
    is_rtx = bool(getattr(engine.runtime, "is_rtx", False))
    return _Read(_layers_of(engine), graph, is_rtx, built_for, str(getattr(engine.runtime, "title", "")))


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


def _graph(model: Any) -> Graph:
    """The graph of a model, its bytes or its file."""
    if importlib.util.find_spec("onnx") is None:
        raise QATError(
            "onnx: reading the graph needs the onnx package: `pip install onnx`. Without `onnx`, layers are told alone"
        )
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from ..graph.graph import Graph
    from ..graph.reading import check_external_data, read_model

    if hasattr(model, "graph"):
        return Graph(model)
    if isinstance(model, bytes):
        try:
            return Graph(onnx.load_model_from_string(model))
        except DecodeError as error:
            raise QATError(f"onnx: the bytes: no ONNX model ({error}). Pass what the engine was built from") from error
    path = Path(model)
    proto = read_model(path, needs_data=False)
    folder: str | None = str(path.resolve().parent)
    try:
        check_external_data(proto, path)
    except QATError:
        # Weights in other files are not needed, and not looked at where anything is wrong with them.
        folder = None
    return Graph(proto, folder)


# What became of each node


def _sites(graph: Graph, layers: tuple[EngineLayer, ...], target: str | None, is_rtx: bool) -> Iterator[InspectedNode]:
    from ..graph.wishes import wishes

    if not graph.is_quantized:
        return
    where = _Where(graph, layers)
    for wish in wishes(graph, rtx=is_rtx):
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
                inside = graph.names_between(layer.onnx_nodes[0], layer.onnx_nodes[-1]) if ends else ()
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
        return index, f"inside a Myelin region, {shorten(self.layers[index].name, 100)}"


def _product_site(wish: Wish, where: _Where, target: str | None) -> InspectedNode:
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


def _add_site(wish: Wish, where: _Where) -> InspectedNode:
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


def _other_site(wish: Wish, where: _Where) -> InspectedNode:
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


def _site(wish: Wish, state: str, layer: int | None, reason: str | None = None) -> InspectedNode:
    return InspectedNode(wish.node, wish.op, wish.group, state, layer, reason)
