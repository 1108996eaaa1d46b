"""The first tensor that departs, among thousands, with few builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import QATError
from .outcome import TensorCheck
from .reference import Cut

# So many tensors are marked at once. More would undo the fusions that are under suspicion.
AT_ONCE = 8

Probe = Callable[[list[str]], tuple[dict[str, TensorCheck], bool]]


class Vanished(Exception):
    """The outputs agree as soon as a tensor is marked.

    Args:
        check: Of that tensor.
    """

    def __init__(self, check: TensorCheck) -> None:
        super().__init__(check.tensor)
        self.check = check


def first_departure(cuts: Mapping[str, Cut], bad: str, probe: Probe) -> tuple[TensorCheck, tuple[TensorCheck, ...]]:
    """A tensor that departs although nothing it is computed from does.

    As in a history of commits with merges: what a good tensor is computed from is taken for good, and of what a bad one is
    computed from, the tensor that halves the rest comes next: about log2(n) builds for n tensors.

    Args:
        cuts: The tensors that can be marked, in topological order.
        bad: One that is known to depart.
        probe: Builds an engine with the tensors marked as outputs; gives their checks, and whether the original outputs
            still depart.

    Returns:
        The tensor, and those before it that were compared with it in the same engine.

    Raises:
        Vanished: If the outputs agree in an engine with a tensor marked.
        QATError: If no tensor departs in an engine in which ``bad`` is marked.
    """
    bits = {name: 1 << i for i, name in enumerate(cuts)}
    # Each tensor and all it is computed from.
    history: dict[str, int] = {}
    for name, cut in cuts.items():
        history[name] = bits[name]
        for before in cut.before:
            history[name] |= history[before]
    remaining = history[bad]
    while remaining.bit_count() > AT_ONCE:
        total = remaining.bit_count()
        candidates = [name for name in cuts if bits[name] & remaining and name != bad]
        chosen = max(candidates, key=lambda name: min(share := (history[name] & remaining).bit_count(), total - share))
        checks, still_departs = probe([chosen])
        if checks[chosen].departs:
            bad, remaining = chosen, history[chosen] & remaining
        elif still_departs:
            remaining &= ~history[chosen]
        else:
            raise Vanished(checks[chosen])
    suspects = [name for name in cuts if bits[name] & remaining]
    above = {name for suspect in suspects for name in cuts[suspect].before}
    marked = [name for name in cuts if name in above or name in suspects]
    checks, still_departs = probe(marked)
    for name in marked:
        if checks[name].departs:
            return checks[name], tuple(checks[other] for other in cuts[name].before if other in checks)
    if still_departs:
        raise QATError(f"{bad}: departs when it is marked alone, but not together with {', '.join(marked)}")
    raise Vanished(checks[bad])
