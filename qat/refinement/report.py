"""Reports that print as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


class Printed:
    """Prints as the table that ``__rich__`` makes."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
