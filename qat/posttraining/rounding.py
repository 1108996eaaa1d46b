"""Learned rounding of weights (AdaRound: Nagel et al. 2020, "Up or Down?", arXiv 2004.10568, section 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.numerics import Format, quantize
from ..errors import QATError
from ..nn.layers import CONVS, InterceptedLayer, QuantLayer
from ..support.modes import hooked
from .passes import Passes, WalkResult, clipping_only, listen, walking

# Equation 23: the stretched sigmoid reaches 0 and 1 exactly (Louizos et al., arXiv 1712.01312).
_ZETA, _GAMMA = 1.1, -0.1
# Of the regularizer, equation 24: nearly flat at first, so that the weights move freely, then steep.
_BETA = (20.0, 2.0)
_WARM_UP = 0.2
# Weight of the regularizer; from 0.1 to 1 the results on the digits were alike, below it too few weights decided.
_REGULARIZATION = 0.1
# Adam moves a variable by at most about its rate in a step: together as far as the sigmoid's saturation and back.
_TRAVEL = 10.0
# How many numbers a chunk of windows may have.
_CHUNK = 2**24


@dataclass(frozen=True)
class RoundedLayer:
    """One layer whose weights were rounded.

    Attributes:
        path: Of the layer.
        moved: Share of the weights that were not rounded to the nearest code.
        nearest: Squared error of the output with the nearest codes, relative to the square of the output that is aimed at.
        learned: The same with the learned codes; never larger, on the data it was learned from.
    """

    path: str
    moved: float
    nearest: float
    learned: float


@dataclass(frozen=True)
class Rounding(WalkResult[RoundedLayer]):
    """Result of :func:`round_weights`; prints as a table.

    Attributes:
        layers: What was rounded, in order.
        left: Why a quantized layer was not, by its path.
    """

    _title = "Learned rounding"
    _texts = ("layer",)
    _numbers = ("moved", "error, nearest", "error, learned")

    def _cells(self, layer: RoundedLayer) -> tuple[str, ...]:
        return layer.path, f"{layer.moved:.2%}", f"{layer.nearest:.2e}", f"{layer.learned:.2e}"


def round_weights(
    model: nn.Module, data: Iterable[Any], *, steps: int = 1000, batches: int | None = None, progress: bool = True
) -> Rounding:
    """Round the weights of a calibrated model up or down as its outputs ask for, instead of to the nearest code, in place.

    Layer by layer, in the order in which they run, the codes are learned that give the float model's output from the
    quantized inputs that the layers before now give: the asymmetric reconstruction of the paper's section 3.4, without the
    activation function, so that the loss is quadratic in the weights. The float model clips activations as the sites do:
    a weight that moves by less than a step cannot give back what clipping takes away, and would be rounded for the sake of
    the few largest values.

    The second moments of the inputs then say everything about the data: they are summed in one pass a layer that ends at the
    layer, over every output of every image, and the optimization sees all of that in each step. It draws no random numbers.
    Where it does not lower a channel's error, the nearest codes stay.

    Weights then lie on the grid: the quantizer reproduces them, so export, training and parity stay what they are. Their
    ranges are frozen as :func:`qat.ranges.freeze_ranges` does; the largest weight of each range keeps its code, so a range
    that follows the weights again, as in a model that loads the state dict, is the same up to float rounding.

    In memory are a float copy of the model and ``K ** 2`` numbers a group for one layer of ``K`` inputs an output channel,
    whatever the size of the data.

    Args:
        model: A calibrated model, at best after :func:`equalize` and before fine-tuning, which would move the weights off.
        data: A loader of batches as :func:`qat.calibrate` takes them; it is iterated once for each layer. Some hundred
            training images.
        steps: Steps of Adam for each layer, at least 1.
        batches: Stop each pass after that many; ``None`` takes all.
        progress: Show a progress bar.

    Returns:
        Each layer's share of weights that moved, and the error of its output before and after.

    Raises:
        QATError: If the model is not calibrated or runs in several processes, the data are no re-iterable, non-empty loader,
            a NaN is seen, a layer runs another number of times than in float, or ``steps`` is invalid. If anything fails, the
            model is left as it was.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise QATError(f"steps={steps!r}: must be a positive integer")
    passes = Passes(model, data, batches)
    layers, left = _targets(passes)
    reference = copy.deepcopy(model)
    sites = [layer.weight_quantizer for layer in layers.values()]
    follows = [site.follow for site in sites]
    done = []
    try:
        held = [t for layer in layers.values() for t in (layer.weight, layer.weight_quantizer.amax)]
        with clipping_only(reference), walking(layers, "Rounding weights", held=held, progress=progress) as walk:
            for path, layer in walk:
                done.append(_round_layer(path, layer, _moments(passes, model, reference, path), steps))
    finally:
        if len(done) < len(layers):
            for site, follow in zip(sites, follows, strict=True):
                site.follow = follow
    return Rounding(tuple(done), left)


def _targets(passes: Passes) -> tuple[dict[str, QuantLayer], dict[str, str]]:
    layers: dict[str, QuantLayer] = {}
    left: dict[str, str] = {}
    weights: set[int] = set()
    chosen = passes.layers()
    elsewhere = passes.held_besides(chosen.values())
    for path, layer in chosen.items():
        if isinstance(layer, InterceptedLayer):
            left[path] = "its class has a forward of its own, which may compute the weight or pad the input"
        elif id(layer.weight) in weights:
            left[path] = "shares its weight with a layer that was rounded"
        elif id(layer.weight) in elsewhere:
            left[path] = "shares its weight with a module that reads it as it is"
        else:
            weights.add(id(layer.weight))
            layers[path] = layer
    return layers, left | passes.attention()


@dataclass
class Moments:
    """Second moments of what a layer reads, and of what its output lacks with unrounded weights ``W``.

    Attributes:
        gram: ``E[x x^T]`` of the quantized inputs of one output, shape ``(groups, K, K)``.
        missing: ``E[(y - W x) x^T]`` with the float model's output ``y``, shape ``(groups, C_out / groups, K)``.
        power: ``E[(y - W x)^2]``, shape ``(groups, C_out / groups)``.
        signal: ``E[y^2]``, the same shape.
    """

    gram: Tensor
    missing: Tensor
    power: Tensor
    signal: Tensor

    def error(self, change: Tensor) -> Tensor:
        """``E[(y - (W + change) x)^2]``, shape ``(groups, C_out / groups)``."""
        return self.power + ((change @ self.gram - 2 * self.missing) * change).sum(-1)


def _moments(passes: Passes, model: nn.Module, reference: nn.Module, path: str) -> Moments:
    layer: Any = model.get_submodule(path)
    weight = _grouped(layer)
    inputs: list[tuple[Tensor, torch.Size]] = []
    outputs: list[Tensor] = []
    # Copies: an activation may work in place on either.
    handles = [
        listen(reference.get_submodule(path), lambda x, out: outputs.append(out.clone())),
        listen(layer, lambda x, out: inputs.append((layer.input_quantizer(x).clone(), out.shape))),
    ]
    sums: list[Tensor] = []
    count = 0
    with hooked(handles):
        for _ in passes.each(reference, model, until=path):
            if [size for _, size in inputs] != [out.shape for out in outputs]:
                raise QATError(
                    f"{path}: runs another number of times in the quantized model than in float, or on tensors of another "
                    "size: which layers run depends on the data. Leave it, or what chooses the route, in float by a rule"
                )
            for (x, _), out in zip(inputs, outputs, strict=True):
                for windows, y in _windows(layer, x, out):
                    missing = y - torch.einsum("mgk,gok->mgo", windows, weight)
                    gram = torch.einsum("mgk,mgl->gkl", windows, windows)
                    found = [gram, torch.einsum("mgo,mgk->gok", missing, windows), missing.square().sum(0), y.square().sum(0)]
                    sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
                    count += len(windows)
            inputs.clear()
            outputs.clear()
    if not all(bool(total.isfinite().all()) for total in sums):
        raise QATError(f"{path}: NaN or infinity in its input or output. Check the data and the weights before it")
    return Moments(*(total / count for total in sums))


def _grouped(layer: Any) -> Tensor:
    """The weight as ``(groups, C_out / groups, K)``, float32, detached."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.detach().float().reshape(groups, layer.weight.shape[0] // groups, -1)


def _windows(layer: Any, x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What each output is computed from, ``(M, groups, K)``, and it without bias, ``(M, groups, C_out / groups)``."""
    x, out = x.float(), out.float()
    if not isinstance(layer, CONVS):
        y = out if layer.bias is None else out - layer.bias.detach().float()
        yield x.reshape(-1, 1, x.shape[-1]), y.reshape(-1, 1, out.shape[-1])
        return
    dims = layer.weight.ndim - 2
    x, out = x.reshape(-1, *x.shape[-dims - 1 :]), out.reshape(-1, *out.shape[-dims - 1 :])
    y = out if layer.bias is None else out - layer.bias.detach().float().reshape(-1, *[1] * dims)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for d in range(dims):
        x = x.unfold(2 + d, layer.dilation[d] * (layer.kernel_size[d] - 1) + 1, layer.stride[d])
    # Views so far; from (N, C_in, positions, kernel) to (N, positions, C_in, kernel).
    kernel: tuple[Any, ...] = (Ellipsis, *(slice(None, None, step) for step in layer.dilation))
    x = x[kernel].movedim(1, 1 + dims)
    images = max(_CHUNK // math.prod(x.shape[1:]), 1)
    for part, wanted in zip(x.split(images), y.movedim(1, -1).split(images), strict=True):
        windows = part.reshape(-1, layer.groups, math.prod(x.shape[1 + dims :]) // layer.groups)
        yield windows, wanted.reshape(len(windows), layer.groups, -1)


def _round_layer(path: str, layer: QuantLayer, moments: Moments, steps: int) -> RoundedLayer:
    weight, site = _grouped(layer), layer.weight_quantizer
    site.refresh(layer.weight)
    site.follow = False
    # Per tensor or per output channel, the first dimension of the weight.
    scale = site.scale.detach().reshape(-1).expand(layer.weight.shape[0]).reshape(*weight.shape[:2], 1)
    nearest = quantize(layer.weight.detach(), site.scale.detach(), axis=site.axis, fmt=site.fmt).reshape(weight.shape)
    learned = learn_codes(weight / scale, nearest, scale, moments, site.fmt, steps)
    before, after = moments.error(nearest * scale - weight), moments.error(learned * scale - weight)
    codes = torch.where((after < before).unsqueeze(-1), learned, nearest)
    with torch.no_grad():
        layer.weight.copy_((codes * scale).reshape(layer.weight.shape))
    total = moments.signal.sum().clamp(min=torch.finfo(torch.float32).tiny)
    moved = (codes != nearest).float().mean()
    return RoundedLayer(path, moved.item(), (before.sum() / total).item(), (torch.minimum(after, before).sum() / total).item())


def learn_codes(ratio: Tensor, nearest: Tensor, scale: Tensor, moments: Moments, fmt: Format, steps: int) -> Tensor:
    """Codes next to ``ratio`` whose outputs come near the wanted ones (equations 21 to 24).

    Args:
        ratio: Weights over their scale, shape ``(groups, C_out / groups, K)``, float32.
        nearest: The nearest codes, same shape. Those at the ends of the format's range stay.
        scale: Shape ``(groups, C_out / groups, 1)``.
        moments: Of the layer.
        fmt: Number format.
        steps: Steps of Adam.

    Returns:
        Codes in float32, within ``[fmt.qmin, fmt.qmax]``.
    """
    floor, fixed = ratio.floor(), nearest.abs() >= fmt.qmax
    # So that the sigmoid begins at the weights as they are.
    variable = -((_ZETA - _GAMMA) / (ratio - floor - _GAMMA) - 1).log()
    variable.requires_grad_()
    # In units of what rounding to the nearest does to each channel, one weight of the regularizer suits all layers.
    unit = (((nearest - ratio) * scale) @ moments.gram * (nearest - ratio) * scale).sum(-1, keepdim=True)
    unit = unit.clamp(min=torch.finfo(torch.float32).tiny)
    optimizer = torch.optim.Adam([variable], lr=_TRAVEL / steps)
    with torch.enable_grad():
        for step in range(steps):
            up = _rectified_sigmoid(variable)
            change = (torch.where(fixed, nearest, floor + up) - ratio) * scale
            # The gradient of the quadratic error by hand: one product instead of two.
            slope = 2 * (change.detach() @ moments.gram - moments.missing) / unit
            loss = (slope * change).sum() + _REGULARIZATION * _regularizer(up, step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    up = (_rectified_sigmoid(variable.detach()) >= 0.5).float()
    return torch.where(fixed, nearest, floor + up).clamp(fmt.qmin, fmt.qmax)


def _rectified_sigmoid(variable: Tensor) -> Tensor:
    return (variable.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def _regularizer(up: Tensor, time: float) -> Tensor | float:
    """Draws ``up`` to 0 or 1; nothing during the warm-up, then ever steeper (equation 24)."""
    if time < _WARM_UP:
        return 0.0
    begin, end = _BETA
    beta = end + (begin - end) * (1 + math.cos(math.pi * (time - _WARM_UP) / (1 - _WARM_UP))) / 2
    return (1 - (2 * up - 1).abs().pow(beta)).sum()
