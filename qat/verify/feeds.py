"""Inputs and outputs of an engine beside those of the reference. Works without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import QATError
from ..graph import feeds as feeding
from ..graph.feeds import as_array, leaves, refuse_nan, refuse_shape
from .reference import Reference


def graph_feeds(reference: Reference, inputs: Any, argument: str) -> dict[str, np.ndarray]:
    """The graph's inputs: by name where a mapping has their names, otherwise by position.

    Args:
        reference: Whose inputs.
        inputs: Arrays or tensors, in tuples, lists or mappings.
        argument: Name of the user's argument, for messages.

    Raises:
        QATError: If number, shapes or types do not fit, or there is NaN among the values.
    """
    named = inputs if isinstance(inputs, Mapping) else None
    found = feeding.graph_feeds(reference.inputs, leaves(inputs), argument, named=named)
    refuse_nan(found, argument)
    return found


def check_engine(engine: Any, reference: Reference) -> None:
    """An engine has the inputs and the outputs of the reference.

    Raises:
        QATError: Naming what differs.
    """
    for kind, infos, names in (
        ("inputs", engine.inputs, [value.name for value in reference.inputs]),
        ("outputs", engine.outputs, reference.outputs),
    ):
        found = [info.name for info in infos]
        if set(found) != set(names):
            raise QATError(
                f"engine: built from another file? It has the {kind} {found}, {reference.path!r} has {names}. Build it anew"
            )


def run_engine(
    engine: Any, reference: Reference, feeds: Mapping[str, np.ndarray], extra: Iterable[str] = ()
) -> dict[str, np.ndarray]:
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
            refuse_shape(f"inputs: {info.name}", array.shape, list(shape), "the engine")
        kind = getattr(info, "dtype", None)
        if isinstance(kind, np.dtype | type) and np.issubdtype(array.dtype, np.floating):
            array = array.astype(kind, copy=False)
        given[info.name] = array
    found = engine.run(given)
    missing = [name for name in (*reference.outputs, *extra) if name not in found]
    if missing:
        raise QATError(f"engine: no output {missing[0]!r}; it has {list(found)}. Build it from {reference.path!r}")
    return {name: as_array(value) for name, value in found.items()}
