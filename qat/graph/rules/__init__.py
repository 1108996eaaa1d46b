"""The rules of :func:`qat.export.check_onnx`: functions from a graph and a target to findings."""

from . import errors, losses, notes
from .finding import TARGETS, Finding, Rule, Target

RULES: tuple[Rule, ...] = (*errors.RULES, *losses.RULES, *notes.RULES)

__all__ = ["RULES", "TARGETS", "Finding", "Target"]
