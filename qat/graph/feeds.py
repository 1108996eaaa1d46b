"""Arrays for the inputs of a graph, and a first look at whether they fit. Works without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from ..errors import QATError

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


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


def graph_feeds(
    wanted: Sequence[ValueInfoProto], values: Sequence[Any], argument: str, *, named: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The graph's inputs: by name where ``named`` has all their names, otherwise by position.

    Args:
        wanted: The graph's inputs.
        values: Arrays or tensors.
        argument: Name of the user's argument, for messages.
        named: The same by the names that the user gave them.

    Returns:
        Arrays by name. A float array becomes the type of its input: that is a matter of precision, not of meaning.

    Raises:
        QATError: If number, shapes or types do not fit.
    """
    names = [value.name for value in wanted]
    if named is not None and set(names) <= set(named):
        values = [leaf for name in names for leaf in leaves(named[name])]
    if len(values) != len(names):
        given = f" with the keys {list(named)}" if named else ""
        raise QATError(f"{argument}: {len(values)} arrays{given}, the ONNX file has {len(names)} inputs: {names}")
    feeds = {}
    for value, leaf in zip(wanted, values, strict=True):
        kind = value.type.tensor_type
        array = as_array(leaf)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if array.dtype != dtype:
            if not (np.issubdtype(array.dtype, np.floating) and kind.elem_type in _FLOATS):
                raise QATError(f"{argument}: {value.name} is {array.dtype}, the ONNX file wants {dtype}")
            array = array.astype(dtype)
        if kind.HasField("shape"):
            dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or -1 for dim in kind.shape.dim]
            refuse_shape(f"{argument}: {value.name}", array.shape, dims, "the ONNX file")
        feeds[value.name] = np.ascontiguousarray(array)
    return feeds


def refuse_nan(feeds: Mapping[str, np.ndarray], argument: str) -> None:
    """Raise if there is NaN among float inputs: QuantizeLinear would make a code of it.

    Raises:
        QATError: Naming the input.
    """
    for name, array in feeds.items():
        if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            raise QATError(f"{argument}: {name} holds {int(np.isnan(array).sum())} NaN; INT8 codes would hide them")


def refuse_shape(what: str, found: tuple[int, ...], wanted: Sequence[Any], whose: str) -> None:
    """Raise unless ``found`` fits ``wanted``, whose open dimensions are -1 or names.

    Raises:
        QATError: Naming both shapes.
    """
    pairs = zip(wanted, found, strict=False)
    if len(wanted) != len(found) or any(isinstance(w, int) and w not in (-1, f) for w, f in pairs):
        raise QATError(f"{what} has shape {list(found)}, {whose} wants {list(wanted)}")
