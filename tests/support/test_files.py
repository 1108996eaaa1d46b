"""The one writer: whole files or those of before, links, modes, devices, full disks, kills; and who writes through it."""

import ast
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import qat
from qat.errors import QATError
from qat.support.files import check_target, file_of, read_whole, whole_file, write_text, write_whole
from qat.support.tensor_files import read_tensors, write_tensors

PACKAGE = Path(qat.__file__).parent
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def python(code, *, cwd, before="", **options):
    """Run a script of its own: what it does to limits, umask or itself stays there."""
    script = textwrap.dedent(before) + textwrap.dedent(code)
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False, **options}
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=environment, **options)


SMALL_DISK = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
"""


@pytest.fixture
def umask():
    def change(value):
        os.umask(value)

    before = os.umask(0o022)
    yield change
    os.umask(before)


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_whole, lambda path, content: write_text(path, content.decode())])
def test_replaces_the_content_and_leaves_nothing_else(tmp_path, write):
    path = tmp_path / "a.txt"
    for content in (b"first", b"2nd"):
        write(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_keeps_the_file_of_before(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_full_disk_keeps_the_file_of_before(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    done = python(
        """
        from qat.support.files import write_whole
        from qat.errors import QATError
        try:
            write_whole("a.bin", bytes(30000))
        except QATError as error:
            print(error)
        """,
        cwd=tmp_path,
        before=SMALL_DISK,
    )
    assert done.stdout == "a.bin: cannot be written: File too large. Free space, or choose a folder on another disk\n", (
        done.stderr
    )
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_kill_leaves_the_file_of_before_and_at_most_a_hidden_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    done = python(
        """
        import os, signal
        from qat.support.files import whole_file
        with whole_file("a.bin") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    (left,) = [path for path in tmp_path.iterdir() if path.name != "a.bin"]
    assert left.is_file()
    assert left.name.startswith(".a.bin.")
    # It is in nobody's way.
    write_whole(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_the_content_is_flushed_before_it_counts(tmp_path, monkeypatch):
    done = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"))
    monkeypatch.setattr(Path, "replace", lambda self, target: (done.append("rename"), replace(self, target))[1])
    write_whole(tmp_path / "a.bin", b"x")
    assert done == ["file", "rename", "folder"]


def test_names_of_255_bytes(tmp_path):
    for name in ("a" * 255, "ä" * 127, "名" * 85):
        write_whole(tmp_path / name, b"x")
    assert len(names(tmp_path)) == 3
    with pytest.raises(QATError, match="File name too long"):
        write_whole(tmp_path / ("a" * 256), b"x")


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_umask_gives(tmp_path, umask, mask):
    umask(mask)
    write_whole(tmp_path / "a.bin", b"x")
    assert mode(tmp_path / "a.bin") == 0o666 & ~mask


@pytest.mark.parametrize("before", [0o600, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path, umask, before):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(before)
    write_whole(path, b"new")
    assert mode(path) == before


def test_umask_is_never_changed(tmp_path, monkeypatch):
    """It belongs to all threads: one that makes a file meanwhile would make it for everybody."""

    def changed(_):
        raise AssertionError

    monkeypatch.setattr(os, "umask", changed)
    write_whole(tmp_path / "a.bin", b"x")


# --- where a path leads ----------------------------------------------------------------------------------------------


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    real = tmp_path / "deep" / "real.bin"
    real.write_bytes(b"old")
    (tmp_path / "middle").symlink_to(Path("deep", "real.bin"))
    (tmp_path / "link").symlink_to("middle")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert real.read_bytes() == b"new"
    assert names(tmp_path / "deep") == ["real.bin"]


def test_a_dangling_link_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to("real.bin")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "real.bin").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "lost").symlink_to(tmp_path / "missing" / "real.bin")
    with pytest.raises(QATError, match=r"lost: cannot be written: there is no folder .*missing\. Choose a writable folder"):
        write_whole(tmp_path / "lost", b"new")


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(QATError, match="a: cannot be written: Too many levels of symbolic links"):
        write_whole(tmp_path / "a", b"new")


def test_links_to_folders_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    write_whole("link/a.bin", b"1")
    write_whole("b.bin", b"2")
    write_whole(Path("link", "..", "c.bin"), b"3")
    assert names(tmp_path / "real") == ["a.bin"]
    assert names(tmp_path) == ["b.bin", "c.bin", "link", "real"]


def test_other_hard_links_keep_the_content_of_before(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    (tmp_path / "b.bin").hardlink_to(tmp_path / "a.bin")
    write_whole(tmp_path / "a.bin", b"new")
    assert (tmp_path / "b.bin").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it is a folder; name the file to write"),
        ("missing/a.bin", "there is no folder .*missing. Choose a writable folder"),
        ("file/a.bin", "there is no folder .*file. Choose a writable folder"),
        ("a\0b", "a name cannot hold a NUL"),
    ],
)
@pytest.mark.parametrize("refuses", [check_target, lambda path: write_whole(path, b"x"), lambda path: write_text(path, "x")])
def test_paths_that_cannot_be_written(tmp_path, refuses, name, message):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(QATError, match=f"cannot be written: {message}"):
        refuses(tmp_path / name)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("protected", "message"),
    [
        ("a.bin", "a.bin: cannot be written: the file is write-protected. Change its mode, or name another file"),
        (".", "no permission to write into .*; files are replaced as a whole, which changes their folder. Choose a writable"),
    ],
)
def test_what_is_protected_is_refused_with_a_remedy(tmp_path, monkeypatch, protected, message):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    refused = (tmp_path / protected).resolve()
    # Not by modes: tests may run as root, whom modes do not stop.
    monkeypatch.setattr(os, "access", lambda path, flags: Path(path) != refused)
    with pytest.raises(QATError, match=message):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
def test_modes_stop_a_user(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, value in ((folder / "mine", 0o666), (folder / "protected", 0o444), (folder, 0o755)):
        if path != folder:
            path.write_bytes(b"old")
        path.chmod(value)
    for path in (tmp_path, *tmp_path.parents):
        if path != Path("/tmp") and str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o011)
    check = "from qat.support.files import write_whole; write_whole"
    done = [
        python(f"import os; os.setuid(65534); {check}('{folder / name}', b'new')", cwd="/", before="import qat.support.files\n")
        for name in ("mine", "protected")
    ]
    assert "no permission to write into" in done[0].stderr
    assert "write-protected" in done[1].stderr
    assert {path.read_bytes() for path in folder.iterdir()} == {b"old"}


# --- devices, pipes, descriptors -------------------------------------------------------------------------------------


def test_devices_take_text_and_refuse_binary_files():
    before = Path("/dev/null").stat()
    write_text("/dev/null", "text")
    for refuses in (check_target, file_of, lambda path: write_whole(path, b"x")):
        with pytest.raises(QATError, match="/dev/null: cannot be written: it is a device, a pipe or an open descriptor"):
            refuses("/dev/null")
    check_target("/dev/null", text=True)
    after = Path("/dev/null").stat()
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_link_to_a_device_is_a_device(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    write_text(tmp_path / "link", "text")
    with pytest.raises(QATError, match="link: cannot be written: it is a device"):
        write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()


@needs_fifo
def test_a_pipe_takes_text_and_refuses_binary_files(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(QATError, match="pipe: cannot be written: it is a device, a pipe"):
        write_whole(pipe, b"x")
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    write_text(pipe, "täxt")
    reader.join()
    assert read == ["täxt"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


TO_STDOUT = """
    from qat.support.files import write_text
    print("printed before")
    write_text("/dev/stdout", "text\\n")
    print("printed after")
"""


def test_standard_output_as_a_pipe(tmp_path):
    assert python(TO_STDOUT, cwd=tmp_path).stdout == "printed before\ntext\nprinted after\n"


@pytest.mark.parametrize("flags", ["w", "a"])
def test_standard_output_sent_to_a_file_is_written_where_it_stands(tmp_path, flags):
    """A file of that name put in its place would leave the shell's descriptor with the file of before."""
    path = tmp_path / "out.txt"
    path.write_text("earlier\n")
    with path.open(flags) as file:
        inode = path.stat().st_ino
        done = python(TO_STDOUT, cwd=tmp_path, capture_output=False, stdout=file)
    assert done.returncode == 0
    assert path.read_text() == ("earlier\n" if flags == "a" else "") + "printed before\ntext\nprinted after\n"
    assert path.stat().st_ino == inode
    assert names(tmp_path) == ["out.txt"]


def test_a_descriptor_is_no_file_for_binary_output(tmp_path):
    with (tmp_path / "out.bin").open("wb") as file:
        for name in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            with pytest.raises(QATError, match=r"an open descriptor\. Name a file"):
                write_whole(name, b"x")
            write_text(name, "text;")
    assert (tmp_path / "out.bin").read_bytes() == b"text;text;"
    with pytest.raises(QATError, match="cannot be written: Bad file descriptor"):
        write_text("/dev/fd/987", "text")


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_output(tmp_path):
    code = """
    from qat.support.files import write_text
    try:
        write_text("/dev/stdout", "x" * 1000000)
    except BrokenPipeError:
        raise SystemExit(3)
    """
    read, write = os.pipe()
    os.close(read)
    try:
        assert python(code, cwd=tmp_path, capture_output=False, stdout=write, stderr=subprocess.DEVNULL).returncode == 3
    finally:
        os.close(write)


# --- who writes ------------------------------------------------------------------------------------------------------


def test_yaml_keeps_the_settings_of_before_on_a_full_disk(tmp_path):
    config = qat.QuantConfig(pool_inputs=False)
    config.to_yaml(tmp_path / "c.yaml")
    done = python(
        """
        import qat
        rules = [{"match": "a" * 30000, "quantize": False}]
        qat.QuantConfig(rules=rules).to_yaml("c.yaml")
        """,
        cwd=tmp_path,
        before=SMALL_DISK,
    )
    assert "QATError: c.yaml: cannot be written: File too large" in done.stderr
    assert qat.QuantConfig.from_yaml(tmp_path / "c.yaml") == config


def test_tensors_on_a_full_disk(tmp_path):
    write_tensors(tmp_path / "a.pt", {"a": torch.arange(3)})
    done = python(
        """
        import torch
        from qat.support.tensor_files import write_tensors
        write_tensors("a.pt", torch.zeros(30000))
        """,
        cwd=tmp_path,
        before=SMALL_DISK,
    )
    assert "QATError: a.pt: cannot be written: File too large" in done.stderr
    assert read_tensors(tmp_path / "a.pt", remedy="")["a"].tolist() == [0, 1, 2]
    assert names(tmp_path) == ["a.pt"]


def test_arrays_into_a_whole_file(tmp_path):
    with whole_file(tmp_path / "a.npz") as file:
        np.savez_compressed(file, a=np.arange(4))
    assert np.load(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2, 3]
    assert read_whole(tmp_path / "a.npz")[:2] == b"PK"


# Calls that make a file, and why each is allowed to.
WRITING = {"write_text", "write_bytes", "savefig", "save_model", "savez", "savez_compressed", "mkstemp"}
SAVING = {"onnx.save", "torch.save", "np.save"}
ALLOWED = {
    ("cli/run.py", "archive.open"),  # into memory
    ("graph/halves.py", "onnx.save_model"),  # into a temporary folder
    ("graph/run.py", "onnx.save"),  # the same
    ("graph/writing.py", "draft.path.open"),
    ("graph/writing.py", "onnx.save_model"),  # into a draft
    ("recipes/data.py", "np.savez_compressed"),  # into a whole file
    ("recipes/tables.py", "figure.savefig"),  # the same
    ("support/files.py", "draft.path.open"),
    ("support/files.py", "os.fdopen"),  # of a device
    ("support/files.py", "self.path.open"),
    ("support/tensor_files.py", "torch.save"),  # into memory
    ("tensorrt/picture.py", "figure.savefig"),  # the same
}


def makes_a_file(call):
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last in ("open", "fdopen"):
        modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        return any(isinstance(value, str) and set(value) & set("wax") and set(value) <= set("rwaxbt+") for value in modes)
    return name in SAVING or ("." in name and last in WRITING)


def test_every_file_is_written_by_the_writer():
    found = {
        (path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and makes_a_file(node)
    }
    assert found - ALLOWED == set()
