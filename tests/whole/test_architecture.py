"""Imports go one way: a room imports what stands before it, and no file is reached from itself.

Every import counts: inside functions and for type checkers, too. Who reads a file has to know what it imports.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qat"
LINES = 400


def rooms():
    """The rooms in their order, as docs/architecture.md lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    return [line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line and not line.startswith(" ")]


def modules():
    """Every file by its module's name, relative to the package; the package itself is ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports():
    """The modules of the package that each of its modules imports, with the line."""
    files = modules()
    return {name: dict(imported(name, path, files)) for name, path in files.items()}


def imported(name, path, files):
    """What the statements of one file import, as (module, line)."""
    here = name.split(".") if name != "__init__" else []
    folder = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "qat":
                    yield alias.name.removeprefix("qat").removeprefix(".") or "__init__", node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "qat"):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").removeprefix("qat.").split(".")] if node.module not in (None, "qat") else base
            for alias in node.names:
                inside = ".".join([*base, alias.name])
                yield inside if inside in files else ".".join(base) or "__init__", node.lineno


def against_the_order(edges, order):
    """Imports of a room that stands behind, as text."""
    rank = {room: i for i, room in enumerate(order)}
    return [
        f"{name}, line {line}: imports {other}"
        for name, others in sorted(edges.items())
        for other, line in others.items()
        if rank[other.split(".")[0]] > rank[name.split(".")[0]]
    ]


def circles(edges):
    """Groups of files of which each is reached from each (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack and other != name:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_every_room_is_in_the_order():
    assert set(rooms()) == {name.split(".")[0] for name in modules()}


def test_no_import_goes_against_the_order():
    assert against_the_order(imports(), rooms()) == []


def test_no_circle_between_files():
    assert circles(imports()) == []


def test_an_import_against_the_order_and_a_circle_are_found():
    edges = {"core.a": {"nn.b": 3}, "nn.b": {"core.c": 1}, "core.c": {"core.a": 2}, "nn.d": {"core.a": 1}}
    assert against_the_order(edges, ["core", "nn"]) == ["core.a, line 3: imports nn.b"]
    assert circles(edges) == [["core.a", "core.c", "nn.b"]]


def test_imports_are_read_in_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import qat.core\nfrom . import b\nfrom ..core.a import f\ndef g():\n    from qat import nn\n", encoding="utf-8"
    )
    files = {"core": 0, "core.a": 0, "nn": 0, "nn.b": 0, "nn.x": file}
    assert dict(imported("nn.x", file, files)) == {"core": 1, "nn.b": 2, "core.a": 3, "nn": 5}


@pytest.mark.parametrize("room", ["errors", "graph", "tensorrt"])
def test_rooms_that_need_no_torch(room):
    """Every file of them is imported where PyTorch cannot be."""
    names = sorted(f"qat.{name}" for name in modules() if name.split(".")[0] == room)
    code = "import sys, importlib; sys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_long_files_say_why():
    long = {}
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LINES and "One file:" not in (ast.get_docstring(ast.parse(text)) or ""):
            long[name] = text.count("\n")
    assert long == {}


def test_no_test_imports_another():
    tests = list((ROOT / "tests").rglob("test_*.py"))
    importing = [
        str(path) for path in tests if re.search(r"^\s*(from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert importing == []
    assert len({path.name for path in tests}) == len(tests)


def test_tests_lie_in_the_rooms_they_test():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders - {"helpers", "recorded", "whole"} <= set(rooms())
