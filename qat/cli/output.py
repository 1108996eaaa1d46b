"""Results on the screen."""

from __future__ import annotations

import sys
from typing import Any


def show(report: Any) -> None:
    """Print a report, as a table where rich is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(report)
        return
    # Names in brackets are no markup; files and pipes have no width.
    Console(width=None if sys.stdout.isatty() else 128, markup=False, highlight=False).print(report)
