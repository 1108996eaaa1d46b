"""Finding the classifier head: every weighted layer with no other weighted layer between it and an output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import QATError
from ..inputs import call, tensors
from .flow import Flow, Untraceable


class _TrackOrigins(TorchDispatchMode):
    """Remembers for every tensor the nearest weighted layers that it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = frozenset[str]().union(*(self.layers.get(t, frozenset()) for t in tensors((args, kwargs or {}))))
        for t in tensors(out):
            self.layers[t] = found
        return out


def find_head(flow: Flow, example_inputs: Any) -> tuple[set[str], str]:
    """The head's layers and how they were found: by tracing, else by running ``example_inputs``.

    Raises:
        QATError: When neither is possible.
    """
    try:
        layers = flow.outputs("").layers
        if layers:
            return layers, "found by tracing"
        reason = "no convolution or linear layer reaches an output of its traced forward"
    except Untraceable as error:
        reason = str(error)
    if example_inputs is None:
        raise QATError(
            f"The classifier head was not found: {reason}. Pass example_inputs=, or name it: "
            "QuantConfig(head=['classifier']), or QuantConfig(head=()) for a model without one"
        )
    return run_to_find_head(flow, example_inputs), "found by running example_inputs"


def run_to_find_head(flow: Flow, example_inputs: Any) -> set[str]:
    """Run the model once, in evaluation mode, and read the outputs' origins."""
    model = flow.model
    tracker = _TrackOrigins()
    handles = []

    def mark(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            for t in tensors(out):
                tracker.layers[t] = frozenset([path])

        return hook

    modes = {module: module.training for module in model.modules()}
    try:
        for path in flow.weighted:
            handles.append(model.get_submodule(path).register_forward_hook(mark(path)))
        model.eval()
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), torch.no_grad(), tracker:
            out = call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    layers: set[str] = set().union(*(tracker.layers.get(t, frozenset()) for t in _outputs(out)))
    if not layers:
        raise QATError(
            "The classifier head was not found: running example_inputs, no convolution or linear layer reached an "
            "output. Name it: QuantConfig(head=['classifier']), or QuantConfig(head=()) for a model without one"
        )
    return layers


def _outputs(out: Any) -> list[Tensor]:
    found = tensors(out)
    if not found and hasattr(out, "__dict__"):
        found = tensors(vars(out))
    return found
