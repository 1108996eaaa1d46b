"""Files of tensors that may come from anywhere."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from typing import Any

import torch
from torch.serialization import get_crc32_options

from ..errors import QATError
from .files import write_whole

# The first byte of a pickle: what torch.save wrote before its files were ZIP archives.
_PICKLE = b"\x80"
# What torch.load was seen to raise for files whose bytes had been changed.
_DAMAGED: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, AssertionError, MemoryError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
)


def check_intact(path: str | os.PathLike[str]) -> None:
    """Refuse a file that ``torch.save`` did not write, or that was cut short or changed since. Reads it once, loads nothing.

    ``torch.load`` compares no checksums: it loads damaged weights. Its ZIP archives hold a CRC-32 of each tensor, unless
    ``torch.serialization.set_crc32_options(False)`` was called, which spares the comparison here, too.

    Args:
        path: A local file. Of one in the format before torch 1.6, which has no checksums, only the start is looked at.

    Raises:
        QATError: With the path and what is wrong.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "x.ckpt")
        >>> _ = path.write_text("no checkpoint")
        >>> check_intact(path)
        Traceback (most recent call last):
            ...
        qat.errors.QATError: ...x.ckpt: damaged, or no checkpoint: torch.save did not write this file
    """
    name = os.fspath(path)
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(2)
        if start == b"PK":
            file.seek(0)
            try:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip() if get_crc32_options() else None
            except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
                raise QATError(f"{name}: damaged, perhaps cut short while it was written: {error}") from error
            if damaged is not None:
                raise QATError(f"{name}: damaged: the checksum of {damaged} does not match")
        elif not start.startswith(_PICKLE):
            raise QATError(f"{name}: damaged, or no checkpoint: torch.save did not write this file")


def read_tensors(path: str | os.PathLike[str], *, remedy: str, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU; nothing in the file is executed.

    Args:
        path: A local file.
        remedy: What to do about a file that cannot be read, a sentence without its full stop.
        mmap: As in ``torch.load``: what is not looked at is not read.

    Raises:
        QATError: With the path, for a file that is missing, damaged, or holds other objects than tensors and plain values.
    """
    name = os.fspath(path)
    try:
        check_intact(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except QATError as error:
        raise QATError(f"{error}. {remedy}") from error
    except FileNotFoundError as error:
        raise QATError(f"{name}: no such file. {remedy}") from error
    except _DAMAGED as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise QATError(
            f"{name}: damaged, or no file of tensors that can be read without executing code in it: {first}. {remedy}"
        ) from error


def write_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """``torch.save`` into a file that is there in full or not at all.

    Args:
        path: A local file.
        content: As for ``torch.save``; held in memory a second time.

    Raises:
        QATError: If it cannot be written; the file of before stays as it was.
    """
    # Not into the file: what fails to write ends torch's archive in an error that hides the first.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
