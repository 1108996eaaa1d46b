"""Save and load what quantized models hold besides weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import QuantConfig, Rule
from ..core.quantizer import WeightQuantizer, quantizers
from ..errors import QATError
from ..preparation import Report, prepare, prepared_report, restore
from .ranges import freeze_ranges, frozen_ranges

CHECKPOINT_KEY = "qat"


def quantized_state(model: nn.Module) -> dict[str, Any]:
    """All that :func:`load_quantized_state` needs to build a quantized model from the float one; for ``torch.save``.

    Args:
        model: A prepared model, or one with prepared sub-models.

    Returns:
        Tensors and plain values: ``state_dict``, and under ``qat`` the configurations by the path of the sub-model and the
        paths of the frozen ranges. Checkpoints of :class:`~qat.QATCallback` hold the same.

    Raises:
        QATError: If nothing is prepared.
    """
    if not reports(model):
        raise QATError("model: holds no quantizers. Run qat.prepare(model) first, or save model.state_dict()")
    return {CHECKPOINT_KEY: settings_of(model), "state_dict": model.state_dict()}


def load_quantized_state(model: nn.Module, saved: Mapping[str, Any], *, example_inputs: Any = None) -> None:
    """Prepare a float model as the saved one was, in place, and load its weights and ranges.

    Args:
        model: The float model, or one that is prepared in the same way.
        saved: What :func:`quantized_state` gave, read by ``torch.load(path, weights_only=True)``, or such a checkpoint of
            :class:`~qat.QATCallback` with its LightningModule.
        example_inputs: As for :func:`qat.prepare`.

    Raises:
        QATError: If ``saved`` is something else or was saved with another configuration, or if its weights do not fit. The
            model is then as it was.

    Example:
        >>> import qat, torch
        >>> model, other = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
        >>> _ = qat.prepare(model)
        >>> _ = qat.calibrate(model, [torch.randn(8, 4)], progress=False)
        >>> load_quantized_state(other, quantized_state(model))
        >>> x = torch.randn(3, 4)
        >>> torch.equal(model(x), other(x))
        True
    """
    settings, state = (saved.get(key) if isinstance(saved, Mapping) else None for key in (CHECKPOINT_KEY, "state_dict"))
    if not isinstance(settings, Mapping) or not isinstance(settings.get("configs"), Mapping) or not isinstance(state, Mapping):
        raise QATError("saved: holds no settings of quantization. Pass what quantized_state gave")
    bad = [key for key in state if not isinstance(key, str)]
    bad = bad or [key for key, value in state.items() if is_site_key(key, state) and not bool(value.isfinite().all())]
    if bad:
        raise QATError(f"saved: {bad[0]!r} is no entry of a state dict, or a range that is not finite")
    done: list[nn.Module] = []
    before: dict[str, Any] = {}
    try:
        for path, config in settings["configs"].items():
            part = _part(model, path)
            if prepared_report(part) is None:
                prepare(part, QuantConfig.from_dict(config), example_inputs=example_inputs)
                done.append(part)
        check_same_configs(saved, model)
        own = model.state_dict()
        wrong = [
            key for key in {**own, **state} if getattr(own.get(key), "shape", None) != getattr(state.get(key), "shape", None)
        ]
        if wrong:
            raise QATError(f"saved: does not fit the model: {wrong[0]} is missing, unexpected or of another shape")
        frozen = frozen_in(settings, model)
        if frozen_ranges(model) - frozen_by_config(model) - frozen:
            raise QATError("model: its ranges are frozen, those of the saved one were not. Call qat.restore on it first")
        before = copy.deepcopy(own)
        model.load_state_dict(state)
    except (QATError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        if before:
            model.load_state_dict(before)
        for part in done:
            restore(part)
        if isinstance(error, QATError):
            raise
        raise QATError(f"saved: does not fit the model: {error}") from error
    freeze_ranges(model, refresh=False, sites=frozen)


def _part(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise QATError(f"saved: holds sites of {path!r}, which the model does not have") from error


def reports(model: nn.Module) -> dict[str, Report]:
    """What was prepared, by its path."""
    return {path: report for path, module in model.named_modules() if (report := prepared_report(module))}


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps under ``CHECKPOINT_KEY``, as plain values."""
    return {"configs": configs_of(model), "frozen_ranges": sorted(frozen_ranges(model))}


def frozen_in(settings: Mapping[str, Any], model: nn.Module) -> set[str]:
    """Paths of the sites that were frozen, by what a checkpoint keeps under ``CHECKPOINT_KEY``.

    Raises:
        QATError: If that is no list of paths.
    """
    frozen = settings.get("frozen_ranges", [])
    if isinstance(frozen, bool):
        # As it was written before: all or none.
        return {path for path, _ in quantizers(model)} if frozen else set()
    if not isinstance(frozen, list) or not all(isinstance(path, str) for path in frozen):
        raise QATError(f"frozen_ranges: {frozen!r} in the checkpoint is no list of paths")
    return set(frozen)


def frozen_by_config(model: nn.Module) -> set[str]:
    """Paths of the sites that never followed their weight."""
    found = set()
    for root, report in reports(model).items():
        for path, site in quantizers(model.get_submodule(root)):
            layer = path.rpartition(".")[0]
            if isinstance(site, WeightQuantizer) and report.config.site(layer).weight_range == "frozen":
                found.add(f"{root}.{path}".strip("."))
    return found


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and values of all parameters and buffers: tells whether another process has the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def configs_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The configuration of every prepared sub-model by its path, as plain values."""
    return {path: report.config.to_dict() for path, report in reports(model).items()}


def changed_settings(path: str, prepared: QuantConfig, given: QuantConfig) -> list[str]:
    """The settings that were given and are others than those of what is prepared at ``path``."""
    found = _differing(prepared.to_dict(), given.to_dict())
    if not path and "rules" in found:
        # A whole LightningModule has more rules, for the children that it leaves alone.
        own, more = prepared.rules[: len(given.rules)], prepared.rules[len(given.rules) :]
        if own == given.rules and all(rule == Rule(rule.match, quantize=False) for rule in more):
            found.remove("rules")
    return found


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in a if a[key] != b[key]]


def check_same_configs(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a checkpoint of another configuration than the one that ``model`` is prepared with.

    Raises:
        QATError: With what differs.
    """
    saved = checkpoint.get(CHECKPOINT_KEY, {}).get("configs")
    if saved is None:
        return
    ours = configs_of(model)
    if saved.keys() != ours.keys():
        raise QATError(f"the checkpoint holds other prepared sub-models: {list(saved)}, here {list(ours)}. Pass target=")
    for path, settings in saved.items():
        # Missing keys take their defaults: the checkpoint may be older than a setting.
        theirs, here = QuantConfig.from_dict(settings).to_dict(), ours[path]
        found = [f"{key} (checkpoint {theirs[key]!r}, here {here[key]!r})" for key in _differing(theirs, here)]
        if found:
            raise QATError(f"{path or 'the model'}: the checkpoint was saved with another configuration: {', '.join(found)}")


def is_site_key(key: str, state_dict: Mapping[str, Any]) -> bool:
    """Whether an entry of a state dict is the range of a site: the only entry of its module, float32."""
    owner = key.removesuffix("amax")
    if not key.endswith(".amax") or getattr(state_dict[key], "dtype", None) is None:
        return False
    return not any(other != key and other.startswith(owner) for other in state_dict)
