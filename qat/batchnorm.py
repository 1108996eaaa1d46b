"""Batch normalization during quantization-aware training."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
