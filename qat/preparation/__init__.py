"""From a float model to one with Q/DQ sites, in place; and back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.config import QuantConfig
from ..core.quantizer import is_prepared
from ..errors import QATError
from .check import check_model
from .placement import Left, Report, Site
from .plan import make_plan
from .swap import REPORT, apply_plan, undo

__all__ = ["Left", "Report", "Site", "prepare", "prepared_report", "restore"]


def prepare(model: nn.Module, config: QuantConfig | None = None, *, example_inputs: Any = None) -> Report:
    """Put Q/DQ sites into ``model``, in place.

    Sites go to the input and the weight of every convolution and linear layer, to the projections of attention, to both
    inputs of residual Adds and of products with a gate (squeeze-and-excitation), and to the inputs of average pooling; not
    to biases and not to the classifier head. Layers keep their class as a base class, their parameters, state-dict keys and
    hooks. The model computes what it did until ``qat.calibrate`` sets the ranges.

    Args:
        model: A float model on its device, before any wrapping or compilation.
        config: Settings; the defaults if ``None``.
        example_inputs: How to call the model, needed only if its forward cannot be traced to find the head: a tuple of
            positional arguments, a dict of keyword arguments, or the one argument.

    Returns:
        What was placed where, what was left in float and why. Prints as a table.

    Raises:
        QATError: For a model that cannot be prepared, a glob that matches nothing, a head that cannot be found, or when
            there is nothing to quantize. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> report = prepare(model)
        >>> report.summary()
        '4 sites, 4 quantizers: 2 conv; 1 left in float'
        >>> report.head
        ('4',)
    """
    check_model(model)
    if is_prepared(model):
        existing = prepared_report(model)
        if existing is None:
            raise QATError(
                "A part of this model is prepared already: qat.restore(model) first, or prepare its parts one by one"
            )
        if config is not None and config != existing.config:
            raise QATError("This model is prepared with other settings: qat.restore(model) first")
        notice = "This model was prepared before: nothing was changed."
        warnings.warn(notice, stacklevel=2)
        return replace(existing, notice=notice)
    # Tracing runs what does not depend on the inputs, random numbers included: the caller's sequence stays as it was.
    with torch.random.fork_rng(devices=[]):
        plan = make_plan(model, config or QuantConfig(), example_inputs)
    return apply_plan(model, plan)


def prepared_report(model: nn.Module) -> Report | None:
    """The report of the ``prepare`` call that changed ``model``, or ``None``."""
    report = model.__dict__.get(REPORT)
    return report if isinstance(report, Report) else None


def restore(model: nn.Module) -> nn.Module:
    """Undo ``prepare`` completely, in place: classes, forwards and state-dict keys are what they were.

    Args:
        model: A prepared model. Weights keep their present values.

    Returns:
        ``model``.

    Raises:
        QATError: If nothing in it is prepared.
    """
    if undo(model) == 0:
        raise QATError("Nothing to restore: this model is not prepared")
    return model
