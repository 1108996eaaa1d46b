"""Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization", arXiv 1906.04721, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.quantizer import quantizers, switched_off
from ..errors import QATError
from ..nn.layers import is_conv_transposed, is_quantizable
from ..preparation.check import check_model
from ..support.inputs import call, output_tensors
from ..support.modes import hooked, looking_at, unchanged_tensors
from ..support.text import Printed
from .passes import unchanged_on_failure
from .scaling import Pair, Rows
from .wiring import Wiring, observe_wiring

# Powers of two scale floats exactly. Large ones push activations past any bound that a clipping function could have.
_TRIAL_EXPONENT = 16
_SWEEPS = 20
# Largest logarithm of a scale in the last sweep.
_CONVERGED = 1e-2

Outputs = dict[str, list[Tensor]]


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers whose channels were scaled against each other.

    Attributes:
        first: Path of the layer whose output channels were divided by the scales.
        norm: Path of the batch normalization after it, whose weight and bias took the division; ``""`` if there is none.
        second: Path of the layer whose input channels were multiplied.
        before: Largest over smallest range of the second layer's input channels, dead ones left out.
        after: The same, afterwards.
    """

    first: str
    norm: str
    second: str
    before: float
    after: float


@dataclass(frozen=True)
class EqualizedRows:
    """A layer whose output channels have one range now, since batch normalization undoes their scales.

    Attributes:
        layer: Path of the layer.
        norm: Path of the batch normalization.
        before: Largest over smallest range of the layer's output channels, dead ones left out.
        after: The same, afterwards.
    """

    layer: str
    norm: str
    before: float
    after: float


@dataclass(frozen=True)
class Equalization(Printed):
    """Result of :func:`equalize`; prints as a table.

    Attributes:
        pairs: Layers that were scaled against each other.
        rows: Layers whose scales batch normalization undoes.
        left: Layers that alone read another one's output and were not scaled against it, and why.
        difference: Largest change of an output of the model, relative to the largest output.
    """

    pairs: tuple[EqualizedPair, ...]
    rows: tuple[EqualizedRows, ...]
    left: dict[str, str]
    difference: float

    def __rich__(self) -> Table:
        caption = f"largest change of an output: {self.difference:.1e}"
        table = Table(title="Cross-layer equalization", caption=caption)
        for column in ("layer", "batch norm", "read by"):
            table.add_column(column, overflow="fold")
        for column in ("range ratio before", "after"):
            table.add_column(column, justify="right")
        for pair in self.pairs:
            table.add_row(pair.first, pair.norm, pair.second, f"{pair.before:.3g}", f"{pair.after:.3g}")
        for rows in self.rows:
            table.add_row(rows.layer, rows.norm, "", f"{rows.before:.3g}", f"{rows.after:.3g}")
        for path, why in self.left.items():
            table.add_row("", "", f"{path}: {why}", "", "")
        return table


def equalize(model: nn.Module, example_inputs: Any) -> Equalization:
    """Scale the channels of layers against each other so that their ranges become alike, in place.

    Two things may be scaled without changing what the model computes, up to float rounding:

    - A channel between two layers, if all that lies between is scale-equivariant (ReLU, max and average pooling, flattening):
      the first layer divides by ``s``, the second multiplies by it. ``s = sqrt(r1 / r2)`` makes both ranges
      ``sqrt(r1 * r2)`` (equation 11); chains of layers are swept until nothing moves. Where batch normalization follows
      the first layer it is folded into ``r1``, and its weight and bias take the division. ``r2`` is taken of the second
      layer's weight as it is; folding its normalization in as well, as the paper does, was worse on the digits.
    - An output channel of a layer that batch normalization reads: its statistics are scaled with it, and nothing else sees
      it. All output channels get one range, so that one weight scale a tensor is as good as one a channel. The running
      statistics remain those of the layer's output, so the normalization may train on.

    What can be scaled is not looked up but tried: with random powers of two, which are exact in floats, all outputs of the
    model and of its layers must stay equal bit for bit. So a clipping activation (ReLU6) or a second reader leaves a pair as
    it is, in any architecture. Convolutions may be grouped; transposed ones, attention, and layers that run more than once in
    a forward are left. While a layer does not run in evaluation (an auxiliary head), pairs are left, too: in training it may
    read what would be scaled. Biases are not absorbed (section 4.1.3).

    Equalization brings most to weights with one scale a tensor and to few bits. Call it before :func:`qat.calibrate`.

    Args:
        model: A float model, or a prepared one without ranges.
        example_inputs: How to call the model: a tuple of positional arguments, a dict of keyword arguments, or the one
            argument. No statistics are taken from them, but they should look like data.

    Returns:
        What was scaled, and how unequal the ranges were before and after.

    Raises:
        QATError: For a wrapped or calibrated model, or one whose outputs differ from call to call. If anything fails, the
            model is left as it was.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[0] *= 50
        >>> report = equalize(model, torch.randn(1, 3, 8, 8))
        >>> [(pair.first, pair.second) for pair in report.pairs]
        [('0', '2')]
    """
    check_model(model)
    for path, site in quantizers(model):
        if site.has_range:
            raise QATError(f"{path}: has a range already. Equalize before qat.calibrate(model, loader)")
    half = next((path for path, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise QATError(f"{half}: is in half precision, in which trial scales overflow. Equalize in float32, then convert")
    wiring = observe_wiring(model, lambda m: call(m, example_inputs))
    with looking_at(model, keep_tensors=False), switched_off(model):
        reference = _outputs(model, example_inputs)
        if not _equal(_outputs(model, example_inputs), reference, set()):
            raise QATError(
                "model: gives other outputs for the same inputs, so no scaling can be checked. Remove what is random"
            )
        if not any(t.numel() and bool(t.any()) for t in reference[""]):
            raise QATError("example_inputs: the model gives no tensor, or only zeros, by which scaling could be checked")
        candidates, left = _candidates(model, wiring)
        with unchanged_on_failure(t for scaling in candidates for t in scaling.tensors):
            scalings = _invariant(model, candidates, example_inputs, reference)
            before = [scaling.ratio() for scaling in scalings]
            _sweep(scalings)
            difference = _difference(_outputs(model, example_inputs)[""], reference[""])
    pairs, rows = [], []
    for scaling, ratio in zip(scalings, before, strict=True):
        if isinstance(scaling, Pair):
            pairs.append(EqualizedPair(*scaling.paths, ratio, scaling.ratio()))
        else:
            rows.append(EqualizedRows(*scaling.paths, ratio, scaling.ratio()))
    scaled = {pair.second for pair in pairs}
    for scaling in candidates:
        if isinstance(scaling, Pair) and scaling.paths[2] not in scaled:
            left[scaling.paths[2]] = f"scaling what it reads of {scaling.paths[0]} changes the outputs"
    return Equalization(tuple(pairs), tuple(rows), left, difference)


def _candidates(model: nn.Module, wiring: Wiring) -> tuple[list[Rows | Pair], dict[str, str]]:
    """All scalings that the wiring suggests, and why other readers are left."""
    found: list[Rows | Pair] = []
    left: dict[str, str] = {}
    norms = {path: norm for path, norm in wiring.norms.items() if _has_parameters(model.get_submodule(norm))}
    readers: dict[str, list[str]] = {}
    for path, sources in wiring.sources.items():
        for source in sources:
            readers.setdefault(source, []).append(path)
    for first, (second, *more) in readers.items():
        if more or wiring.sources[second] != {first}:
            continue
        why = _unsuited(model, wiring, first, second)
        if why:
            left[second] = why
        else:
            found.append(Pair(model, first, norms.get(first, ""), second))
    for path, norm in norms.items():
        layer = model.get_submodule(path)
        if not is_conv_transposed(layer) and not parametrize.is_parametrized(layer):
            found.append(Rows(model, path, norm))
    return found, left


def _layers(model: nn.Module) -> list[str]:
    """Paths of the convolutions and linear layers that a forward calls; attention only reads the weights of its own."""
    attention = {id(m) for outer in model.modules() if isinstance(outer, nn.MultiheadAttention) for m in outer.modules()}
    return [path for path, m in model.named_modules() if is_quantizable(m) and id(m) not in attention]


def _has_parameters(norm: Any) -> bool:
    return norm.weight is not None and norm.running_var is not None


def _unsuited(model: nn.Module, wiring: Wiring, first: str, second: str) -> str:
    layers: list[Any] = [model.get_submodule(first), model.get_submodule(second)]
    idle = next((path for path in _layers(model) if path not in wiring.calls), None)
    if idle is not None:
        return f"{idle} did not run, and may read in training what would be scaled"
    if any(parametrize.is_parametrized(layer) for layer in layers):
        return f"it or {first} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if not all(is_quantizable(layer) and not is_conv_transposed(layer) for layer in layers):
        return f"it or {first} is a transposed convolution or attention"
    if wiring.calls[first] != 1 or wiring.calls[second] != 1:
        return f"it or {first} runs more than once"
    width, channels = layers[1].weight.shape[1] * getattr(layers[1], "groups", 1), layers[0].weight.shape[0]
    return f"its {width} inputs are no multiple of the {channels} channels of {first}" if width % channels else ""


def _outputs(model: nn.Module, inputs: Any) -> Outputs:
    """Copies of all outputs of the layers, by path, and of the model, by ``""``."""
    found: Outputs = {}

    def keep(path: str) -> Any:
        # A copy: an activation may work in place.
        return lambda module, args, out: found.setdefault(path, []).append(out.clone())

    layers = [(path, m) for path, m in model.named_modules() if is_quantizable(m)]
    with hooked(m.register_forward_hook(keep(path)) for path, m in layers), unchanged_tensors(model):
        out = call(model, inputs)
    found[""] = found.get("", []) + [t.clone() for t in output_tensors(out)]
    return found


def _equal(found: Outputs, wanted: Outputs, besides: set[str]) -> bool:
    return all(
        len(found.get(path, ())) == len(wanted[path]) and all(map(torch.equal, found[path], wanted[path]))
        for path in wanted
        if path == "" or path not in besides
    )


def _invariant(model: nn.Module, scalings: Sequence[Rows | Pair], inputs: Any, reference: Outputs) -> list[Rows | Pair]:
    """Those scalings that leave all outputs as they are, found by trying all at once, then halves of what failed."""
    if not scalings:
        return []
    before = [(t, t.clone()) for scaling in scalings for t in scaling.tensors]
    unchanged = True
    # Up and down: of few channels, all might move away from where an activation clips.
    for sign in (1, -1):
        generator = torch.Generator().manual_seed(0)
        try:
            for scaling in scalings:
                t = scaling.tensors[0]
                exponents = torch.randint(-_TRIAL_EXPONENT, _TRIAL_EXPONENT + 1, t.shape[:1], generator=generator)
                scaling.try_scale((sign * exponents.double()).exp2().to(t.device))
            unchanged = unchanged and _equal(_outputs(model, inputs), reference, {scaling.changed for scaling in scalings})
        finally:
            for t, value in before:
                t.copy_(value)
    if unchanged:
        return list(scalings)
    if len(scalings) == 1:
        return []
    half = len(scalings) // 2
    return [kept for part in (scalings[:half], scalings[half:]) for kept in _invariant(model, part, inputs, reference)]


def _sweep(scalings: Sequence[Rows | Pair]) -> None:
    pairs = [scaling for scaling in scalings if isinstance(scaling, Pair)]
    for _ in range(_SWEEPS):
        if max((pair.step() for pair in pairs), default=0.0) < _CONVERGED:
            break
    # Afterwards: a pair changes the rows of its second layer.
    for scaling in scalings:
        if isinstance(scaling, Rows):
            scaling.step()


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    largest = max((t.abs().max().item() for t in wanted if t.numel()), default=0.0)
    apart = max(
        ((a.double() - b.double()).abs().max().item() for a, b in zip(found, wanted, strict=True) if a.numel()), default=0.0
    )
    return apart / largest if largest else apart
