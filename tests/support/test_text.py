"""Results print as plain text wherever they are printed."""

import pytest
import rich.console
import torch
from torch import nn

import qat


def results():
    """One result of each kind that prints itself by rich."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    data = [torch.randn(2, 3, 4, 4)]
    yield qat.equalize(model, data[0])
    yield qat.prepare(model)
    yield qat.calibrate(model, data, progress=False)
    yield qat.analysis.layer_errors(model, data)


@pytest.fixture
def notebook(monkeypatch):
    """What rich does where it finds a notebook: it displays instead of writing. Here that fails."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *args: pytest.fail("displayed instead of returned"))


def test_text_in_a_notebook_is_that_of_a_file(notebook, monkeypatch):
    inside = [str(result) for result in results()]
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: False)
    assert inside == [str(result) for result in results()]


def test_text_has_no_escapes_in_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not any("\x1b" in str(result) for result in results())


def test_lines_end_without_blanks():
    assert all(line == line.rstrip() for result in results() for line in str(result).splitlines())
