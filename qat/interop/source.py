"""What a model of pytorch-quantization says about its quantizers: by the keys of its state dict, or by its live modules.

Nothing is imported from that package; key layout and attributes are those of its release 2.2.1. The state dicts of ModelOpt
differ by a missing underscore (``input_quantizer._amax``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..core.numerics import FORMATS, INT4, INT8, Format
from ..errors import QATError
from ..support.tensor_files import read_tensors

# The last parts of a quantizer's keys. A learned range is stored as the limits of its clipping.
_AMAX, _LOW, _HIGH = "_amax", "clip.clip_value_min", "clip.clip_value_max"
_OF_LAYER = re.compile(r"_?(input|weight)_quantizer")
_OF_QUANTIZER = re.compile(r"(?:^|\.)_?(?:input|weight|output)_quantizers?\.")


@dataclass(frozen=True)
class Source:
    """One quantizer that was found.

    Attributes:
        name: Its path in the other tool's model, such as ``layer1.0.conv1._input_quantizer``.
        amax: As stored, in float32 on the CPU; ``None`` if it was never calibrated.
        fmt: Its number format.
        note: What else is to be known.
    """

    name: str
    amax: Tensor | None
    fmt: Format = INT8
    note: str = ""

    @property
    def owner(self) -> str:
        """Path of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def role(self) -> str | None:
        """``"input"`` or ``"weight"`` of a layer; ``None`` for one that stands alone in a forward."""
        match = _OF_LAYER.fullmatch(self.name.rpartition(".")[2])
        return match[1] if match else None

    @property
    def is_original(self) -> bool:
        """Whether pytorch-quantization made it, not ModelOpt: its layers compute some paddings in their own way."""
        return self.name.rpartition(".")[2].startswith("_")


def read_state(state_dict: Mapping[str, Any] | str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict by the names that ``model`` has for its own.

    A dict around it (``{"model": ...}``) is looked into, and a prefix that all keys share (``module.``) is taken off.

    Raises:
        QATError: If a file cannot be read without executing code in it, or if there is no state dict with ranges, or several.
    """
    if isinstance(state_dict, str | os.PathLike):
        where = os.fspath(state_dict)
        content = read_tensors(where, remedy="Save model.state_dict() alone")
    else:
        where, content = "state_dict", state_dict
    found = _find(content)
    if not found:
        raise QATError(
            f"{where}: holds no range of a quantizer: no key ends in _amax. Pass the state dict of a calibrated model"
        )
    if len(found) > 1:
        raise QATError(f"{where}: holds several state dicts: {', '.join(map(repr, found))}. Pass one of them")
    state = next(iter(found.values()))
    broken = [key for key, value in state.items() if not isinstance(value, Tensor) and not key.endswith("_extra_state")]
    if broken:
        raise QATError(f"{where}: {broken[0]} is a {type(state[broken[0]]).__name__}, not a tensor")
    return _without_prefix(state, set(model.state_dict()))


def _find(content: Any) -> dict[str, Mapping[str, Any]]:
    """The state dicts with ranges in ``content``: itself, or the values of the mapping it is."""
    if not isinstance(content, Mapping):
        return {}
    if _holds_ranges(content):
        return {"itself": content}
    return {str(key): value for key, value in content.items() if _holds_ranges(value)}


def _holds_ranges(content: Any) -> bool:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return False
    return any(key.endswith((_AMAX, _HIGH)) for key in content)


def _without_prefix(state: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Take off what wrappers put before all keys, if more of the keys are the model's then."""
    best = dict(state)
    stripped = dict(state)
    while stripped and len({key.partition(".")[0] for key in stripped}) == 1 and all("." in key for key in stripped):
        stripped = {key.partition(".")[2]: value for key, value in stripped.items()}
        if len(known.intersection(stripped)) > len(known.intersection(best)):
            best = stripped
    return best


def split_state(state: Mapping[str, Tensor], owned: set[str]) -> tuple[dict[str, Tensor], list[Source]]:
    """Separate weights from quantizers.

    Args:
        state: As :func:`read_state` gives it.
        owned: Keys that belong to the model whatever they look like.

    Raises:
        QATError: For a key of a quantizer that has no meaning here, or an impossible range.
    """
    weights: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, what = _split_key(key)
        if key in owned or (what is None and not _OF_QUANTIZER.search(f".{key}")):
            weights[key] = value
        elif what is None:
            raise QATError(f"{key}: of a quantizer, but no range. {_why_not(key)}")
        else:
            entries.setdefault(name, {})[what] = value
    return weights, [_from_entries(name, values) for name, values in entries.items()]


def _split_key(key: str) -> tuple[str, str | None]:
    for what in (_AMAX, _LOW, _HIGH):
        if key.endswith("." + what):
            return key[: -len(what) - 1], what
    return key, None


def _why_not(key: str) -> str:
    if key.endswith("_pre_quant_scale"):
        return "Its input is multiplied by a factor first (SmoothQuant): fold the factor into the layers before importing"
    return "Only _amax and the limits of a learned range can be imported"


def _from_entries(name: str, values: Mapping[str, Tensor]) -> Source:
    if _LOW in values or _HIGH in values:
        missing = [what for what in (_LOW, _HIGH) if what not in values]
        if missing:
            raise QATError(f"{name}.{missing[0]}: missing, while the other limit is there")
        return _learned(name, values[_LOW], values[_HIGH])
    return Source(name, checked_amax(name, values[_AMAX]))


def checked_amax(name: str, stored: Tensor) -> Tensor | None:
    """``stored`` in float32 on the CPU; ``None`` if it holds NaN, which is what a quantizer that saw no data stores.

    Raises:
        QATError: If it is not a floating-point tensor, or infinite or negative somewhere.
    """
    if not isinstance(stored, Tensor) or not stored.is_floating_point() or stored.numel() == 0:
        raise QATError(f"{name}._amax: no range: it must be a tensor of floating-point numbers")
    if stored.is_meta:
        raise QATError(f"{name}._amax: on the meta device, it has no values")
    amax = stored.detach().to("cpu", torch.float32, copy=True)
    if bool(amax.isnan().any()):
        return None
    if not bool((amax.isfinite() & (amax >= 0)).all()):
        raise QATError(f"{name}._amax: infinite or negative, so no range")
    return amax


def _learned(name: str, low: Tensor, high: Tensor) -> Source:
    """A learned range: the input is clipped to ``[low, high]``, then quantized by the larger magnitude."""
    if low.numel() != 1 or high.numel() != 1:
        raise QATError(f"{name}.clip: its limits have {low.numel()} and {high.numel()} elements; only single ones are known")
    low, high = low.detach(), high.detach()
    # Both of them, whatever their sign: checked as ranges are.
    smallest, largest = checked_amax(f"{name}.clip", low.abs()), checked_amax(f"{name}.clip", high)
    if smallest is None or largest is None or float(low) > 0 or float(largest) < float(smallest):
        raise QATError(
            f"{name}.clip: clips to [{float(low):g}, {float(high):g}], inside of its grid. qat's grids end at the range: "
            "calibrate this quantizer without learn_amax before importing"
        )
    note = f"learned limits [{float(low):g}, {float(high):g}]: equal for inputs that are not below the lower one"
    return Source(name, largest.reshape(()), note=note)


def is_tensor_quantizer(module: nn.Module) -> bool:
    """Whether ``module`` is a ``TensorQuantizer`` of pytorch-quantization, by its attributes."""
    needed = ("_num_bits", "_axis", "_unsigned", "_narrow_range", "_disabled", "_if_quant", "_fake_quant", "_learn_amax")
    return all(hasattr(module, name) for name in needed)


def read_quantizer(name: str, module: Any, weight: Tensor | None) -> Source | None:
    """What a live ``TensorQuantizer`` does; ``None`` if it is switched off.

    Args:
        name: Its path.
        module: The quantizer.
        weight: What it quantizes, if that is a weight.

    Raises:
        QATError: For a setting that qat has no equal of: TensorRT's INT8 is signed and uses all codes.
    """
    if module._disabled or not module._if_quant:
        return None
    if getattr(module, "_pre_quant_scale", None) is not None:
        raise QATError(f"{name}._pre_quant_scale: {_why_not('_pre_quant_scale')}")
    formats = {INT8.qmax: INT8, INT4.qmax: INT4} if weight is not None else {INT8.qmax: INT8}
    bits = module._num_bits
    fmt = formats.get(2 ** (bits - 1) - 1) if isinstance(bits, int) else None
    if fmt is None:
        raise QATError(
            f"{name}: has num_bits={bits!r}; there are {', '.join(str(known) for known in FORMATS)} for weights, int8 else"
        )
    if module._unsigned:
        raise QATError(
            f"{name}: is unsigned, with 255 steps; TensorRT's INT8 is signed. Switch it off before importing "
            "(quantizer.disable()), or recalibrate it with unsigned=False"
        )
    if not module._fake_quant:
        raise QATError(f"{name}: returns codes (fake_quant=False); only fake quantization can be imported")
    if module._learn_amax:
        source = _learned(name, module.clip.clip_value_min, module.clip.clip_value_max)
        return Source(name, source.amax, fmt, source.note)
    amax = checked_amax(name, module._amax) if hasattr(module, "_amax") else None
    if amax is not None and getattr(module, "_scale_amax", None) is not None:
        amax = amax * module._scale_amax
    if module._narrow_range and not _codes_are_narrow(weight, amax, fmt):
        raise QATError(
            f"{name}: narrow_range=True leaves out the lowest code, which TensorRT uses and this input may reach. Set "
            "quantizer._narrow_range = False first: values below the range then differ by one code"
        )
    return Source(name, amax, fmt)


def _codes_are_narrow(weight: Tensor | None, amax: Tensor | None, fmt: Format) -> bool:
    """Whether no element of ``weight`` has the lowest code."""
    if weight is None or amax is None:
        return False
    if amax.numel() > 1 and amax.ndim != weight.ndim:
        return False
    scale = (amax if amax.numel() > 1 else amax.reshape(())) / fmt.qmax
    return not bool((weight.detach().cpu().float() / scale < -fmt.qmax - 0.5).any())


def drop_disabled(sources: Iterable[Source], disabled: Iterable[str]) -> list[Source]:
    """Leave out the quantizers that one of the globs matches.

    Raises:
        QATError: If a glob matches none.
    """
    if isinstance(disabled, str):
        raise QATError(f"disabled={disabled!r}: pass a list of globs")
    kept = list(sources)
    for glob in disabled:
        remaining = [source for source in kept if not fnmatchcase(source.name, glob)]
        if len(remaining) == len(kept):
            raise QATError(
                f"disabled: {glob!r} matches no quantizer that is left; they are called e.g. {kept[0].name if kept else '-'}"
            )
        kept = remaining
    return kept
