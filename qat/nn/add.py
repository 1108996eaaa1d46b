"""Residual additions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.kernels import fake_quantize_add
from ..core.quantizer import Quantizer
from ..support.modes import assigned


class Add(nn.Module):
    """``a + b`` as a module: use it where ``qat.prepare`` cannot rewrite an addition in a ``forward``.

    Example:
        >>> import torch
        >>> Add()(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def _sum(a: Tensor, b: Tensor, a_quantizer: Quantizer | None, b_quantizer: Quantizer | None) -> Tensor:
    """The sum of both, quantized by those quantizers that are there; in one pass where there is a kernel."""
    if torch.compiler.is_compiling():
        return (a if a_quantizer is None else a_quantizer(a)) + (b if b_quantizer is None else b_quantizer(b))
    # A tensor with other readers is quantized once for all of them, and first: it may be so already.
    if a_quantizer is not None and not a_quantizer.quantizes_alone():
        a, a_quantizer = a_quantizer(a), None
    if b_quantizer is not None and not b_quantizer.quantizes_alone():
        b, b_quantizer = b_quantizer(b), None
    if a_quantizer is None:
        a, b, a_quantizer, b_quantizer = b, a, b_quantizer, None
    if a_quantizer is not None and (b_quantizer is None or b_quantizer.fmt == a_quantizer.fmt):
        b_amax = None if b_quantizer is None else b_quantizer.amax
        in_one = fake_quantize_add(a, a_quantizer.amax, b, b_amax, fmt=a_quantizer.fmt)
        if in_one is not None:
            return in_one
    return (a if a_quantizer is None else a_quantizer(a)) + (b if b_quantizer is None else b_quantizer(b))


class QuantAdd(Add):
    """``a + b`` with a quantizer on each input, or on one.

    Args:
        a: Quantizer of the first input, or ``None``.
        b: Quantizer of the second input, or ``None``.
        fusable: Which input (0 or 1) a convolution feeds, so that TensorRT can fuse it with the addition if that input
            is left in high precision; ``None`` if neither.
    """

    def __init__(self, a: Quantizer | None, b: Quantizer | None, *, fusable: int | None) -> None:
        super().__init__()
        self.set_quantizers(a, b, fusable=fusable)

    def set_quantizers(self, a: Quantizer | None, b: Quantizer | None, *, fusable: int | None) -> None:
        """Attach the sites; also how an :class:`Add` becomes a ``QuantAdd`` in place."""
        self.a_quantizer = a
        self.b_quantizer = b
        self.fusable = fusable
        # While true, the fusable input passes through in high precision. Set by qat.export, around an export only.
        self.fuse = False

    def remove_quantizers(self) -> None:
        """Inverse of :meth:`set_quantizers`."""
        del self.a_quantizer, self.b_quantizer, self.fusable, self.fuse

    def forward(self, a: Any, b: Any) -> Any:
        # The same expression may add something else than two activations in another call (a flag, a shape).
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a_quantizer = None if self.fuse and self.fusable == 0 else self.a_quantizer
            b_quantizer = None if self.fuse and self.fusable == 1 else self.b_quantizer
            return _sum(a, b, a_quantizer, b_quantizer)
        return a + b

    def extra_repr(self) -> str:
        return f"fusable={('a', 'b')[self.fusable] if self.fusable is not None else None}"


def fusing_adds(model: nn.Module, fuse: bool) -> AbstractContextManager[None]:
    """While this lasts, every addition leaves the input that TensorRT can fuse in high precision, or none does."""
    return assigned([module for module in model.modules() if isinstance(module, QuantAdd)], "fuse", fuse)
