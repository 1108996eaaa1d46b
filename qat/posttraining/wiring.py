"""Which layer feeds which, observed in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..core.quantizer import switched_off
from ..nn.layers import is_quantizable
from ..preparation.run import Tracker
from ..support.inputs import tensors
from ..support.modes import hooked, looking_at


@dataclass
class Wiring:
    """What one run of a model in evaluation mode showed of its convolution and linear layers.

    Attributes:
        calls: How often each layer ran, by path, in the order of the first calls.
        sources: The nearest layers that each layer's input was computed from.
        norms: Path of the batch normalization that reads a layer's output itself, by the layer's path.
    """

    calls: dict[str, int] = field(default_factory=dict)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)


def observe_wiring(model: nn.Module, run: Callable[[nn.Module], Any]) -> Wiring:
    """Run a model once, in evaluation mode, with its sites off, and watch what its layers read.

    Args:
        model: Float or prepared; afterwards it is what it was.
        run: Runs the model once.
    """
    found, tracker = Wiring(), Tracker()
    normalized: dict[str, list[str]] = {}
    norm_calls: dict[str, int] = {}

    def before_layer(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = [tracker.layers.get(t, frozenset()) for t in tensors((args, kwargs))]
            found.calls[path] = found.calls.get(path, 0) + 1
            found.sources[path] = found.sources.get(path, frozenset()).union(*read)

        return hook

    def before_norm(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            norm_calls[path] = norm_calls.get(path, 0) + 1
            for t in tensors(args):
                if tracker.direct.get(t, False):
                    for source in tracker.layers[t]:
                        normalized.setdefault(source, []).append(path)

        return hook

    def register() -> Iterator[RemovableHandle]:
        for path, module in model.named_modules():
            if is_quantizable(module):
                yield module.register_forward_pre_hook(before_layer(path), with_kwargs=True)
                yield module.register_forward_hook(tracker.weighted_hook(path))
            elif isinstance(module, nn.MultiheadAttention):
                # A layer like any other to those that read it, but nothing is changed in it.
                yield module.register_forward_hook(tracker.weighted_hook(path))
            elif isinstance(module, _BatchNorm):
                yield module.register_forward_pre_hook(before_norm(path))

    with hooked(register()), looking_at(model), switched_off(model), tracker:
        run(model)
    for path, norms in normalized.items():
        if len(norms) == 1 and norm_calls[norms[0]] == 1 and found.calls.get(path) == 1:
            found.norms[path] = norms[0]
    return found
