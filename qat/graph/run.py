"""ONNX Runtime on the CPU: the one place that opens it, as written or with its optimizations.

A file is opened without the onnx package: a machine that measures engines need not have it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QATError

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

# Protobuf writes no message of 2 GiB; the rest is for what is added to a model.
_PROTOBUF_LIMIT = 2**31 - 2**20


def open_session(
    source: ModelProto | bytes | str | os.PathLike[str],
    *,
    as_written: bool = True,
    threads: int | None = None,
    blame: str = "ONNX Runtime cannot load the graph",
    scratch: str | os.PathLike[str] | None = None,
) -> InferenceSession:
    """An ONNX Runtime session on the CPU.

    Args:
        source: A file, whose external data lies beside it, its bytes, or a model with its weights, of any size.
        as_written: Run Q/DQ nodes as the file has them, in float, and every operator by itself. Otherwise they may become
            integer kernels of the CPU, which are faster and round differently from TensorRT.
        threads: Within one operator; ONNX Runtime's choice by default.
        blame: Begins the message if it fails.
        scratch: Where a model of 2 GiB or more is written for the while; the system's folder by default.

    Raises:
        QATError: If ONNX Runtime is not installed, or refuses the graph.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise QATError(f"{blame}: it is not installed: `pip install onnxruntime`") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    with contextlib.ExitStack() as stack:
        stack.enter_context(told(blame))
        if not isinstance(source, (bytes, str, os.PathLike)):
            source = source.SerializeToString() if source.ByteSize() < _PROTOBUF_LIMIT else _stored(source, scratch, stack)
        opened = source if isinstance(source, bytes) else os.fspath(source)
        return onnxruntime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])


def _stored(model: ModelProto, scratch: str | os.PathLike[str] | None, stack: contextlib.ExitStack) -> str:
    """A file of a model that is too large for one message; gone with ``stack``."""
    import onnx

    path = str(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch))) / "model.onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="model.data")
    return path


def run_model(
    source: ModelProto | bytes | str | os.PathLike[str],
    feeds: Mapping[str, np.ndarray],
    *,
    wanted: Collection[str] | None = None,
    blame: str,
    remedy: str = "",
    scratch: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """The outputs of a graph, run once as written.

    Args:
        source: As for :func:`open_session`.
        feeds: The inputs.
        wanted: Names of outputs; all by default.
        blame: Begins the message if it fails.
        remedy: Ends it, if the inputs may be at fault.
        scratch: As for :func:`open_session`.

    Raises:
        QATError: If ONNX Runtime refuses the graph or the inputs.
    """
    session = open_session(source, blame=blame, scratch=scratch)
    names = list(wanted) if wanted is not None else [value.name for value in session.get_outputs()]
    with told(blame, remedy):
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def marked(model: ModelProto, extra: Collection[str]) -> ModelProto:
    """A copy of a model that returns tensors ``extra`` besides its outputs. Their types are ONNX Runtime's to infer."""
    from onnx import ModelProto, ValueInfoProto

    copy = ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    copy.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(extra) if name not in known)
    return copy


@contextlib.contextmanager
def told(blame: str, remedy: str = "") -> Iterator[None]:
    """Tell what ONNX Runtime raises as a ``QATError``.

    Args:
        blame: Comes before its words.
        remedy: Comes after them.
    """
    try:
        yield
    except errors() as error:
        raise QATError(f"{blame}: {error}{remedy}") from error


def errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its exceptions have no common base below ``Exception``."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: list[Any] = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    # ValueError: inputs that do not fit.
    return (*found, ValueError)
