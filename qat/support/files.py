"""Files that are there in full or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import QATError


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary sibling.

    Raises:
        QATError: If the folder is missing or cannot be written; the file stays as it was.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise QATError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only their owner can read.
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(target)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise QATError(f"{target}: cannot be written: {error.strerror}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.

    Raises:
        QATError: If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QATError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
