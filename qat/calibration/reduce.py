"""Statistics of several ranks become one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed as dist

from ..errors import QATError
from .observers import HistogramObserver, SiteObserver, WeightObserver


def rank() -> int:
    """Of this process; 0 if it is the only one."""
    return dist.get_rank() if is_distributed() else 0


def is_distributed() -> bool:
    """Whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def failed_ranks(failed: bool, device: torch.device) -> list[int]:
    """Which ranks call this with ``failed=True``. Every rank must call it, whatever happened to it: none waits in vain."""
    if not is_distributed():
        return [0] if failed else []
    flags = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=_device(device))
    flags[dist.get_rank()] = int(failed)
    dist.all_reduce(flags, op=dist.ReduceOp.SUM)
    return flags.nonzero().flatten().tolist()


def reduce_observers(
    activations: Mapping[str, HistogramObserver], weights: Mapping[str, WeightObserver], device: torch.device
) -> None:
    """Give every rank, in place, the statistics of the union of what the ranks saw: exactly those that one process would have.

    Args:
        activations: Same paths in the same order on every rank.
        weights: Likewise.
        device: Of the model.

    Raises:
        QATError: If the ranks hold different sites.
    """
    if not is_distributed():
        return
    device = _device(device)
    histograms = [observer.histogram for observer in activations.values()]
    observers: list[SiteObserver] = [*activations.values(), *weights.values()]
    sizes = torch.tensor([len(histograms), sum(w.amax.numel() for w in weights.values())], device=device)
    bounds = torch.cat([sizes, -sizes])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if not torch.equal(bounds[:2], -bounds[2:]):
        raise QATError("model: the ranks hold different quantizers; prepare the same model with the same config on every rank")

    # Float32 holds every entry exactly: maxima of float32 data, and flags.
    numbers = torch.tensor([float(o.seen) for o in observers] + [h.amax for h in histograms], dtype=torch.float32)
    packed = torch.cat([numbers.to(device), *(w.amax.reshape(-1).to(device) for w in weights.values())])
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    seen, amaxes, weight_amax = packed.split([len(observers), len(histograms), len(packed) - len(numbers)])
    for observer, flag in zip(observers, seen.tolist(), strict=True):
        observer.seen = bool(flag)
    for weight, amax in zip(weights.values(), weight_amax.split([w.amax.numel() for w in weights.values()]), strict=True):
        weight.amax = amax.reshape(weight.amax.shape).to(weight.amax.device)

    if not histograms:
        return
    for histogram, amax in zip(histograms, amaxes.tolist(), strict=True):
        histogram.cover(amax)  # the largest value fixes the width: now it is the same on every rank
    counts = torch.stack([histogram.counts.to(device) for histogram in histograms])
    dist.all_reduce(counts, op=dist.ReduceOp.SUM)
    for histogram, total in zip(histograms, counts, strict=True):
        histogram.counts = total.to(histogram.counts.device)


def _device(preferred: torch.device) -> torch.device:
    """``preferred`` if the process group can communicate from there (NCCL cannot from a CPU), else one where it can."""
    types = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    return preferred if preferred.type in types else torch.device(types[0])
