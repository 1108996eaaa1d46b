"""Batch normalization during quantization-aware training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..support.modes import looking_at


def freeze_batch_norm(model: nn.Module) -> list[str]:
    """Stop the running statistics of every batch-norm layer, in place; its weight and bias still train.

    The layers are switched to eval mode, which a later ``model.train()`` undoes: call this again after it. Layers are
    recognised by torch's common base class, so synchronised ones and other libraries' subclasses count.

    Args:
        model: Any model.

    Returns:
        The paths of the layers, in module order.

    Example:
        >>> freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        ['1']
    """
    frozen = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            frozen.append(name)
    return frozen


def reestimate_batch_norm(model: nn.Module, run: Callable[[Any], Any]) -> list[str]:
    """Compute the running statistics of every batch-norm layer anew, in place: their averages over what ``run`` shows.

    Fine-tuning moves the weights, and quantization the activations, away from what frozen statistics describe. With several
    processes (``torch.distributed``) each averages over its own data, and then all over all.

    Args:
        model: Any model. Modes are afterwards what they were.
        run: Called with ``model``; shows it batches, without gradients.

    Returns:
        The paths of the layers, in module order. Layers without running statistics, and those that ``run`` does not reach,
        stay as they are.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> reestimate_batch_norm(nn.Sequential(norm), lambda model: [model(torch.tensor([[1.0], [5.0]])) for _ in range(2)])
        ['0']
        >>> norm.running_mean.item(), norm.running_var.item()
        (3.0, 8.0)
    """
    norms = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    before = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms.values()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    done = False
    try:
        with looking_at(model, keep_tensors=False):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
                norm.train()
            run(model)
            for norm in norms.values():
                _average_over_processes(norm)
        done = True
    finally:
        reached = [path for path, norm in norms.items() if done and norm.num_batches_tracked]
        for path, norm in norms.items():
            norm.momentum = momenta[norm]
            if path not in reached:
                for buffer, value in zip(norm.buffers(), before[norm], strict=True):
                    buffer.copy_(value)
    return reached


def _average_over_processes(norm: _BatchNorm) -> None:
    """Each process counts by the number of its batches, of which the layer keeps the sum."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    *statistics, batches = norm.buffers()
    for buffer in statistics:
        buffer.mul_(batches)
        torch.distributed.all_reduce(buffer)
    torch.distributed.all_reduce(batches)
    for buffer in statistics:
        buffer.div_(batches.clamp(min=1))
