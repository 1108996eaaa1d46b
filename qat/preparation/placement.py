"""What ``prepare`` did: every site, everything left in float and why, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.config import QuantConfig
from ..support.text import Printed

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Site:
    """One Q/DQ site.

    Attributes:
        path: Module that has the site.
        what: ``"input"``, ``"weight"``, ``"add a"``, ``"add b"``, ``"gate a"``, ``"pool"``, ``"query"`` and so on.
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"add"``, ``"gate"``, ``"pool"`` or ``"other"``.
        granularity: ``"per-tensor"`` or ``"per-channel"``.
        format: Name of the number format.
        quantizer: Path of the quantizer; sites that read the same tensor share one.
        note: What else is to be known, e.g. that the input is fusable.
    """

    path: str
    what: str
    kind: str
    granularity: str
    format: str
    quantizer: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A layer or expression that stays in float.

    Attributes:
        path: Module it is or belongs to; empty for the model itself, which prints as ``(the model)``.
        what: Class of the layer, or what kind of expression.
        why: Reason, and the remedy where there is one.
    """

    path: str
    what: str
    why: str


@dataclass(frozen=True)
class Report(Printed):
    """Result of ``qat.prepare``; prints as a table.

    Attributes:
        sites: All Q/DQ sites.
        left: What stays in float.
        head: Paths of the classifier layers.
        head_source: How they were found.
        config: The settings that were applied.
        notice: Set when nothing was done.
    """

    _width = 150

    sites: tuple[Site, ...]
    left: tuple[Left, ...]
    head: tuple[str, ...]
    head_source: str
    config: QuantConfig
    notice: str = ""

    def count(self, kind: str) -> int:
        """Number of modules of ``kind`` that have sites."""
        return len({site.path for site in self.sites if site.kind == kind})

    @property
    def quantizers(self) -> int:
        """Number of distinct quantizers."""
        return len({site.quantizer for site in self.sites})

    def summary(self) -> str:
        """One line: sites, quantizers, and how many modules of each kind."""
        kinds = [
            f"{n} {kind}" for kind in ("conv", "linear", "attention", "add", "gate", "pool", "other") if (n := self.count(kind))
        ]
        return f"{len(self.sites)} sites, {self.quantizers} quantizers: {', '.join(kinds)}; {len(self.left)} left in float"

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        sites = Table("module", "site", "scale", "format", "quantizer", "note", title="Q/DQ sites", box=box.SIMPLE)
        for site in self.sites:
            own = site.quantizer.rpartition(".")[0] == site.path
            shared = "own" if own else f"of {site.quantizer}"
            sites.add_row(*map(escape, (site.path, site.what, site.granularity, site.format, shared, site.note)))
        left = Table("module", "what", "why", title="Left in float", box=box.SIMPLE)
        for item in self.left:
            left.add_row(*map(escape, (item.path or "(the model)", item.what, item.why)))
        head = f"Head ({self.head_source}): {', '.join(self.head) or 'none'}"
        parts: list[Any] = [sites, left, escape(head), escape(self.summary())]
        if self.notice:
            parts.append(escape(self.notice))
        return Group(*parts)
