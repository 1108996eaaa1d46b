"""ONNX files and their external weights: a pair that fits at every moment, names that stay, nothing left over."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import write_run
from write_run import SIZE, make_model, write

import qat
from qat.errors import QATError
from qat.graph.reading import read_model
from qat.graph.writing import check_model_target, model_draft


def output(path):
    """What the file computes of zero: 11 times its value, if model and weights fit."""
    onnx.checker.check_model(str(path), full_check=True)
    read_model(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.zeros(SIZE, np.float32)})
    assert (y == y[0]).all()
    return float(y[0])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("before", ["none", "inside", "beside"])
def test_a_file_is_replaced_with_all_that_belonged_to_it(tmp_path, before, place):
    if before != "none":
        write(1, before, tmp_path / "m.onnx")
    write(2, place, tmp_path / "m.onnx")
    assert output(tmp_path / "m.onnx") == 22
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"][: 2 if place == "beside" else 1]


def test_the_current_folder_does_not_matter(tmp_path, monkeypatch):
    """The onnx package refuses a name of external data that is a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    for value in (1, 2, 3):
        write(value, "beside", "m.onnx")
        assert output(Path("m.onnx")) == 11 * value
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_models_in_one_folder_do_not_meet(tmp_path):
    for name, value in (("a.onnx", 1), ("b.onnx", 2), ("a.onnx", 3)):
        write(value, "beside", tmp_path / name)
    assert (output(tmp_path / "a.onnx"), output(tmp_path / "b.onnx")) == (33, 22)


def test_weights_under_a_name_of_others_stay(tmp_path):
    onnx.save_model(make_model(1), str(tmp_path / "m.onnx"), save_as_external_data=True, location="weights.bin")
    (tmp_path / "m.onnx.data").write_bytes(b"not referred to by the file of before")
    write(2, "inside", tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx", "m.onnx.data", "weights.bin"]


def test_a_file_of_before_that_is_no_model(tmp_path):
    for content in (b"\xff", b"", b"text"):
        (tmp_path / "m.onnx").write_bytes(content)
        (tmp_path / "m.onnx.data").write_bytes(content)
        write(2, "beside", tmp_path / "m.onnx")
        assert output(tmp_path / "m.onnx") == 22


def test_small_tensors_only_need_no_second_file(tmp_path):
    model = make_model(1)
    del model.graph.initializer[0], model.graph.node[0]
    model.graph.node[0].input[0] = "x"
    with model_draft(model, tmp_path / "m.onnx", external_data=True):
        pass
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_file_that_fails_its_check_does_not_count(tmp_path, place):
    write(1, place, tmp_path / "m.onnx")

    def fail():
        with model_draft(make_model(2), tmp_path / "m.onnx", external_data=place == "beside") as draft:
            assert output(draft) == 22
            raise QATError("no good")

    with pytest.raises(QATError, match="no good"):
        fail()
    assert output(tmp_path / "m.onnx") == 11
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"][: 2 if place == "beside" else 1]


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_link_in_the_same_folder_is_followed(tmp_path):
    write(1, "beside", tmp_path / "real.onnx")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    (tmp_path / "folder").symlink_to(".")
    for value, path in ((2, tmp_path / "link.onnx"), (3, tmp_path / "folder" / "real.onnx")):
        write(value, "beside", path)
        assert output(path) == 11 * value
    assert names(tmp_path) == ["folder", "link.onnx", "real.onnx", "real.onnx.data"]
    assert (tmp_path / "link.onnx").is_symlink()


def test_a_link_into_another_folder_takes_no_external_data(tmp_path):
    """ONNX Runtime looks for the weights beside the link."""
    (tmp_path / "other").mkdir()
    (tmp_path / "m.onnx").symlink_to(Path("other", "real.onnx"))
    path = tmp_path / "m.onnx"
    for refuses in (lambda: check_model_target(path, external_data=True), lambda: write(1, "beside", path)):
        with pytest.raises(QATError, match=r"links to another folder.*Name .*real\.onnx itself"):
            refuses()
    write(1, "inside", path)
    assert output(tmp_path / "other" / "real.onnx") == 11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken.onnx", r"taken\.onnx\.data: cannot be written: it is a folder or a device"),
        ("a" * 250, "cannot be written: File name too long"),
        ("missing/m.onnx", "there is no folder"),
        ("taken.onnx.data", "it is a folder"),
    ],
)
def test_paths_are_refused_before_work(tmp_path, name, message):
    (tmp_path / "taken.onnx.data").mkdir()
    with pytest.raises(QATError, match=message):
        check_model_target(tmp_path / name, external_data=True)
    assert names(tmp_path) == ["taken.onnx.data"]


def test_devices_are_refused():
    with pytest.raises(QATError, match="/dev/null: cannot be written: it is a device"):
        check_model_target("/dev/null")


# --- kills and full disks --------------------------------------------------------------------------------------------

PLACES = [("none", "beside"), ("inside", "inside"), ("inside", "beside"), ("beside", "inside"), ("beside", "beside")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("kills are forks that end")
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(Path(qat.__file__).parents[1])}
    command = [sys.executable, write_run.__file__, *map("-".join, PLACES)]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
    return folder


@pytest.mark.parametrize(("old", "new"), PLACES)
def test_a_kill_at_any_step_leaves_a_pair_that_fits(killed, old, new):
    states = sorted((killed / f"{old}-{new}").iterdir(), key=lambda folder: int(folder.name))
    assert names(states[-1]) == ["m.onnx", "m.onnx.data"][: 2 if new == "beside" else 1]
    found = []
    for folder in states:
        found.append(output(folder / "m.onnx") if (folder / "m.onnx").exists() else None)
        assert {name for name in names(folder) if not name.startswith(".")} <= {"m.onnx", "m.onnx.data", "m.onnx.new.data"}
        assert all((folder / name).is_file() for name in names(folder))
        # The next write is not disturbed by what is left, and has its usual names.
        write(3, new, folder / "m.onnx")
        assert output(folder / "m.onnx") == 33
        assert {name for name in names(folder) if not name.startswith(".")} <= {"m.onnx", "m.onnx.data"}
    before = None if old == "none" else 11
    assert found[0] == before
    assert found[-1] == 22
    # Old, then new, and nothing else.
    assert found == sorted(found, key=lambda value: value or 0)
    assert set(found) == {before, 22}


def test_a_full_disk_leaves_the_pair_of_before(tmp_path):
    write(1, "beside", tmp_path / "m.onnx")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(qat.__file__).parents[1]), *sys.path])}
    code = "import resource; from write_run import write; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    command = [sys.executable, "-c", f"{code} write(2, 'beside', 'm.onnx')"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert "QATError: m.onnx: cannot be written: File too large" in done.stderr
    assert output(tmp_path / "m.onnx") == 11
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
