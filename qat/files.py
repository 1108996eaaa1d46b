"""Files of tensors that may come from anywhere."""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any

import torch

from .checkpoints import check_intact
from .errors import QATError

# What torch.load was seen to raise for files whose bytes had been changed.
_DAMAGED: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, AssertionError, MemoryError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
)


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
