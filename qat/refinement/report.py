"""Reports that print as tables."""

from __future__ import annotations

from rich.table import Table

from ..text import as_text


class Printed:
    """Prints as the table that ``__rich__`` makes."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self)
