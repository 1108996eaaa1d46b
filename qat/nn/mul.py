"""Products of a tensor and its gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.quantizer import Quantizer


class QuantMul(nn.Module):
    """``a * b`` with a quantizer on each input, so that what computes the tensor and what reads the product stay in INT8.

    Args:
        a: Quantizer of the first input.
        b: Quantizer of the second input.
    """

    def __init__(self, a: Quantizer, b: Quantizer) -> None:
        super().__init__()
        self.a_quantizer = a
        self.b_quantizer = b

    def forward(self, a: Any, b: Any) -> Any:
        # The same expression may multiply something else than two activations in another call.
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a, b = self.a_quantizer(a), self.b_quantizer(b)
        return a * b
