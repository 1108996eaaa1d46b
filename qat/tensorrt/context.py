"""One execution of an engine: where its inputs and outputs lie, and the call that starts it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from ..errors import QATError
from .cuda import Buffer, Cuda
from .log import BuildLog
from .runtime import Runtime

# TensorRT's names of the types that arrays can have. NumPy has no bfloat16.
_DTYPES: dict[str, np.dtype[Any] | str] = {
    "FLOAT": np.dtype("float32"),
    "HALF": np.dtype("float16"),
    "INT8": np.dtype("int8"),
    "UINT8": np.dtype("uint8"),
    "INT32": np.dtype("int32"),
    "INT64": np.dtype("int64"),
    "BOOL": np.dtype("bool"),
    "BF16": "bfloat16",
}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an engine.

    Attributes:
        name: As in the ONNX graph.
        dtype: NumPy dtype, or ``"bfloat16"``, or TensorRT's own name of a type that no array has.
        shape: -1 where it is open.
        min: Smallest shape an input may have; None for outputs.
        opt: The shape the engine is tuned for; None for outputs.
        max: Largest shape; None for outputs.
    """

    name: str
    dtype: np.dtype[Any] | str
    shape: tuple[int, ...]
    min: tuple[int, ...] | None = None
    opt: tuple[int, ...] | None = None
    max: tuple[int, ...] | None = None

    @property
    def dtype_name(self) -> str:
        """The dtype as NumPy and PyTorch both call it, such as ``"float32"``."""
        return self.dtype if isinstance(self.dtype, str) else self.dtype.name

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 2 if isinstance(self.dtype, str) else self.dtype.itemsize


def dtype_of(trt_dtype: Any) -> np.dtype[Any] | str:
    """NumPy's dtype of TensorRT's ``DataType``, its name where NumPy has none."""
    name: str = trt_dtype.name
    return _DTYPES.get(name, name.lower())


def is_torch(value: Any) -> bool:
    """Whether ``value`` is a PyTorch tensor; never imports PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class Runnable(Protocol):
    """What a context needs to know of its :class:`qat.tensorrt.Engine`."""

    @property
    def handle(self) -> Any: ...
    @property
    def cuda(self) -> Cuda: ...
    @property
    def device(self) -> int: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def load_log(self) -> BuildLog: ...
    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...
    def give_up_context(self) -> bool: ...


def create_context(engine: Runnable) -> Any:
    """TensorRT's own ``IExecutionContext``.

    Raises:
        QATError: If there is no GPU, or its memory does not suffice, or the engine serves one context at a time.
    """
    context = engine.handle.create_execution_context()
    if context is not None and _lacks_profile(context, engine) and engine.give_up_context():
        context = None  # and its memory, before there is another
        context = engine.handle.create_execution_context()
    if context is None:
        raise QATError(f"no memory for the engine's activations. Build for a smaller batch{engine.load_log.quote()}")
    if _lacks_profile(context, engine):
        raise QATError(
            f"{engine.runtime.title}: the engine was built to serve one context at a time, and one is in use. Close that one "
            "first, or build the engine with qat.tensorrt.build, which lets contexts share its optimization profile"
        )
    return context


def _lacks_profile(context: Any, engine: Runnable) -> bool:
    """Whether the context cannot run: up to 8.6 others may hold what tells the range of shapes, where there is a range."""
    return context.active_optimization_profile < 0 and any(info.min != info.max for info in engine.inputs)


def shaped_context(engine: Runnable) -> Any:
    """A context whose inputs have the shapes that the engine is tuned for.

    Raises:
        QATError: As :func:`create_context`.
    """
    context = create_context(engine)
    for info in engine.inputs:
        context.set_input_shape(info.name, info.opt)
    return context


class ExecutionContext:
    """An engine made ready for one set of inputs; made by :meth:`qat.tensorrt.Engine.context`.

    :meth:`set_inputs` once, then :meth:`enqueue` as often as wanted. Each context has its own activation memory; one
    context must not run on two streams at a time.

    Attributes:
        outputs: After :meth:`set_inputs` with PyTorch tensors: the tensors that :meth:`enqueue` fills. With NumPy arrays:
            the arrays that :meth:`download` fills.
    """

    def __init__(self, engine: Runnable) -> None:
        # Not the engine itself, which may hold this context: memory of a circle would be freed late.
        self._context = create_context(engine)
        self._cuda, self._device, self._log = engine.cuda, engine.device, engine.load_log
        self._signature = engine.inputs, engine.outputs
        self._buffers = {info.name: Buffer(self._cuda) for info in chain(*self._signature)}
        self._inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self._profiler: Any = None

    @property
    def bytes_in(self) -> int:
        """Size of all inputs that are set."""
        return sum(_size(value) for value in self._inputs.values())

    @property
    def bytes_out(self) -> int:
        """Size of all outputs for the inputs that are set."""
        return sum(_size(value) for value in self.outputs.values())

    def set_inputs(self, inputs: Any) -> None:
        """Fix shapes and addresses of inputs and outputs.

        NumPy arrays get GPU memory of their own, kept and used again, that :meth:`upload` fills. PyTorch tensors are read
        where they are.

        Args:
            inputs: By name, or in the engine's order, or the one array; all NumPy arrays or all PyTorch CUDA tensors.

        Raises:
            QATError: If a name, dtype, shape, device or memory layout does not fit.
        """
        self.bind(self.check(inputs))

    def check(self, inputs: Any) -> dict[str, Any]:
        """The inputs by name, if they fit.

        Raises:
            QATError: If a name, dtype, shape, device or memory layout does not fit.
        """
        arrays = self._named(inputs)
        for info in self._signature[0]:
            _check(info, arrays[info.name])
        self._check_devices(arrays)
        return arrays

    def bind(self, arrays: dict[str, Any]) -> None:
        """:meth:`set_inputs` for inputs that :meth:`check` returned.

        Raises:
            QATError: If the GPU's memory does not suffice.
        """
        for info in self._signature[0]:
            shape = tuple(arrays[info.name].shape)
            if not self._context.set_input_shape(info.name, shape):
                raise QATError(f"input {info.name!r}: TensorRT refuses shape {list(shape)}{self._log.quote()}")
        outputs = {info.name: self._output(info, arrays) for info in self._signature[1]}
        for info in chain(*self._signature):
            value: Any = arrays.get(info.name, outputs.get(info.name))
            address = value.data_ptr() if is_torch(value) else self._buffers[info.name].reserve(_size(value))
            if not self._context.set_tensor_address(info.name, address or self._buffers[info.name].reserve(1)):
                raise QATError(f"{info.name!r}: TensorRT refuses its address{self._log.quote()}")
        self._inputs, self.outputs = arrays, outputs

    def upload(self, stream: int) -> None:
        """Copy the NumPy inputs to the GPU in the order of ``stream``; PyTorch tensors are there already."""
        for name, value in self._inputs.items():
            if not is_torch(value) and value.nbytes:
                self._cuda.upload(self._buffers[name].address, value.ctypes.data, value.nbytes, stream)

    def enqueue(self, stream: int) -> None:
        """Start the engine on a CUDA stream; returns before it is done.

        Args:
            stream: The stream's address (``torch.cuda.current_stream().cuda_stream``); 0 is the default stream.

        Raises:
            QATError: If the launch fails.
        """
        if not self._context.execute_async_v3(stream):
            raise QATError(f"the engine did not start{self._log.quote()}")

    def report_to(self, profiler: Any) -> None:
        """Let an ``IProfiler`` hear the time of each layer from the next :meth:`enqueue` on, which then waits for the GPU."""
        self._profiler = profiler  # TensorRT does not keep it alive
        self._context.profiler = profiler

    def download(self, stream: int) -> None:
        """Copy the outputs into the NumPy arrays of :attr:`outputs` in the order of ``stream``."""
        for name, value in self.outputs.items():
            if not is_torch(value) and value.nbytes:
                self._cuda.download(value.ctypes.data, self._buffers[name].address, value.nbytes, stream)

    def detach(self) -> dict[str, Any]:
        """The outputs, handed over: the context keeps neither them nor the inputs alive."""
        outputs, self.outputs, self._inputs = self.outputs, {}, {}
        return outputs

    def close(self) -> None:
        """Give the GPU memory back."""
        self.detach()
        self._context = None
        for buffer in self._buffers.values():
            buffer.close()

    def _named(self, inputs: Any) -> dict[str, Any]:
        wanted = [info.name for info in self._signature[0]]
        if isinstance(inputs, Mapping):
            arrays = dict(inputs)
        else:
            listed = list(inputs) if isinstance(inputs, Sequence) else [inputs]
            if len(listed) != len(wanted):
                raise QATError(f"{len(listed)} inputs given, the engine has {len(wanted)}: {', '.join(wanted)}")
            arrays = dict(zip(wanted, listed, strict=True))
        if missing := [name for name in wanted if name not in arrays]:
            raise QATError(f"input {missing[0]!r} is missing. The engine's inputs are {', '.join(wanted)}")
        if unknown := [name for name in arrays if name not in wanted]:
            raise QATError(f"the engine has no input {unknown[0]!r}. Its inputs are {', '.join(wanted)}")
        return arrays

    def _check_devices(self, arrays: Mapping[str, Any]) -> None:
        kinds = {is_torch(value) for value in arrays.values()}
        if len(kinds) > 1:
            raise QATError("inputs mix NumPy arrays and PyTorch tensors. Pass one kind")
        device = self._device
        for name, value in arrays.items():
            if is_torch(value) and not value.is_cuda:
                raise QATError(f"input {name!r} is on the {value.device.type}. Pass a CUDA tensor, or a NumPy array")
            if is_torch(value) and value.device.index != device:
                raise QATError(f"input {name!r} is on GPU {value.device.index}, the engine on GPU {device}. Move one of them")
        if self._cuda.current_device() != device:
            raise QATError(f"GPU {self._cuda.current_device()} is current, the engine is on GPU {device}. Select that one")

    def _output(self, info: TensorInfo, arrays: Mapping[str, Any]) -> Any:
        shape = tuple(self._context.get_tensor_shape(info.name))
        if any(size < 0 for size in shape):
            raise QATError(
                f"output {info.name!r} has shape {list(shape)}: its size depends on the data. End the graph before that node"
            )
        example: Any = next(iter(arrays.values()), None)
        if is_torch(example):
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=_torch_dtype(torch, info), device=example.device)
        if isinstance(info.dtype, str):
            raise QATError(
                f"output {info.name!r} is {info.dtype}, which NumPy does not have. Pass PyTorch CUDA tensors, or export with "
                "float32 outputs"
            )
        return np.empty(shape, info.dtype)


def _torch_dtype(torch: Any, info: TensorInfo) -> Any:
    dtype = getattr(torch, info.dtype_name, None)
    if dtype is None:
        raise QATError(f"output {info.name!r} is {info.dtype_name}, which PyTorch does not have")
    return dtype


def _size(value: Any) -> int:
    return int(value.nbytes)


def _check(info: TensorInfo, value: Any) -> None:
    """Whether one input fits: kind, dtype, memory layout, shape. Nothing is cast or copied silently."""
    if is_torch(value):
        dtype, contiguous, remedy = str(value.dtype).removeprefix("torch."), value.is_contiguous(), ".contiguous()"
        fits, cast = dtype == info.dtype_name, f".to(torch.{info.dtype_name})"
    elif isinstance(value, np.ndarray):
        dtype, contiguous, remedy = str(value.dtype), value.flags.c_contiguous, "numpy.ascontiguousarray"
        fits, cast = value.dtype == info.dtype, f".astype({info.dtype_name!r})"
        if isinstance(info.dtype, str):
            fits, cast = False, "PyTorch CUDA tensors, NumPy has no such type"
    else:
        raise QATError(f"input {info.name!r} is a {type(value).__name__}. Pass a NumPy array or a PyTorch CUDA tensor")
    if not fits:
        raise QATError(f"input {info.name!r} is {dtype}, the engine takes {info.dtype_name}. Use {cast}")
    if not contiguous:
        raise QATError(f"input {info.name!r} is not contiguous (row-major). Use {remedy}")
    shape = tuple(value.shape)
    assert info.min is not None
    assert info.max is not None
    fits = len(shape) == len(info.min) and all(
        low <= size <= high for low, size, high in zip(info.min, shape, info.max, strict=True)
    )
    if not fits:
        allowed = f"{list(info.min)}" + (f" to {list(info.max)}" if info.min != info.max else "")
        raise QATError(
            f"input {info.name!r} has shape {list(shape)}, the engine takes {allowed}. Build with other shapes= or batch="
        )
