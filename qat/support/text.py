"""Results as plain text."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console
from rich.table import Table


def as_text(renderable: Any, *, width: int = 120) -> str:
    """What ``str`` of a result gives: the same in a terminal, a file and a notebook, without colours or blanks at line ends.

    Args:
        renderable: Whatever rich prints.
        width: Columns to lay it out in.

    Example:
        >>> as_text("[bold]12 sites[/bold]")
        '12 sites'
    """
    # In a notebook rich would display what it prints, and mark it up, whether it is captured or not.
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


class Printed(ABC):
    """Mixin of results that print as a table."""

    @abstractmethod
    def __rich__(self) -> Table:
        """The table."""

    def __str__(self) -> str:
        return as_text(self)
