"""Files that commands write: refused before the work, text into pipes, nothing instead of a device."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qat
from qat.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    folder = tmp_path_factory.mktemp("model")
    onnx.save(model, str(folder / "m.onnx"))
    np.save(folder / "x.npy", np.ones((2, 3), np.float32))
    return folder


BINARY = [
    "build m.onnx --output {}",
    "simplify m.onnx {}",
    "run m.onnx --inputs x.npy -o {}",
    "inspect m.onnx --png {}",
]
TEXT = [
    "bench m.onnx --json {}",
    "inspect m.onnx --rules {}",
    "report --model nowhere:nothing --out {}",
]


@pytest.mark.parametrize("command", [*BINARY, *TEXT])
@pytest.mark.parametrize(("out", "message"), [("missing/out", "there is no folder missing"), (".", "it is a folder")])
def test_a_path_is_refused_before_the_work(folder, monkeypatch, capsys, command, out, message):
    monkeypatch.chdir(folder)
    assert main(command.format(out).split()) == 2
    captured = capsys.readouterr()
    assert f"error: {out}: cannot be written: {message}" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", BINARY)
def test_a_device_is_not_replaced(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    before = Path("/dev/null").stat()
    assert main(command.format("/dev/null").split()) == 2
    assert "error: /dev/null: cannot be written: it is a device, a pipe or an open descriptor" in capsys.readouterr().err
    after = Path("/dev/null").stat()
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_a_link_stays_one(folder, tmp_path, capsys):
    (tmp_path / "link.npz").symlink_to("real.npz")
    out = tmp_path / "link.npz"
    assert main(["run", str(folder / "m.onnx"), "--inputs", str(folder / "x.npy"), "-o", str(out)]) == 0
    assert out.is_symlink()
    assert np.load(tmp_path / "real.npz")["y"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("into", ["pipe", "file"])
def test_figures_follow_the_table_on_standard_output(folder, tmp_path, into):
    command = [sys.executable, "-m", "qat.cli", "bench", "m.onnx", "--duration", "0.05", "--warm-up", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(qat.__file__).parents[1])}
    options = {"cwd": folder, "env": environment, "check": True, "timeout": 300}
    if into == "pipe":
        text = subprocess.run([*command, "--json", "/dev/stdout"], stdout=subprocess.PIPE, text=True, **options).stdout
    else:
        with (tmp_path / "out.txt").open("w") as file:
            subprocess.run([*command, "--json", "/dev/stdout"], stdout=file, **options)
        text = (tmp_path / "out.txt").read_text()
    start = text.index("\n{\n")
    assert "ONNX Runtime" in text[:start]
    assert json.loads(text[start:])["unit"] == "ms"
