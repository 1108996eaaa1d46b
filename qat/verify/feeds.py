"""Inputs in the form that each side wants, and a first look at whether they fit. Works without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import QATError
from ..graph.run import Graph, import_onnx


def leaves(tree: Any) -> list[Any]:
    """All arrays and tensors in nested tuples, lists and mappings, in order.

    Example:
        >>> len(leaves({"a": np.zeros(1), "b": [np.zeros(1), "no array"]}))
        2
    """
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree] if isinstance(tree, np.ndarray) or hasattr(tree, "detach") else []


def as_array(leaf: Any) -> np.ndarray:
    """A NumPy array of an array or a tensor on any device."""
    return leaf if isinstance(leaf, np.ndarray) else leaf.detach().cpu().numpy()


def graph_feeds(graph: Graph, inputs: Any, argument: str) -> dict[str, np.ndarray]:
    """The graph's inputs: by name where a mapping has their names, otherwise by position.

    Args:
        graph: Whose inputs.
        inputs: Arrays or tensors, in tuples, lists or mappings.
        argument: Name of the user's argument, for messages.

    Raises:
        QATError: If number, shapes or types do not fit, or there is NaN among the values.
    """
    onnx, _ = import_onnx()
    names = [value.name for value in graph.inputs]
    values = leaves(inputs)
    if isinstance(inputs, Mapping) and set(names) <= set(inputs):
        values = [leaf for name in names for leaf in leaves(inputs[name])]
    if len(values) != len(names):
        given = f" with the keys {list(inputs)}" if isinstance(inputs, Mapping) else ""
        raise QATError(f"{argument}: {len(values)} arrays{given}, the ONNX file has {len(names)} inputs: {names}")
    feeds = {}
    for value, leaf in zip(graph.inputs, values, strict=True):
        kind = value.type.tensor_type
        array = as_array(leaf)
        wanted = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            raise QATError(f"{argument}: {value.name} holds {int(np.isnan(array).sum())} NaN; INT8 codes would hide them")
        if array.dtype != wanted:
            # Another float type is a matter of precision, not of meaning.
            if not (np.issubdtype(array.dtype, np.floating) and onnx_float(kind.elem_type)):
                raise QATError(f"{argument}: {value.name} is {array.dtype}, the ONNX file wants {wanted}")
            array = array.astype(wanted)
        if kind.HasField("shape"):
            dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or -1 for dim in kind.shape.dim]
            _fit(f"{argument}: {value.name}", array.shape, dims, "the ONNX file")
        feeds[value.name] = np.ascontiguousarray(array)
    return feeds


def onnx_float(kind: int) -> bool:
    """Whether an element type of ONNX is floating."""
    onnx, _ = import_onnx()
    return kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


def check_engine(engine: Any, graph: Graph) -> None:
    """An engine has the inputs and the outputs of the graph.

    Raises:
        QATError: Naming what differs.
    """
    for kind, infos, names in (
        ("inputs", engine.inputs, [value.name for value in graph.inputs]),
        ("outputs", engine.outputs, graph.outputs),
    ):
        found = [info.name for info in infos]
        if set(found) != set(names):
            raise QATError(
                f"engine: built from another file? It has the {kind} {found}, {graph.path!r} has {names}. Build it anew"
            )


def run_engine(engine: Any, graph: Graph, feeds: Mapping[str, np.ndarray], extra: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The outputs of an engine as arrays, in the types of its inputs.

    Raises:
        QATError: If an input does not fit the engine, or an output is missing.
    """
    given = {}
    for info in engine.inputs:
        if info.name not in feeds:
            raise QATError(f"engine: it wants the input {info.name!r}, the ONNX file has {list(feeds)}. Build it anew")
        array = feeds[info.name]
        shape = getattr(info, "shape", None)
        if shape is not None:
            _fit(f"inputs: {info.name}", array.shape, list(shape), "the engine")
        kind = getattr(info, "dtype", None)
        if isinstance(kind, np.dtype | type) and np.issubdtype(array.dtype, np.floating):
            array = array.astype(kind, copy=False)
        given[info.name] = array
    found = engine.run(given)
    missing = [name for name in (*graph.outputs, *extra) if name not in found]
    if missing:
        raise QATError(f"engine: no output {missing[0]!r}; it has {list(found)}. Build it from {graph.path!r}")
    return {name: as_array(value) for name, value in found.items()}


def _fit(what: str, found: tuple[int, ...], wanted: list[Any], whose: str) -> None:
    pairs = zip(wanted, found, strict=False)
    if len(wanted) != len(found) or any(isinstance(w, int) and w not in (-1, f) for w, f in pairs):
        raise QATError(f"{what} has shape {list(found)}, {whose} wants {wanted}")
