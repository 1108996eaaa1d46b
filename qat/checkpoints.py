"""Whether the file of a checkpoint is whole."""

import os
import zipfile

from torch.serialization import get_crc32_options

from .errors import QATError

# The first byte of a pickle: what torch.save wrote before its files were ZIP archives.
_PICKLE = b"\x80"


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
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise QATError(f"{name}: damaged, perhaps cut short while it was written: {error}") from error
            if damaged is not None:
                raise QATError(f"{name}: damaged: the checksum of {damaged} does not match")
        elif not start.startswith(_PICKLE):
            raise QATError(f"{name}: damaged, or no checkpoint: torch.save did not write this file")
