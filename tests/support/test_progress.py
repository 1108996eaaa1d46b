"""One progress bar for everything that takes long."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from qat.support.progress import progress_bar


def shown(**options):
    console = Console(file=io.StringIO(), width=100)
    fields = {"note": "3 left"} if options.get("notes") else {}
    with progress_bar(console=console, **options) as bar:
        bar.advance(bar.add_task("Working", total=4, **fields), 3)
    return console.file.getvalue()


@pytest.mark.parametrize("options", [{}, {"notes": True}])
def test_description_and_count_are_shown(options):
    assert "Working" in shown(**options)
    assert "3/4" in shown(**options)


def test_a_note_stands_at_the_end():
    assert shown(notes=True).rstrip().endswith("3 left")


def test_nothing_is_printed_where_nothing_is_wanted():
    assert shown(shown=False) == ""


@pytest.mark.parametrize("name", ["progress", "text"])
def test_rich_is_needed_for_printing_only(name):
    code = f"import sys; sys.modules['rich'] = None; import qat.support.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)
