"""ONNX files, with their weights inside or beside them, written so that model and weights always fit.

Weights beside ``model.onnx`` lie in ``model.onnx.data``. Two files cannot be replaced in one step. Where the model of before
reads that very file, the new weights are written twice, also as ``model.onnx.new.data``. That file takes its place, then a
model that reads it, then the weights under their usual name, then the model that reads those; and the other file goes. After
each step the model on the disk finds the weights that it was written with, and in the end the names are what they were. (A hard
link would spare the second copy, but the onnx package refuses weights that have two names.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, external_data_helper

from ..errors import QATError
from ..support.files import Draft, file_of, reported
from .reading import _tensors

_PROTOBUF_LIMIT = 2**31


def check_model_target(path: str | os.PathLike[str], *, external_data: bool = False) -> None:
    """Refuse a path that :func:`model_draft` would refuse, before long work; nothing is touched.

    Raises:
        QATError: With the reason and a remedy.
    """
    _target(path, external_data)


@contextlib.contextmanager
def model_draft(model: ModelProto, path: str | os.PathLike[str], *, external_data: bool = False) -> Iterator[Path]:
    """Write ``model`` as a hidden file that becomes ``path`` when the block ends without an error.

    Weights that the file of before kept beside it, under a name that is given here, go with it.

    Args:
        model: Holds all its weights. With ``external_data`` they are taken out of it: there is no second copy in memory.
        path: The file to write; one of before is replaced.
        external_data: Keep tensors of 1 KiB and more beside the file, in ``<name>.data``.

    Yields:
        The hidden file, complete: what can be checked before it counts.

    Raises:
        QATError: If it cannot be written, or has 2 GiB or more without ``external_data``.
    """
    target = _target(path, external_data)
    if not external_data and sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= _PROTOBUF_LIMIT:
        raise QATError("the model exceeds 2 GiB, the limit of one ONNX file. Export with external_data=True")
    before = _weights_of_before(target)
    with contextlib.ExitStack() as drafts:
        with reported(path):
            data = drafts.enter_context(Draft(_beside(target)[0])) if external_data else None
            if data is not None and not _move_weights(model, data.path):
                data = None
            draft = drafts.enter_context(_written(model, target))
        yield draft.path
        with reported(path):
            if data is None:
                draft.move(target)
                kept = None
            else:
                kept = _replace_pair(model, target, data, before)
            # The other name is nobody else's: a write that was killed may have left it.
            for file in {*before, _beside(target)[1]} - {kept}:
                file.unlink(missing_ok=True)


def _target(path: str | os.PathLike[str], external_data: bool) -> Path:
    """The file that ``path`` leads to."""
    target = file_of(path)
    if not external_data:
        return target
    if os.path.realpath(Path(path).parent) != str(target.parent):
        raise QATError(
            f"{os.fspath(path)}: cannot be written: it links to another folder, and readers look for the weights beside the "
            f"link. Name {target} itself, or keep the weights inside with external_data=False"
        )
    with reported(path):
        for file in _beside(target):
            try:
                mode = file.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
                raise QATError(f"{file}: cannot be written: it is a folder or a device. Remove it, or name another file")
    return target


def _beside(target: Path) -> tuple[Path, Path]:
    """Where weights lie: the usual file, and the other one while the usual one is replaced."""
    return target.with_name(f"{target.name}.data"), target.with_name(f"{target.name}.new.data")


def _weights_of_before(target: Path) -> set[Path]:
    """The files of :func:`_beside` that the file of before reads its weights from."""
    ours = {file for file in _beside(target) if file.is_file()}
    if not ours or not target.is_file():
        return set()
    try:
        model = onnx.load_model_from_string(target.read_bytes())
    except (DecodeError, OSError):
        return set()
    names = {entry.value for tensor in _external(model) for entry in tensor.external_data if entry.key == "location"}
    return {file for file in ours if file.name in names}


def _external(model: ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in _tensors(model.graph) if tensor.data_location == TensorProto.EXTERNAL)


def _move_weights(model: ModelProto, file: Path) -> bool:
    """Move tensors from ``model`` into ``file``, which is there and empty; whether there were any."""
    # A name that onnx makes up: it refuses one that is a file in the current folder, whatever the folder of the model.
    external_data_helper.convert_model_to_external_data(model)
    _refer(model, file.name)
    external_data_helper.write_external_data_tensors(model, str(file.parent))
    return any(True for _ in _external(model))


def _refer(model: ModelProto, name: str) -> None:
    """Let ``model`` read its external weights from the file ``name``."""
    for tensor in _external(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name


@contextlib.contextmanager
def _written(model: ModelProto, target: Path, reading: str | None = None) -> Iterator[Draft]:
    """A draft that holds ``model``, its weights read from the file ``reading``."""
    if reading is not None:
        _refer(model, reading)
    with Draft(target) as draft:
        with draft.path.open("wb") as file:
            onnx.save_model(model, file, format="protobuf")
        yield draft


def _replace_pair(model: ModelProto, target: Path, data: Draft, before: set[Path]) -> Path:
    """Give model and weights their places; after each step those on the disk fit. Returns where the weights are."""
    usual, other = _beside(target)
    with _written(model, target, other.name) as passing, _written(model, target, usual.name) as final:
        if usual not in before:
            data.move(usual)
            final.move(target)
            return usual
        with Draft(usual) as copy:
            # All is written before anything is moved: a full disk shows here.
            shutil.copyfile(data.path, copy.path)
            data.move(other)
            passing.move(target)
            copy.move(usual)
        final.move(target)
    return usual
