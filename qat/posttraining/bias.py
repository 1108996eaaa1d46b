"""Empirical bias correction (Nagel et al. 2019, "Data-Free Quantization", arXiv 1906.04721, section 4.2 and appendix D)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QATError
from ..nn.layers import CONVS, CONVS_TRANSPOSED
from ..support.modes import hooked
from .passes import Passes, WalkResult, clipping_only, listen, walking


@dataclass(frozen=True)
class CorrectedBias:
    """One layer whose mean output was put back.

    Attributes:
        path: Of the layer.
        where: What took the correction: a path of a parameter or buffer.
        shift: Root mean square over the channels of what rounding had shifted the mean output by.
        spread: Root mean square over the channels of the float output's standard deviation, to compare ``shift`` with.
    """

    path: str
    where: str
    shift: float
    spread: float


@dataclass(frozen=True)
class BiasCorrection(WalkResult[CorrectedBias]):
    """Result of :func:`correct_biases`; prints as a table.

    Attributes:
        layers: What was corrected, in order.
        left: Why a quantized layer was not, by its path.
    """

    _title = "Bias correction"
    _texts = ("layer", "corrected in")
    _numbers = ("shift / standard deviation",)

    def _cells(self, layer: CorrectedBias) -> tuple[str, ...]:
        return layer.path, layer.where, f"{layer.shift / layer.spread:.2%}" if layer.spread else "-"


def correct_biases(
    model: nn.Module, data: Iterable[Any], *, batches: int | None = None, progress: bool = True
) -> BiasCorrection:
    """Put the mean output of every quantized convolution and linear layer back to what it is without rounding, in place.

    Rounding a weight shifts the mean of what the layer computes, by channel: ``E[W x] - E[W_hat x_hat]``. Layer by layer, in
    the order in which they run, that difference is added to the bias; those before are corrected already when a layer is
    measured. What the ranges clip is taken as given: the float means are those of activations clipped as the sites do, since
    a few extreme values can hold more than all the others, and a bias moves all.

    A layer without a bias whose output batch normalization reads gets it subtracted from ``running_mean``, which is by
    definition the mean of this output; that serves whatever the normalization's weight is. No parameter is added: a layer
    with neither is left and reported.

    One pass over the data for the float means, and one for each layer, which ends at that layer. In memory are two numbers a
    channel.

    Args:
        model: A calibrated model, at best before fine-tuning.
        data: A loader of batches as :func:`qat.calibrate` takes them; it is iterated once for each layer.
        batches: Stop each pass after that many; ``None`` takes all.
        progress: Show a progress bar.

    Returns:
        What was corrected where, and by how much.

    Raises:
        QATError: If the model is not calibrated or runs in several processes, or the data are no re-iterable, non-empty
            loader. If anything fails, the model is left as it was.
    """
    passes = Passes(model, data, batches)
    targets, left = _targets(model, passes)
    moments = {path: _Moments(model.get_submodule(path)) for path in targets}
    with clipping_only(model):
        _listen_all(passes, model, moments)
    done = []
    held = [target for _, target in targets.values()]
    with walking(targets, "Correcting biases", held=held, progress=progress) as walk:
        for path, (where, target) in walk:
            found = _Moments(model.get_submodule(path))
            _listen_all(passes, model, {path: found}, until=path)
            shift = found.mean - moments[path].mean
            if not bool(shift.isfinite().all()):
                raise QATError(f"{path}: its output is NaN or infinite. Check the data and the weights before it")
            sign = 1.0 if where.endswith(".running_mean") else -1.0
            with torch.no_grad():
                target.add_((sign * shift).to(target))
            done.append(CorrectedBias(path, where, _rms(shift), _rms(moments[path].variance.sqrt())))
    return BiasCorrection(tuple(done), left)


def _targets(model: nn.Module, passes: Passes) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """What takes the correction of each layer, and its path; why others are left."""
    targets: dict[str, tuple[str, Tensor]] = {}
    left: dict[str, str] = {}
    for path, layer in passes.layers().items():
        norm = passes.wiring.norms.get(path)
        statistics: Any = None if norm is None else model.get_submodule(norm).running_mean
        bias: Any = layer.bias
        if bias is not None:
            targets[path] = f"{path}.bias", bias
        elif statistics is not None:
            targets[path] = f"{norm}.running_mean", statistics
        else:
            left[path] = "no bias, and no batch normalization with statistics reads its output: give it a bias"
    return targets, left | passes.attention()


class _Moments:
    """Mean and variance of a layer's output, by channel, float64."""

    def __init__(self, layer: nn.Module) -> None:
        self._spatial = layer.weight.ndim - 2 if isinstance(layer, CONVS + CONVS_TRANSPOSED) else 0
        self._count = 0
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, out: Tensor) -> None:
        """Count the outputs of one call."""
        by_channel = out.detach().movedim(-1 - self._spatial, -1).flatten(0, -2).double()
        self._count += by_channel.shape[0]
        self._sum = by_channel.sum(0) + self._sum.to(out.device)
        self._square = by_channel.square().sum(0) + self._square.to(out.device)

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self._count, 1)

    @property
    def variance(self) -> Tensor:
        return (self._square / max(self._count, 1) - self.mean.square()).clamp(min=0)


def _listen_all(passes: Passes, model: nn.Module, moments: dict[str, _Moments], *, until: str | None = None) -> None:
    with hooked(listen(model.get_submodule(path), item.add) for path, item in moments.items()):
        for _ in passes.each(model, until=until):
            pass


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
