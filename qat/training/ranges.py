"""Ranges during quantization-aware training: when they stop moving, how the optimizer treats them, and what they clip."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.numerics import broadcast_scale
from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers, watching
from ..nn.attention import QuantAttention
from ..nn.layers import InterceptedLayer, QuantLayer

# Marks a parameter group of ranges.
_SEPARATE = "qat_ranges"
# What learning-rate schedulers of torch, and of timm (base_values), keep for each parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums", "base_values")


def freeze_ranges(model: nn.Module, *, refresh: bool = True, sites: Collection[str] | None = None) -> list[str]:
    """Stop every range, in place: those of weights keep their present value, learned ones no longer train.

    The flags are no part of a state dict. To load one that was saved afterwards, prepare with
    ``QuantConfig(weight_range="frozen")`` or call this with ``refresh=False`` after loading; checkpoints of
    :class:`~qat.QATCallback` know. ``DistributedDataParallel`` needs ``find_unused_parameters=True`` where learned ranges are
    frozen after it was made: it waits for the gradient of every parameter that it saw.

    Args:
        model: A prepared and calibrated model.
        refresh: First record the present maxima of the weights whose ranges follow them. Without, the recorded ones stay.
        sites: Paths of the quantizers to stop; ``None`` means all.

    Returns:
        Paths of the quantizers that were stopped. A weight that is computed anew in each forward (weight standardization)
        keeps a range that follows it.
    """
    for module in model.modules():
        if refresh and isinstance(module, QuantLayer | QuantAttention) and not isinstance(module, InterceptedLayer):
            module.refresh_weight_ranges()
    recorded = _recorded(model)
    stopped = []
    for path, site in quantizers(model):
        if sites is not None and path not in sites:
            continue
        if isinstance(site, WeightQuantizer) and site.follow and id(site) in recorded:
            site.follow = False
            stopped.append(path)
        elif site.learned and site.amax.requires_grad:
            site.amax.requires_grad_(False)
            stopped.append(path)
    return stopped


def frozen_ranges(model: nn.Module) -> set[str]:
    """Paths of the quantizers whose range could move, and does not: of weights that it does not follow, and learned ones."""
    recorded = _recorded(model)
    return {
        path
        for path, site in quantizers(model)
        if (site.learned and not site.amax.requires_grad)
        or (isinstance(site, WeightQuantizer) and not site.learned and id(site) in recorded and not site.follow)
    }


def ranges_are_frozen(model: nn.Module) -> bool:
    """Whether a prepared model has sites, and nothing is left for :func:`freeze_ranges` to stop."""
    recorded = _recorded(model)
    moving = [site.amax.requires_grad or (id(site) in recorded and bool(site.follow)) for _, site in quantizers(model)]
    return bool(moving) and not any(moving)


def stale_ranges(model: nn.Module) -> set[str]:
    """Paths of the quantizers whose range is to follow its weight, and is another than the weight has now.

    A state dict holds up-to-date ones. Loaded from one, they differ only if they were frozen when it was saved.
    """
    recorded = _recorded(model)
    following = {
        path: site
        for path, site in quantizers(model)
        if isinstance(site, WeightQuantizer) and id(site) in recorded and site.follow and site.state is State.QUANTIZING
    }
    before = {path: site.amax.detach().clone() for path, site in following.items()}
    recorded_ranges(model)
    changed = {path for path, site in following.items() if not torch.equal(site.amax, before[path])}
    for path, site in following.items():
        site.amax.data.copy_(before[path])
    return changed


def _recorded(model: nn.Module) -> set[int]:
    """The sites of weights that are parameters: of one that is computed in each forward, a range has to follow it."""
    return {
        id(site)
        for module in model.modules()
        if isinstance(module, QuantLayer | QuantAttention) and not isinstance(module, InterceptedLayer)
        for site in module.children()
        if isinstance(site, WeightQuantizer)
    }


def learned_ranges(model: nn.Module) -> list[nn.Parameter]:
    """The ranges that are parameters, each once."""
    return [site.amax for _, site in quantizers(model) if isinstance(site.amax, nn.Parameter)]


def separate_ranges(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any] = (), *, lr_factor: float = 1.0
) -> list[str]:
    """Give learned ranges parameter groups of their own, in place: no weight decay, and their own learning rate.

    Weight decay would pull the ranges to zero, that is, clip more and more. Ranges that no optimizer has, as it was given
    weights and biases by name, join that of the layer that they belong to. Call it when the optimizers are made, before a state
    is loaded into them; calling it again changes only groups that were added since.

    Args:
        model: A prepared model.
        optimizers: Its optimizers.
        schedulers: Their learning-rate schedulers, which keep values for each group.
        lr_factor: Learning rate of the ranges, relative to that of the group they were in.

    Returns:
        Paths of the quantizers whose range no optimizer has, nor all parameters of their layer or block.
    """
    ranges = {id(p) for p in learned_ranges(model)}
    if not ranges:
        return []
    optimizers = list(optimizers)
    found: set[int] = set()
    schedulers = [inner for scheduler in schedulers for inner in _all(scheduler)]
    _join(model, optimizers, ranges)
    for optimizer in optimizers:
        count = len(optimizer.param_groups)
        for position in range(count):
            group = optimizer.param_groups[position]
            if group.get(_SEPARATE):
                found.update(id(p) for p in group["params"])
                continue
            own = [p for p in group["params"] if id(p) in ranges]
            if not own:
                continue
            found.update(id(p) for p in own)
            if isinstance(optimizer, torch.optim.LBFGS):
                # Takes one group, and has no weight decay.
                continue
            rest = [p for p in group["params"] if id(p) not in ranges]
            target, source = group, None
            if rest:
                target, source = _split(group, own), position
                optimizer.param_groups.append(target)
            target[_SEPARATE] = True
            if "weight_decay" in target:
                target["weight_decay"] = 0.0
            _scale(target, lr_factor)
            for scheduler in (s for s in schedulers if s.optimizer is optimizer):
                _extend(scheduler, source if source is not None else position, new=source is not None, lr_factor=lr_factor)
    return [path for path, site in quantizers(model) if site.learned and site.amax.requires_grad and id(site.amax) not in found]


def _split(group: dict[str, Any], own: Sequence[Tensor]) -> dict[str, Any]:
    """Take the ranges ``own`` out of a group, in place, and return a group for them."""
    ranges = {id(p) for p in own}
    params = group["params"]
    target = {**group, "params": list(own)}
    if "name" in group:
        # Lightning's monitor asks for different ones.
        target["name"] = f"{group['name']}_ranges"
    if "param_names" in group:
        named = list(zip(params, group["param_names"], strict=True))
        target["param_names"] = [name for p, name in named if id(p) in ranges]
        group["param_names"] = [name for p, name in named if id(p) not in ranges]
    group["params"] = [p for p in params if id(p) not in ranges]
    return target


def _join(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranges: set[int]) -> None:
    """Add the ranges that are in no optimizer to the groups of their layers, or of the block that an Add belongs to."""
    groups = {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for path, site in quantizers(model):
        if not isinstance(site.amax, nn.Parameter) or not site.amax.requires_grad or id(site.amax) in groups:
            continue
        name = f"{path}.amax"
        while path:
            path = path.rpartition(".")[0]
            others = [p for p in model.get_submodule(path).parameters() if id(p) not in ranges]
            if others:
                # Of one that is trained in part, nobody knows to which part an Add belongs.
                if all(id(p) in groups for p in others):
                    group = groups[id(others[0])]
                    group["params"].append(site.amax)
                    if "param_names" in group:
                        group["param_names"].append(name)
                    groups[id(site.amax)] = group
                break


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
        factor = lr_factor if name in ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "base_values") else None
        value = values[position] if factor is None else values[position] * factor
        if new:
            values.append(value)
        else:
            values[position] = value


def clip_rates(model: nn.Module, run: Callable[[Any], Any]) -> dict[str, float]:
    """How much of what reaches each site lies beyond its range.

    Args:
        model: A prepared and calibrated model.
        run: Called with ``model``; shows it batches, without gradients.

    Returns:
        For every quantizing site that ``run`` reaches, by its path, the fraction of elements whose code is clipped. A code is
        not clipped as long as it rounds into the format's range, which lies half a step beyond ``amax``.
    """
    counts: dict[str, list[Tensor]] = {}

    def count(path: str, site: Quantizer, x: Tensor) -> None:
        if site.state is State.QUANTIZING:
            code = (x.float() / broadcast_scale(site.range_scale(x), x, site.axis)).round()
            beyond = ((code > site.fmt.qmax) | (code < site.fmt.qmin)).sum()
            # Read at the end, so that a GPU is waited for once.
            counts.setdefault(path, []).append(torch.stack([beyond, beyond.new_tensor(x.numel())]))

    with watching(model, count), torch.no_grad():
        run(model)
    if not counts:
        return {}
    totals = torch.stack([torch.stack(found).sum(0) for found in counts.values()]).tolist()
    return {path: beyond / max(total, 1) for path, (beyond, total) in zip(counts, totals, strict=True)}


def range_drift(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each range has moved, relative to what it was: the largest change of a channel.

    Args:
        model: A prepared model.
        before: What :func:`recorded_ranges` gave earlier.

    Returns:
        By the path of the site; sites that had no range are left out.
    """
    now = recorded_ranges(model)
    paths = [path for path, old in before.items() if path in now and bool((old > 0).all())]
    if not paths:
        return {}
    moved = torch.stack([(now[path] / before[path] - 1).abs().max() for path in paths]).tolist()
    return dict(zip(paths, moved, strict=True))


def recorded_ranges(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every site's present range by its path, those that follow the weights brought up to date."""
    for module in model.modules():
        if isinstance(module, QuantLayer | QuantAttention):
            module.refresh_weight_ranges()
    return {path: site.amax.detach().abs() for path, site in quantizers(model)}
