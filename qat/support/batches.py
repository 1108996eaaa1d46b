"""How one batch of a loader becomes a call of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QATError
from .inputs import call


def run_batch(model: nn.Module, batch: Any, device: torch.device | None) -> Any:
    """Call ``model`` with a batch; return what it returns.

    Args:
        model: Any model.
        batch: A tensor; a mapping, whose entries that ``model.forward`` names become keyword arguments; or a tuple or list
            ``(inputs, target, ...)``, of which only the first element is used: a tensor, a mapping, or whatever the model takes
            as its one argument, such as a list of images.
        device: Where the tensors go first; ``None`` leaves them where they are.

    Raises:
        QATError: For a batch of another kind, or a mapping of which the model takes nothing.
    """
    return call(model, example_of(model, batch, device))


def example_of(model: nn.Module, batch: Any, device: torch.device | None) -> Any:
    """What ``model`` is called with for a batch, in the form of ``example_inputs``.

    Args:
        model: Any model.
        batch: As for :func:`run_batch`.
        device: Likewise.

    Raises:
        QATError: Likewise.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise QATError("data: a batch is an empty list")
        inputs = batch[0]
    else:
        inputs = batch
        if not isinstance(batch, Tensor | Mapping):
            raise QATError(
                f"data: a batch is of type {type(batch).__name__}; it must be a tensor, a mapping, or a tuple or list whose "
                "first element is the input. Pass a function instead that runs the model: data=lambda model: ..."
            )
    inputs = _to_device(inputs, device)
    if isinstance(inputs, Mapping):
        return _accepted(model, inputs)
    return (inputs,)


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken = {key: value for key, value in inputs.items() if key in names}
    if not taken:
        raise QATError(
            f"data: a batch has the keys {', '.join(map(str, inputs))}, but the model's forward takes {', '.join(names)}. "
            "Pass a function instead that runs the model: data=lambda model: ..."
        )
    return taken


def _to_device(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value
