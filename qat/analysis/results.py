"""Results print as tables and give plain values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..support.text import Plain, Printed


class Result(Printed, Plain):
    """Mixin of the dataclasses that the analyses return."""

    @abstractmethod
    def table(self) -> Table:
        """For a terminal; ``print`` shows the same."""

    def __rich__(self) -> Table:
        return self.table()


def make_table(
    title: str, names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
) -> Table:
    """A table whose first columns hold text and whose others hold numbers."""
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for column in names:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # paths are no markup
    return table


TITLES = {"on": "One layer quantized, all others in float", "off": "One layer in float, all others quantized"}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer switched.

    Attributes:
        path: Module path.
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"add"``, ``"gate"`` or ``"pool"``.
        value: The metric with this layer switched.
        change: ``value`` less the metric before: harm done (``"on"``, positive) or gain (``"off"``, negative).
    """

    path: str
    kind: str
    value: float
    change: float


@dataclass(frozen=True)
class Sensitivity(Result):
    """What switching the layers one by one does; prints as a table, the most sensitive layers first.

    Attributes:
        layers: By falling harm or gain.
        switch: ``"on"``: each quantized alone; ``"off"``: each in float alone.
        base: The metric with no layer switched: of the float model for ``"on"``, of the quantized one for ``"off"``.
        metric: Name of the metric.
        exact: Whether the values are those of complete evaluations; otherwise estimates.
    """

    layers: tuple[LayerSensitivity, ...]
    switch: str
    base: float
    metric: str
    exact: bool

    def table(self) -> Table:
        rows = [(x.path, x.kind, f"{x.value:.4g}", f"{x.change:+.4g}") for x in self.layers]
        caption = f"Before: {self.base:.4g}. " + ("Exact" if self.exact else "Estimated to first order")
        return make_table(TITLES[self.switch], ("layer", "kind"), (self.metric, "change"), rows, caption)


def ranked(
    values: Mapping[str, float], kinds: Mapping[str, str], switch: str, base: float, metric: Callable[..., Any], *, exact: bool
) -> Sensitivity:
    """The result for a metric by path, the most sensitive layer first."""
    layers = [LayerSensitivity(path, kinds[path], value, value - base) for path, value in values.items()]
    layers.sort(key=lambda layer: layer.change, reverse=switch == "on")
    return Sensitivity(tuple(layers), switch, base, getattr(metric, "__name__", type(metric).__name__), exact)
