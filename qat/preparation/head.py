"""Finding the classifier head: every weighted layer with no other weighted layer between it and an output."""

from __future__ import annotations

from ..errors import QATError
from .flow import Flow, Untraceable
from .run import Run

_NAME_IT = "name it: QuantConfig(head=['classifier']), or QuantConfig(head=()) for a model without one"


def find_head(flow: Flow, run: Run | None) -> tuple[set[str], str]:
    """The head's layers and how they were found: by tracing, else by the run on example inputs.

    Args:
        flow: The model's dataflow.
        run: What a run on example inputs showed, if there are any.

    Raises:
        QATError: When neither shows it.
    """
    try:
        layers = flow.outputs("").layers
        if layers:
            return layers, "found by tracing"
        reason = "no convolution or linear layer reaches an output of the traced forward"
    except Untraceable as error:
        reason = str(error)
    if run is None:
        raise QATError(f"The classifier head was not found: {reason}. Pass example_inputs=, or {_NAME_IT}")
    if not run.head:
        raise QATError(
            "The classifier head was not found: running example_inputs, no convolution or linear layer reached an "
            f"output. Check that they make the model return something, or {_NAME_IT}"
        )
    return run.head, "found by running example_inputs"
