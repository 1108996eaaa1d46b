"""The arguments of :class:`~qat.QATCallback`, checked where the user passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import calibrate
from ..calibration.collect import check_data
from ..errors import QATError
from ..export import export_onnx


def calibration_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of :func:`qat.calibrate`, without the model and the data.

    Raises:
        QATError: For an unknown key, or ``batches`` that is no number from 1.
    """
    found = dict(given or {})
    _check_keys("calibration", found, calibrate, ("model", "data"))
    batches = found.get("batches")
    if batches is not None and not (isinstance(batches, int) and batches > 0):
        raise QATError(f"calibration: batches={batches!r}: must be a number from 1, or None for all")
    return found


def export_settings(given: str | Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of :func:`qat.export_onnx`, without the model.

    Raises:
        QATError: For an unknown key, or without a ``path``.
    """
    if given is None:
        return None
    found = dict(given) if isinstance(given, Mapping) else {"path": given}
    _check_keys("export", found, export_onnx, ("model",))
    if "path" not in found:
        raise QATError("export: a mapping needs 'path', the ONNX file to write")
    return found


def check_calibration_data(data: Iterable[Any] | None) -> None:
    """Refuse what is no iterable of batches, with a word for a function.

    Raises:
        QATError: If :func:`qat.calibrate` could not read it.
    """
    if data is None:
        return
    if callable(data) and not hasattr(data, "__iter__"):
        raise QATError("calibration_data: is a function; pass a loader or a list of batches")
    check_data(data, None)


def check_choices(
    *,
    log_ranges: object,
    freeze_bn_epoch: int | None,
    freeze_ranges_epoch: int | None,
    range_lr_factor: float,
    reestimate_bn: int | None,
    distill_from: object,
    dampen_oscillations: float,
) -> None:
    """Refuse numbers and words out of their range.

    Raises:
        QATError: Naming the argument and what it may be.
    """
    if log_ranges not in ("summary", "sites", None):
        raise QATError(f"log_ranges={log_ranges!r}: choose 'summary', 'sites' or None")
    for name, epoch in (("freeze_bn_epoch", freeze_bn_epoch), ("freeze_ranges_epoch", freeze_ranges_epoch)):
        if epoch is not None and epoch < 0:
            raise QATError(f"{name}={epoch}: must be an epoch from 0, or None never to freeze")
    if not range_lr_factor > 0:
        raise QATError(f"range_lr_factor={range_lr_factor}: must be above 0")
    if reestimate_bn is not None and reestimate_bn < 1:
        raise QATError(f"reestimate_bn={reestimate_bn}: must be a number of batches from 1, or None")
    if distill_from is not None and distill_from != "float" and not isinstance(distill_from, nn.Module):
        raise QATError(f"distill_from={distill_from!r}: must be a model, or 'float' for the one before it is quantized")
    if not dampen_oscillations >= 0:
        raise QATError(f"dampen_oscillations={dampen_oscillations}: must be at least 0, which leaves it out")


def _check_keys(argument: str, given: Mapping[str, Any], function: Callable[..., Any], besides: tuple[str, ...]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in besides]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise QATError(f"{argument}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
