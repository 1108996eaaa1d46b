"""One run of a recipe, as its folder holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import QATError
from ..preparation import Report
from ..report import ResultTable
from ..support.tensor_files import read_tensors


@dataclass(frozen=True)
class SavedRun:
    """One run of a recipe.

    Attributes:
        model: The fine-tuned network with its sites.
        placement: What is quantized, and what is not.
        batches: Validation images and their labels, or targets.
        baseline_state: The state before fine-tuning: of the PTQ model, or of the float model where that was not written.
        baseline_name: What that state is called.
        results: The tables of the run.
        title: Network and data.
    """

    model: nn.Module
    placement: Report
    batches: list[tuple[Tensor, Any]]
    baseline_state: Mapping[str, Tensor] | None
    baseline_name: str
    results: list[ResultTable]
    title: str


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        QATError: If it is none.
    """
    remedy = "Run the recipe again, or remove the file"
    state = read_tensors(path, remedy=remedy)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise QATError(f"{path}: no state dict. {remedy}")
    return state
