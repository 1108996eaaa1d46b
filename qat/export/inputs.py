"""Example inputs in the one form that a call needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import QATError
from ..graph import feeds
from ..support.inputs import tensors


def call_arguments(inputs: Any, argument: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple holds positional arguments, a dict keyword arguments; anything else is the one argument.

    Raises:
        QATError: Naming ``argument`` if there is no tensor in it.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, tuple):
        args = inputs
    else:
        args = (inputs,)
    if not tensors((args, kwargs)):
        raise QATError(f"{argument}: no tensor in it; pass a tensor, a tuple of arguments or a dict of keyword arguments")
    return args, kwargs


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], argument: str) -> Any:
    """``model(*args, **kwargs)``, with the model's refusal of its inputs told as one of ``argument``."""
    try:
        return model(*args, **kwargs)
    # What a module raises for a wrong shape, dtype, number or name of arguments.
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, QATError):
            raise
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors((args, kwargs)))
        raise QATError(f"{argument}: the model does not run on inputs of shape {shapes}: {error}") from error


def output_names(output: Any) -> list[str]:
    """A name for each tensor of a model's output: its keys and positions, joined by dots.

    Example:
        >>> import torch
        >>> output_names({"out": torch.zeros(1), "aux": [torch.zeros(1), torch.zeros(1)]})
        ['out', 'aux.0', 'aux.1']
        >>> output_names(torch.zeros(1))
        ['output']
    """
    leaves, _ = pytree.tree_flatten_with_path(output)
    names = []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            name = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
            names.append(f"output.{name}" if name[:1].isdigit() else name or "output")
    return names


def graph_feeds(proto: onnx.ModelProto, args: tuple[Any, ...], kwargs: dict[str, Any], argument: str) -> dict[str, np.ndarray]:
    """The graph's inputs: by name where a keyword argument has one's name, otherwise by position; in half if it wants that.

    Raises:
        QATError: Naming ``argument`` if number, shapes or types do not fit.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    wanted = [value for value in proto.graph.input if value.name not in stored]
    return feeds.graph_feeds(wanted, tensors((args, kwargs)), argument, named=None if args else kwargs)
