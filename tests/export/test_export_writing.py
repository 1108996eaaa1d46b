"""export_onnx and files: links, devices, external data written again, full disks; qat.graph.writing has the rest."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from export_nets import images, tiny
from torch import nn

import qat
from qat.export import export_float


@pytest.fixture(scope="module")
def model():
    return tiny()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Untouched(nn.Module):
    """A model that nobody gets to run."""

    def forward(self, images):
        raise AssertionError("the path is looked at first")


@pytest.mark.parametrize(
    ("path", "message"), [("", "is a folder"), ("/dev/null", "is a device"), ("missing/m.onnx", "there is no folder")]
)
def test_paths_are_refused_before_the_work(tmp_path, path, message):
    with pytest.raises(qat.QATError, match=f"cannot be written: .*{message}"):
        export_float(Untouched(), tmp_path / path, images(1))
    assert names(tmp_path) == []


@pytest.mark.parametrize("external_data", [False, True])
def test_an_export_replaces_what_a_link_leads_to(model, tmp_path, external_data):
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    path = qat.export_onnx(model, tmp_path / "link.onnx", images(1), external_data=external_data)
    assert path == tmp_path / "link.onnx"
    assert path.is_symlink()
    assert names(tmp_path) == ["link.onnx", "real.onnx", *(["real.onnx.data"] if external_data else [])]
    assert onnx.load(path).graph.node


def test_external_data_twice_to_one_path(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        qat.export_onnx(model, "m.onnx", images(2), external_data=True)
    assert qat.parity(model, "m.onnx", images(2)).top1 == 1
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    qat.export_onnx(model, "m.onnx", images(2))
    assert names(tmp_path) == ["m.onnx"]


# Small enough for torch's exporter, too small for the file. Temporary files of precision="fp16" are as large.
FULL_DISK = """
import pathlib, resource, tempfile, torch, qat
model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 4)).eval()
qat.prepare(model), qat.calibrate(model, [torch.ones(2, 100)], progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for options in ({}, {"external_data": True}, {"precision": "fp16"}):
    try:
        qat.export_onnx(model, "m.onnx", torch.ones(2, 100), **options)
    except qat.QATError as error:
        print(str(error).partition(" cannot be")[2])
"""


def test_a_full_disk_keeps_the_old_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    environment = {**os.environ, "PYTHONPATH": str(Path(qat.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith(" written: File too large. Free space, or ") for line in lines)
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert names(tmp_path) == ["m.onnx"]
