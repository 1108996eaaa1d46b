"""One progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def progress_bar(
    *, shown: bool = True, console: Console | None = None, transient: bool = False, notes: bool = False
) -> Progress:
    """A bar for each task: what is done, how much of it, for how long.

    Args:
        shown: Whether anything is printed.
        console: Where; standard output by default.
        transient: Leave nothing behind.
        notes: For several bars below each other: descriptions in one column, and at the end what the field ``note``, which
            every task then has, holds.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    if notes:
        columns = [TextColumn("{task.description:<32}"), BarColumn(24), *columns[2:], TextColumn("{task.fields[note]}")]
    return Progress(*columns, console=console, transient=transient, disable=not shown)
