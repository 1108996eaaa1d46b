"""Networks with sites that nothing has calibrated yet, batches for them, and what to compare afterwards.

No placement decides about these sites: every layer has one on its input and one on its weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.core.config import QuantConfig
from qat.core.quantizer import Quantizer, State, quantizers
from qat.nn.layers import is_quantizable, make_weight_quantizer, quant_class

SITE = QuantConfig().site("any")


def quantized(model: nn.Module, *, learned: bool = False) -> nn.Module:
    """``model`` with a site on every input and weight."""
    for module in model.modules():
        if is_quantizable(module):
            weight = module.weight
            module.__class__ = quant_class(type(module))
            module.add_quantizers(Quantizer(learned=learned), make_weight_quantizer(weight, SITE))
    return model


def small_model(**kwargs: Any) -> nn.Module:
    """A convolution and a linear layer with sites, and between them what behaves otherwise in training."""
    torch.manual_seed(0)
    return quantized(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        **kwargs,
    )


def images(count: int = 6, batch: int = 4) -> list[Tensor]:
    """Batches of ``(batch, 3, 8, 8)``, each larger in magnitude than the one before."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 8, 8, generator=generator) * (k + 1) for k in range(count)]


def ranges_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the ranges, by the path of their site."""
    return {path: site.amax.detach().clone() for path, site in quantizers(model)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit-equal ranges at the same sites."""
    return a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)


def states_of(model: nn.Module) -> list[State]:
    """The state of every site, in their order."""
    return [site.state for _, site in quantizers(model)]
