"""Results as plain text and plain values; rich is imported when something is printed."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_text(renderable: Any, *, width: int = 120) -> str:
    """What ``str`` of a result gives: the same in a terminal, a file and a notebook, without colours or blanks at line ends.

    Args:
        renderable: Whatever rich prints.
        width: Columns to lay it out in.

    Example:
        >>> as_text("[bold]12 sites[/bold]")
        '12 sites'
    """
    from rich.console import Console

    # In a notebook rich would display what it prints, and mark it up, whether it is captured or not.
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


class Printed(ABC):
    """Mixin of results that print as tables. ``_width`` is the columns of ``str``; a terminal has its own."""

    _width: ClassVar[int] = 120

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The table, or a group of tables and lines."""

    def __str__(self) -> str:
        return as_text(self, width=self._width)


class Plain:
    """Mixin of dataclasses that give plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is infinite or NaN is ``None``."""
        return plain(asdict(self))  # type: ignore[call-overload]

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """Nested containers with ``None`` for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
