"""Arguments that several commands have, and the values of arguments."""

from __future__ import annotations

import argparse

PLANS = "an engine (.plan, .engine, .trt)"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def onnx_file(parser: argparse.ArgumentParser) -> None:
    """Add the ONNX file that a command reads."""
    parser.add_argument("onnx", metavar="MODEL", help="ONNX file")


def inputs_option(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """Add ``--inputs``; ``text`` says what they are for."""
    parser.add_argument("--inputs", metavar="FILE", required=required, help=f"x.npy for one input, or in.npz by name; {text}")


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def runtime_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--runtime``."""
    parser.add_argument("--runtime", choices=("tensorrt", "tensorrt_rtx"), help="default: the one that is installed")


# Values. argparse turns the ValueError of a bad one into a message with the option's name.


def batches(text: str) -> tuple[int, ...]:
    """``1,2,4``."""
    return tuple(int(part) for part in text.split(","))


def profile_batch(text: str) -> int | tuple[int, int, int]:
    """``8``, or ``1,8,32``."""
    sizes = batches(text)
    if len(sizes) == 1:
        return sizes[0]
    low, opt, high = sizes
    return low, opt, high


def size(text: str) -> int:
    """Bytes: ``512M``, ``4G``."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if unit > 1 else text) * unit)


def profile_shapes(text: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """``name=1x3x8x8`` or ``name=min:opt:max``, several parted by commas."""
    shapes = {}
    for entry in text.split(","):
        name, found, given = entry.rpartition("=")
        parts = [tuple(int(size) for size in part.split("x")) for part in given.split(":")]
        if not found or not name or len(parts) not in (1, 3):
            raise ValueError(text)
        low, opt, high = parts * 3 if len(parts) == 1 else parts
        shapes[name] = (low, opt, high)
    return shapes


def compute_capability(text: str) -> int:
    """``SM86`` or ``86``."""
    return int(text.upper().removeprefix("SM"))


# What a message of argparse calls the value.
batches.__name__ = "list of batch sizes such as 1,2,4"
profile_batch.__name__ = "batch size, or smallest, most frequent and largest such as 1,8,32,"
size.__name__ = "number of bytes such as 512M or 4G"
profile_shapes.__name__ = "shape such as name=1x3x224x224 or name=MIN:OPT:MAX"
compute_capability.__name__ = "compute capability such as SM86"
