"""Ranges during quantization-aware training: when they stop moving, and how the optimizer treats those that it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .nn.attention import QuantAttention
from .nn.layers import InterceptedLayer, QuantLayer
from .quantizer import WeightQuantizer, quantizers

# What learning-rate schedulers of torch keep for each parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def freeze_ranges(model: nn.Module, *, refresh: bool = True) -> list[str]:
    """Stop every range, in place: those of weights keep their present value, learned ones no longer train.

    The flags are no part of a state dict. To load one that was saved afterwards, prepare with
    ``QuantConfig(weight_range="frozen")`` or call this with ``refresh=False`` after loading; checkpoints of
    :class:`~qat.QATCallback` know.

    Args:
        model: A prepared and calibrated model.
        refresh: First record the present maxima of the weights whose ranges follow them. Without, the recorded ones stay.

    Returns:
        Paths of the quantizers that were stopped. A weight that is computed anew in each forward (weight standardization)
        keeps a range that follows it.
    """
    recorded: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantLayer | QuantAttention) and not isinstance(module, InterceptedLayer):
            recorded.update(id(site) for site in module.children() if isinstance(site, WeightQuantizer))
            if refresh:
                module.refresh_weight_ranges()
    stopped = []
    for path, site in quantizers(model):
        if isinstance(site, WeightQuantizer) and site.follow and id(site) in recorded:
            site.follow = False
            stopped.append(path)
        elif site.learned and site.amax.requires_grad:
            site.amax.requires_grad_(False)
            stopped.append(path)
    return stopped


def ranges_are_frozen(model: nn.Module) -> bool:
    """Whether a prepared model has ranges of weights or learned ones, and none of them moves."""
    moving = [site.amax.requires_grad or (isinstance(site, WeightQuantizer) and site.follow) for _, site in quantizers(model)]
    return bool(moving) and not any(moving)


def learned_ranges(model: nn.Module) -> list[nn.Parameter]:
    """The ranges that are parameters, each once."""
    return [site.amax for _, site in quantizers(model) if isinstance(site.amax, nn.Parameter)]


def separate_ranges(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any] = (), *, lr_factor: float = 1.0
) -> list[str]:
    """Give learned ranges parameter groups of their own, in place: no weight decay, and their own learning rate.

    Weight decay would pull the ranges to zero, that is, clip more and more. Call it when the optimizers are made, before a
    state is loaded into them.

    Args:
        model: A prepared model.
        optimizers: Its optimizers.
        schedulers: Their learning-rate schedulers, which keep values for each group.
        lr_factor: Learning rate of the ranges, relative to that of the group they were in.

    Returns:
        Paths of the quantizers whose range no optimizer has.
    """
    ranges = {id(p) for p in learned_ranges(model)}
    found: set[int] = set()
    schedulers = [inner for scheduler in schedulers for inner in _all(scheduler)]
    for optimizer in optimizers:
        count = len(optimizer.param_groups)
        for position in range(count):
            group = optimizer.param_groups[position]
            own = [p for p in group["params"] if id(p) in ranges]
            if not own:
                continue
            found.update(id(p) for p in own)
            rest = [p for p in group["params"] if id(p) not in ranges]
            target, source = group, None
            if rest:
                group["params"] = rest
                target, source = {**group, "params": own}, position
                optimizer.param_groups.append(target)
            if "weight_decay" in target:
                target["weight_decay"] = 0.0
            _scale(target, lr_factor)
            for scheduler in (s for s in schedulers if s.optimizer is optimizer):
                _extend(scheduler, source if source is not None else position, new=source is not None, lr_factor=lr_factor)
    return [path for path, site in quantizers(model) if site.learned and site.amax.requires_grad and id(site.amax) not in found]


def _all(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    if hasattr(scheduler, "optimizer"):
        yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _all(inner)


def _scale(group: dict[str, Any], factor: float) -> None:
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        if name in group:
            group[name] = group[name] * factor


def _extend(scheduler: Any, position: int, *, new: bool, lr_factor: float) -> None:
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if not isinstance(values, list) or position >= len(values):
            continue
        factor = lr_factor if name in ("base_lrs", "_last_lr", "max_lrs", "min_lrs") else None
        value = values[position] if factor is None else values[position] * factor
        if new:
            values.append(value)
        else:
            values[position] = value
