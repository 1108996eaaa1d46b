"""Example inputs: how a model is called with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with example inputs.

    Args:
        model: Any module.
        inputs: A tuple holds positional arguments, a dict keyword arguments; anything else (a tensor, a list of images)
            is the one argument.
    """
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclass-like objects, in order."""
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def output_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    found = tensors(tree)
    # An output object that is no registered container: its attributes.
    return found if found or not hasattr(tree, "__dict__") else tensors(vars(tree))
