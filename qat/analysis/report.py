"""Results print as tables and give plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Result:
    """Mixin of the dataclasses that the analyses return."""

    def table(self) -> Table:
        """For a terminal; ``print`` shows the same."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is infinite or NaN is ``None``."""
        return _plain(asdict(self))  # type: ignore[call-overload]

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def make_table(title: str, names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table whose first columns hold text and whose others hold numbers."""
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for column in names:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # paths are no markup
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
