"""Tensors of a TensorFlow.js graph model: ``model.json`` and the binary files beside it.

The layout is that of tfjs-converter: ``weightsManifest`` is a list of groups; each names the files that follow one another,
and the tensors in them by name, shape and type, in order, without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QATError

# Little endian, as tfjs-converter writes.
_TYPES = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4")}


def read_tensors(folder: str | Path) -> dict[str, NDArray[Any]]:
    """The tensors of a TensorFlow.js model by name.

    Nothing in the files is run, and no file outside ``folder`` is read: they may come from anywhere.

    Args:
        folder: Holds ``model.json``.

    Raises:
        QATError: For files that are missing, too long, too short, or no such model; for quantized tensors, and for values
            that are not finite.
    """
    root = Path(folder)
    try:
        model = json.loads((root / "model.json").read_text(encoding="utf-8"))
    # A deeply nested text exceeds the parser's recursion.
    except (OSError, ValueError, RecursionError) as error:
        raise QATError(f"{root / 'model.json'}: cannot be read: {error}") from error
    groups = model.get("weightsManifest") if isinstance(model, dict) else None
    if not isinstance(groups, list) or not groups:
        raise QATError(f"{root / 'model.json'}: not a TensorFlow.js model, it has no weightsManifest")
    tensors: dict[str, NDArray[Any]] = {}
    for group in groups:
        for name, value in _group(root, group):
            if name in tensors:
                raise QATError(f"{root / 'model.json'}: tensor {name!r} is listed twice")
            tensors[name] = value
    return tensors


def _group(root: Path, group: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    paths, entries = (group.get(key) if isinstance(group, dict) else None for key in ("paths", "weights"))
    if not isinstance(paths, list) or not isinstance(entries, list):
        raise QATError(f"{root / 'model.json'}: a group of the weightsManifest has no paths or no weights")
    specs = [_spec(root, entry) for entry in entries]
    files = [_inside(root, path) for path in paths]
    expected = sum(dtype.itemsize * math.prod(shape) for _, shape, dtype in specs)
    try:
        # Before anything is read: memory is what the manifest says, not what lies in the folder.
        found = sum(file.stat().st_size for file in files)
        if found != expected:
            raise QATError(f"{root}: {', '.join(map(str, paths))} hold {found} bytes, the tensors of model.json {expected}")
        raw = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise QATError(f"{root}: weights cannot be read: {error}") from error
    offset = 0
    for name, shape, dtype in specs:
        value = np.frombuffer(raw, dtype, math.prod(shape), offset).reshape(shape)
        offset += value.nbytes
        if not np.isfinite(value).all():
            raise QATError(f"{root}: tensor {name!r} holds values that are not finite")
        yield name, value


def _spec(root: Path, entry: Any) -> tuple[str, tuple[int, ...], np.dtype[Any]]:
    """Name, shape and type of a tensor in the manifest."""
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    name, shape, kind = (fields.get(key) for key in ("name", "shape", "dtype"))
    plain = isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    if not isinstance(name, str) or not plain or not isinstance(kind, str):
        raise QATError(f"{root / 'model.json'}: {str(entry)[:80]} is no tensor with name, shape and dtype")
    if kind not in _TYPES or "quantization" in fields:
        raise QATError(f"{root / 'model.json'}: tensor {name!r} is quantized, or neither of {', '.join(_TYPES)}")
    return name, tuple(shape), _TYPES[kind]  # type: ignore[arg-type]


def _inside(root: Path, path: Any) -> Path:
    """The file that a manifest names, which must lie in the folder itself."""
    if not isinstance(path, str) or path in ("", ".", "..") or "\0" in path or "/" in path or "\\" in path:
        raise QATError(f"{root / 'model.json'}: {path!r} is no name of a file in the same folder")
    if not (root / path).resolve().is_relative_to(root.resolve()):
        raise QATError(f"{root / 'model.json'}: {path!r} is a link that leaves the folder")
    return root / path
