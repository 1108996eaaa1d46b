"""What equalization scales: the channels between two layers, or the output channels before a batch normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# A channel smaller than this part of the largest one adds nothing in float32; to scale it up would only blow up its bias.
_DEAD = 2.0**-24


class Rows:
    """A layer, and the batch normalization that undoes a scale of its output channels."""

    def __init__(self, model: nn.Module, layer: str, norm: str) -> None:
        self.paths = (layer, norm)
        self.layer: Any = _layer(model, layer)
        self.norm: Any = _layer(model, norm)
        bias = self.layer.bias
        self._scaled: list[Tensor] = [self.layer.weight, *([] if bias is None else [bias])]
        self.tensors: list[Tensor] = [*self._scaled, self.norm.running_mean, self.norm.running_var, self.norm.weight]
        self.changed = layer

    def try_scale(self, scale: Tensor) -> None:
        """Multiply the output channels by ``scale``; the normalization undoes it.

        Exact for powers of two: the variance with its ``eps`` stays, the normalization's weight is divided instead.
        """
        for t in (*self._scaled, self.norm.running_mean):
            _multiply(t, scale)
        _multiply(self.norm.weight, 1 / scale)

    def step(self) -> None:
        """Give all channels the range of the largest."""
        ranges = _row_ranges(self.layer)
        scale = torch.where(_alive(ranges), ranges.max() / ranges, 1.0)
        deviation = self._deviation()
        for t in (*self._scaled, self.norm.running_mean):
            _multiply(t, scale)
        _multiply(self.norm.running_var, scale.square())
        _multiply(self.norm.weight, self._deviation() / (deviation * scale))

    def ratio(self) -> float:
        """Largest over smallest range of the output channels, dead ones left out."""
        return _ratio(_row_ranges(self.layer))

    def _deviation(self) -> Tensor:
        return (self.norm.running_var.double() + self.norm.eps).sqrt()


class Pair:
    """Two layers, and the channels between them."""

    def __init__(self, model: nn.Module, first: str, norm: str, second: str) -> None:
        self.paths = (first, norm, second)
        self.first: Any = _layer(model, first)
        self.second: Any = _layer(model, second)
        self.norm: Any = _layer(model, norm) if norm else None
        owner: Any = self.norm if norm else self.first
        self._divided: list[Tensor] = [t for t in (owner.weight, owner.bias) if t is not None]
        self.tensors: list[Tensor] = [*self._divided, self.second.weight]
        self.changed = "" if norm else first

    def try_scale(self, scale: Tensor) -> None:
        """Divide the first layer's output by ``scale``, multiply the second's input channels by it."""
        for t in self._divided:
            _multiply(t, 1 / scale)
        weight = self._columns()
        weight.copy_(weight.double() * scale.reshape(weight.shape[0], 1, -1, 1))

    def step(self) -> float:
        """Make the ranges on both sides equal (equation 11); returns the largest logarithm of a scale."""
        first, second = self._first_ranges(), self._second_ranges()
        scale = torch.where(_alive(first) & _alive(second), (first / second).sqrt(), 1.0)
        self.try_scale(scale)
        return scale.log().abs().max().item()

    def ratio(self) -> float:
        """Largest over smallest range of the second layer's input channels, dead ones left out."""
        return _ratio(self._second_ranges())

    def _columns(self) -> Tensor:
        """A view of the second weight, shape ``(groups, C_out / groups, channels / groups, rest)``.

        A linear layer may read several features of a channel: those of a flattened image.
        """
        groups, weight = getattr(self.second, "groups", 1), self.second.weight
        return weight.view(groups, weight.shape[0] // groups, self.first.weight.shape[0] // groups, -1)

    def _second_ranges(self) -> Tensor:
        return self._columns().abs().amax((1, 3)).flatten().double()

    def _first_ranges(self) -> Tensor:
        ranges = _row_ranges(self.first)
        if self.norm is not None:
            ranges = ranges * (self.norm.weight.double() / (self.norm.running_var.double() + self.norm.eps).sqrt()).abs()
        return ranges


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _multiply(t: Tensor, scale: Tensor) -> None:
    """Multiply along the first dimension, in place, rounding once."""
    t.copy_(t.double() * scale.reshape(-1, *[1] * (t.ndim - 1)))


def _row_ranges(layer: Any) -> Tensor:
    return layer.weight.abs().flatten(1).amax(1).double()


def _alive(ranges: Tensor) -> Tensor:
    return ranges > _DEAD * ranges.max()


def _ratio(ranges: Tensor) -> float:
    alive = ranges[_alive(ranges)]
    return (alive.max() / alive.min()).item() if len(alive) else 1.0
