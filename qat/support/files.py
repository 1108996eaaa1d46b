"""The one writer: files that are there in full or not at all.

A draft beside the target is written, flushed to the disk and renamed. A full disk, an error or a kill leaves the file of
before as it was; a kill may leave the draft, a hidden file. Links are followed to their end and stay links. A new file has the
mode that umask gives, a replaced one keeps its mode; hard links to it keep the content of before. What ``open(path, "w")``
would refuse, a write-protected file say, is refused here, too.

Devices, pipes and open descriptors (``/dev/stdout``) cannot be replaced: text goes into them, binary output is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import QATError

_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a writable folder"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space, or choose a folder on another disk"),
}
# Characters of the target's name in that of a draft: at most 160 bytes, names end at 255.
_KEPT = 40
_LINKS = 40


@dataclass(frozen=True)
class _Place:
    """Where a path leads.

    Attributes:
        name: The path as it was given.
        file: The file to replace or make, links followed; ``None`` for what is written into.
        descriptor: Number of the open descriptor that the path names.
    """

    name: str
    file: Path | None
    descriptor: int | None = None


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write binary ``content`` to ``path``.

    Raises:
        QATError: If it cannot be written, or is a device or pipe; the file of before stays as it was.
    """
    with whole_file(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8; into it where it is a device, a pipe or an open descriptor.

    Raises:
        QATError: If it cannot be written; the file of before stays as it was.
        BrokenPipeError: If nobody reads the pipe any more.
    """
    place = _find(path, text=True)
    if place.file is not None:
        write_whole(path, text.encode())
        return
    for stream in (sys.stdout, sys.stderr):
        # What was printed before comes first.
        if stream is not None:
            stream.flush()
    with reported(path):
        # A copy of a descriptor writes where the descriptor stands; opened anew, a file begins at its start.
        number = os.open(place.name, os.O_WRONLY) if place.descriptor is None else os.dup(place.descriptor)
        with os.fdopen(number, "wb") as opened:
            opened.write(text.encode())


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends without an error.

    Raises:
        QATError: If it cannot be written, or is a device or pipe; the file of before stays as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.bin")
        >>> with whole_file(path) as file:
        ...     _ = file.write(b"new"), path.exists()
        >>> path.read_bytes(), [p.name for p in path.parent.iterdir()]
        (b'new', ['a.bin'])
    """
    target = file_of(path)
    with reported(path), Draft(target) as draft:
        with draft.path.open("wb") as file:
            yield file
        draft.move(target)


def check_target(path: str | os.PathLike[str], *, text: bool = False) -> None:
    """Refuse what a write of ``path`` would refuse, before long work; nothing is touched.

    Args:
        path: Where to write later.
        text: The output is text, so that devices and pipes are welcome.

    Raises:
        QATError: With the reason and a remedy.
    """
    _find(path, text=text)


def file_of(path: str | os.PathLike[str]) -> Path:
    """The regular file that ``path`` leads to, links followed; it need not be there yet. Raises as :func:`check_target`."""
    file = _find(path, text=False).file
    assert file is not None
    return file


class Draft:
    """A hidden file beside ``target`` that is moved to its place, or removed when the block ends.

    Attributes:
        path: The file; empty at first.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.parent / f".{target.name[:_KEPT]}.{secrets.token_hex(8)}.part"
        self._mode = target.stat().st_mode & 0o777 if target.is_file() else None

    def __enter__(self) -> Draft:
        # The kernel applies umask. Python can only read it by changing it, for all threads.
        self.path.open("xb").close()
        try:
            if self._mode is not None and self._mode != self.path.stat().st_mode & 0o777:
                self.path.chmod(self._mode)
        except BaseException:
            self.path.unlink()
            raise
        return self

    def move(self, target: Path) -> None:
        """Flush the file to the disk and give it the place of ``target``, in one step."""
        _flush(self.path, os.O_WRONLY)
        self.path.replace(target)
        # Best effort: not every system can flush a folder.
        with contextlib.suppress(OSError):
            _flush(target.parent, os.O_RDONLY)

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _flush(path: Path, flags: int) -> None:
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def reported(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell errors of the operating system as a :class:`QATError` about ``path``, with a remedy where there is one."""
    try:
        yield
    except BrokenPipeError:
        # No fault of the output: its reader, such as head, has seen enough.
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        raise _refusal(path, f"{error.strerror or error}{'' if remedy is None else f'. {remedy}'}") from error


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.

    Raises:
        QATError: If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QATError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def _refusal(path: str | os.PathLike[str], reason: str) -> QATError:
    return QATError(f"{os.fspath(path)}: cannot be written: {reason}")


def _find(path: str | os.PathLike[str], *, text: bool) -> _Place:
    """Follow ``path`` and refuse what cannot be written."""
    given = Path(path)
    if "\0" in str(given):
        raise _refusal(path, "a name cannot hold a NUL")
    with reported(path):
        number = _descriptor(given)
        try:
            status = given.stat()
        except (FileNotFoundError, NotADirectoryError):
            status = None
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise _refusal(path, "it is a folder; name the file to write")
    if number is not None or (status is not None and not stat.S_ISREG(status.st_mode)):
        if not text or (status is not None and stat.S_ISBLK(status.st_mode)):
            raise _refusal(path, "it is a device, a pipe or an open descriptor. Name a file")
        return _Place(os.fspath(path), None, number)
    file = Path(os.path.realpath(given))
    if status is None:
        if not file.parent.is_dir():
            folder = file.parent if given.is_symlink() else given.parent
            raise _refusal(path, f"there is no folder {folder}. Choose a writable folder")
    elif not (file.exists() and file.samefile(given)):
        raise _refusal(path, "what it leads to has no name. Name a file")
    elif not os.access(file, os.W_OK):
        raise _refusal(path, "the file is write-protected. Change its mode, or name another file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        also = "" if status is None else "; files are replaced as a whole, which changes their folder"
        raise _refusal(path, f"no permission to write into {file.parent}{also}. Choose a writable folder")
    return _Place(os.fspath(path), file)


def _descriptor(path: Path) -> int | None:
    """The number of the open descriptor that ``path`` names (``/dev/fd/3``, ``/proc/self/fd/3``) or links to."""
    folders = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")}
    for _ in range(_LINKS):
        folder = os.path.realpath(path.parent)
        if path.name.isdecimal() and folder in folders:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, path.readlink())
    return None
