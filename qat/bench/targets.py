"""What can be measured: adapters that make a run of each kind of target one call."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QATError
from ..graph.run import open_session, told
from .cuda import CudaEvents
from .target import Target, batch_of, nothing

PLANS = (".engine", ".plan", ".trt")
# ONNX Runtime's names of element types.
_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@contextlib.contextmanager
def open_target(
    target: Any, inputs: Any, *, batch: int | None, copies: bool, cuda_graph: bool, spin_wait: bool
) -> Iterator[Target]:
    """The adapter of ``target``, ready to run; GPU memory and streams are given back at the end.

    Raises:
        QATError: If nothing here can run it, or its inputs do not fit.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(target, (str, os.PathLike)):
            target = from_path(Path(target), stack)
        if isinstance(target, Target):
            opened = target if batch is None else replace(target, batch=batch)
        elif is_a(target, "torch.nn", "Module"):
            from .torch_target import open_module

            opened = open_module(target, inputs, batch, copies, cuda_graph, spin_wait, stack)
        elif is_a(target, "onnxruntime", "InferenceSession"):
            opened = _session(target, inputs, batch)
        elif is_a(target, "qat.tensorrt.engine", "Engine"):
            # Deserialized first: without a GPU the engine says so better than a stream that cannot be made.
            _ = target.handle
            events = CudaEvents(spin_wait=spin_wait)
            stack.callback(events.close)
            opened = open_engine(target, inputs, batch, copies, cuda_graph, events, stack)
        else:
            raise QATError(
                f"target is a {type(target).__name__}: pass a PyTorch module, an ONNX Runtime session, a qat.tensorrt.Engine, "
                "the path of an .onnx file or a plan, or a qat.bench.Target"
            )
        if opened.stream is None and copies:
            raise QATError(f"copies=True: {opened.label} runs on the CPU here, there is nothing to copy. Pass copies=False")
        if cuda_graph and not opened.cuda_graph:
            raise QATError(f"cuda_graph=True: {opened.label} runs on the CPU here. Move it to a GPU or pass cuda_graph=False")
        yield opened


def is_a(target: Any, module: str, name: str) -> bool:
    """Whether ``target`` is of a class in a module that, if it is, somebody has imported already."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(target, found)


def from_path(path: Path, stack: contextlib.ExitStack) -> Any:
    """A session of an ONNX file on the CPU, or the engine of a plan, open until ``stack`` is left.

    Raises:
        QATError: If there is no such file, or it is neither, or cannot be loaded.
    """
    if not path.is_file():
        raise QATError(f"{path}: no such file")
    if path.suffix == ".onnx":
        # With its optimizations: that is what it is measured for.
        return open_session(path, as_written=False, blame=f"{path}: ONNX Runtime cannot load it")
    if path.suffix in PLANS:
        from ..tensorrt import load

        return stack.enter_context(load(path))
    raise QATError(f"{path}: expected an ONNX file (.onnx) or a plan ({', '.join(PLANS)})")


def _session(session: Any, inputs: Any, batch: int | None) -> Target:
    import onnxruntime

    wanted = session.get_inputs()
    if inputs is None:
        feeds = {i.name: random_array(_ort_dtype(i), _closed(i.name, i.shape, batch)) for i in wanted}
    else:
        feeds = named([i.name for i in wanted], inputs)
    provider = session.get_providers()[0]
    notes = () if provider == "CPUExecutionProvider" else ("ONNX Runtime's run includes copies and waits for the GPU",)
    with told("ONNX Runtime cannot run the model with these inputs"):
        session.run(None, feeds)
    return Target(
        f"ONNX Runtime ({provider})",
        lambda: session.run(None, feeds),
        batch=batch_of(feeds.values(), batch),
        versions={"onnxruntime": onnxruntime.__version__},
        notes=notes,
    )


def _ort_dtype(info: Any) -> str:
    if info.type not in _ORT_TYPES:
        raise QATError(f"input {info.name!r} is a {info.type}: no random one can be made. Pass inputs=")
    return _ORT_TYPES[info.type]


def _closed(name: str, shape: Sequence[Any], batch: int | None) -> tuple[int, ...]:
    """``shape`` with its open first dimension set to ``batch`` (1 by default)."""
    sizes = [size if isinstance(size, int) and size >= 0 else None for size in shape]
    if sizes and sizes[0] is None:
        sizes[0] = 1 if batch is None else batch
    elif sizes and batch is not None and sizes[0] != batch:
        raise QATError(f"batch={batch}: input {name!r} has the fixed shape {list(shape)}")
    if None in sizes:
        raise QATError(f"input {name!r} has the open shape {list(shape)}. Pass inputs= with arrays of the size to measure")
    return tuple(size for size in sizes if size is not None)


def open_engine(
    engine: Any, inputs: Any, batch: int | None, copies: bool, cuda_graph: bool, events: CudaEvents, stack: contextlib.ExitStack
) -> Target:
    """The adapter of a :class:`qat.tensorrt.Engine` on the stream of ``events``."""
    if inputs is None:
        inputs = {i.name: random_array(i.dtype_name, _engine_shape(i, batch)) for i in engine.inputs}
    arrays = named([info.name for info in engine.inputs], inputs)
    if copies:
        arrays = {name: _pinned(events, _to_numpy(value)) for name, value in arrays.items()}
    context = engine.context()
    stack.callback(context.close)
    # Runs before the context gives its memory back: nothing may still be using it.
    stack.callback(events.synchronize)
    context.set_inputs(arrays)
    if copies:
        for name, value in context.outputs.items():
            context.outputs[name] = _pinned(events, value)
    # Tensors that PyTorch is still computing on a stream of its own are waited for.
    events.runtime.function("cudaDeviceSynchronize")()
    stream = events.stream
    context.upload(stream)
    # Once before a capture: TensorRT allocates and initialises in the first run after shapes are set.
    context.enqueue(stream)
    events.synchronize()
    graph = events.capture(lambda: context.enqueue(stream)) if cuda_graph else None
    return Target(
        "CUDA graph of an engine" if cuda_graph else "engine",
        graph.launch if graph is not None else lambda: context.enqueue(stream),
        batch=batch_of(arrays.values(), batch),
        stream=events,
        device=f"GPU {events.device}",
        copy_in=(lambda: context.upload(stream)) if copies else nothing,
        copy_out=(lambda: context.download(stream)) if copies else nothing,
        cuda_graph=cuda_graph,
        versions={engine.runtime.name: engine.runtime.module.__version__},
    )


def _engine_shape(info: Any, batch: int | None) -> tuple[int, ...]:
    """The shape that the engine is tuned for, with ``batch`` in place of an open first dimension."""
    shape = tuple(info.opt)
    if batch is None or not shape or shape[0] == batch:
        return shape
    if info.shape[0] != -1:
        raise QATError(f"batch={batch}: input {info.name!r} has the fixed shape {list(info.shape)}")
    if not info.min[0] <= batch <= info.max[0]:
        raise QATError(
            f"batch={batch}: input {info.name!r} takes batches from {info.min[0]} to {info.max[0]}. Build with another batch="
        )
    return (batch, *shape[1:])


def _to_numpy(value: Any) -> np.ndarray:
    return value.cpu().numpy() if is_a(value, "torch", "Tensor") else value


def _pinned(events: CudaEvents, array: np.ndarray) -> np.ndarray:
    """A copy of ``array`` in pinned memory."""
    memory = events.pinned(array.nbytes).view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def named(names: Sequence[str], inputs: Any) -> dict[str, Any]:
    """Inputs by name, from a mapping, a sequence in order, or the only one.

    Raises:
        QATError: If there are too few or too many, or a name is unknown.
    """
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    elif isinstance(inputs, (list, tuple)):
        if len(inputs) != len(names):
            raise QATError(f"{len(inputs)} inputs given, the model has {len(names)}: {', '.join(names)}")
        given = dict(zip(names, inputs, strict=True))
    elif len(names) == 1:
        given = {names[0]: inputs}
    else:
        raise QATError(f"one input given, the model has {len(names)}: {', '.join(names)}")
    if set(given) != set(names):
        raise QATError(f"inputs are named {', '.join(map(repr, given))}; the model's are {', '.join(map(repr, names))}")
    return given


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal floats, always the same; zeros for other types, which are valid indices and masks.

    Raises:
        QATError: If NumPy lacks the type.
    """
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise QATError(f"no random input of type {dtype} can be made with NumPy. Pass inputs= with PyTorch tensors") from error
    if kind.kind != "f":
        return np.zeros(shape, kind)
    return np.random.default_rng(0).standard_normal(shape).astype(kind)
