"""What an import did."""

from __future__ import annotations

from dataclasses import dataclass

from ..preparation import Report


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        report: What was placed where. Its ``config`` prepares a fresh float model with the same sites.
        sites: Name of the quantizer, or tensor, that a range came from, by the path of the site.
        unset: Paths of the sites that have no range, so that tensors pass through them unchanged.
        notes: What else is to be known, such as where outputs may differ.
    """

    report: Report
    sites: dict[str, str]
    unset: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} ranges imported; {self.report.summary()}"]
        lines += [f"without a range: {path}" for path in self.unset]
        return "\n".join([*lines, *self.notes])
