"""A built engine: run it, save it, load it."""

from __future__ import annotations

import os
import threading
from functools import cached_property
from typing import Any

from ..errors import QATError
from ..support.files import read_whole, write_whole
from .context import ExecutionContext, TensorInfo, dtype_of, is_torch, shaped_context
from .cuda import Cuda, Handle, has_gpu
from .log import BuildLog, messages_of
from .runtime import Runtime, as_runtime

# Records of an engine at work: enough to explain an error, bounded for a service that runs for months.
_KEPT = 100


class Engine:
    """A TensorRT engine, deserialized when it is first used.

    A context manager: leaving it gives the GPU memory back.

    Attributes:
        plan: The serialized engine.
        runtime: The TensorRT that built it or is to run it.
        onnx_path: The file it was built from, if it was built from a file.
        log: Records of the build; empty for a loaded engine.
        load_log: Records of deserializing and running.
        targets: What TensorRT-RTX compiled it for, such as ``("SM86",)``; empty for a loaded engine and other runtimes.
    """

    def __init__(
        self,
        plan: bytes,
        runtime: Runtime,
        *,
        log: BuildLog | None = None,
        onnx_path: str | None = None,
        tensors: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]] | None = None,
        host_code: bool = False,
        targets: tuple[str, ...] = (),
        title: str = "the engine",
    ) -> None:
        self.plan = plan
        self.runtime = runtime
        self.onnx_path = onnx_path
        self.log = BuildLog() if log is None else log
        self.load_log = BuildLog()
        self._tensors = tensors
        self._host_code = host_code
        self.targets = targets
        self._title = title
        self._engine: Any = None
        self._context: ExecutionContext | None = None
        # The stream of NumPy runs, and the event and stream of the last run of any kind.
        self._stream: Handle | None = None
        self._done: Handle | None = None
        self._last_stream = 0
        self._device: int | None = None
        self._running = threading.Lock()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({len(self.plan)} bytes, {self.runtime.title})"

    @cached_property
    def cuda(self) -> Cuda:
        """The CUDA runtime that runs it."""
        return Cuda()

    @property
    def handle(self) -> Any:
        """TensorRT's own ``ICudaEngine``; deserialized on first use.

        Raises:
            QATError: If there is no GPU, or the plan is corrupt, or of another version or GPU.
        """
        if self._engine is None:
            self._deserialize()
        return self._engine

    @property
    def device(self) -> int:
        """Index of the GPU it was deserialized on."""
        if self._device is None:
            self._deserialize()
        assert self._device is not None
        return self._device

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Its inputs, in the graph's order."""
        return self._signature()[0]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Its outputs, in the graph's order."""
        return self._signature()[1]

    @property
    def layer_information(self) -> str | None:
        """The engine inspector's JSON; None where TensorRT-RTX cannot deserialize for want of a GPU.

        Raises:
            QATError: If the engine cannot be deserialized, or the GPU's memory does not suffice.
        """
        if self.runtime.is_rtx and self._engine is None and not has_gpu():
            return None
        trt: Any = self.runtime.module
        inspector = self.handle.create_engine_inspector()
        # Without shapes the inspector tells no formats. It does not keep its context alive, and 8.6 crashes without it.
        context = shaped_context(self) if any(-1 in info.shape for info in self.inputs) else None
        if context is not None:
            inspector.execution_context = context
        information = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        del inspector, context
        return information

    def run(self, inputs: Any) -> dict[str, Any]:
        """Compute the outputs.

        Args:
            inputs: By name, in the engine's order, or the one array. NumPy arrays: copied to the GPU and back. PyTorch CUDA
                tensors: read in place on PyTorch's current stream; the call returns before the engine is done, as
                PyTorch's own operators do. dtype, shape and (row-major) layout must be the engine's.

        Returns:
            Outputs by name, of the inputs' kind; new ones each call.

        Raises:
            QATError: If an input does not fit, there is no GPU, or its memory does not suffice.
        """
        with self._running:
            if self._context is None:
                self._context = ExecutionContext(self)
            context = self._context
            arrays = context.check(inputs)
            try:
                context.bind(arrays)
                example: Any = next(iter(arrays.values()), None)
                if is_torch(example):
                    import torch

                    self._enqueue(context, torch.cuda.current_stream(example.device).cuda_stream)
                else:
                    if self._stream is None:
                        self._stream = Handle(self.cuda.create_stream(), self.cuda.destroy_stream)
                    stream = self._stream.address
                    context.upload(stream)
                    self._enqueue(context, stream)
                    context.download(stream)
                    self.cuda.synchronize(stream)
                return context.detach()
            except QATError:
                # After a failed launch or allocation neither its memory nor its state is of use.
                self._release()
                raise

    def context(self) -> ExecutionContext:
        """A context of its own, with its own activation memory, to enqueue without the checks and copies of :meth:`run`.

        Raises:
            QATError: If there is no GPU, its memory does not suffice, or another context is open of an engine that was built
                elsewhere with TensorRT 8.6 to serve one at a time.
        """
        return ExecutionContext(self)

    def give_up_context(self) -> bool:
        """Close the context of :meth:`run`, which will make itself another; whether there was one.

        For engines that serve one context at a time.
        """
        if self._context is None:
            return False
        with self._running:
            if self._done is not None:
                self.cuda.synchronize_event(self._done.address)
            self._release()
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, as TensorRT's own tools read it.

        Raises:
            QATError: If the file cannot be written; an older file of that name stays whole.
        """
        write_whole(path, self.plan)

    def close(self) -> None:
        """Give the GPU memory back; the engine can be used again, which deserializes it anew."""
        with self._running:
            if self._done is not None:
                # What PyTorch runs have started must not lose its memory.
                self.cuda.synchronize_event(self._done.address)
            self._release()
            self._engine = None
            self._device = None

    def _enqueue(self, context: ExecutionContext, stream: int) -> None:
        """Start the context on ``stream``, after what it may still do on another stream: it has one activation memory."""
        if self._done is None:
            self._done = Handle(self.cuda.create_event(), self.cuda.destroy_event)
        elif stream != self._last_stream:
            self.cuda.wait(stream, self._done.address)
        context.enqueue(stream)
        self.cuda.record(self._done.address, stream)
        self._last_stream = stream

    def _release(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
        for handle in (self._stream, self._done):
            if handle is not None:
                handle.close()
        self._stream = self._done = None

    def _deserialize(self) -> None:
        trt: Any = self.runtime.module
        if not self.cuda.devices():
            raise QATError(
                f"no CUDA device: the engine can be saved here, but not be run or looked into. Run it where its GPU is "
                f"({self.runtime.title})"
            )
        self._device = self.cuda.current_device()
        del self.load_log[:]
        runtime = trt.Runtime(messages_of(trt).listen(self.load_log, _KEPT))
        if self._host_code:
            runtime.engine_host_code_allowed = True
        self._engine = runtime.deserialize_cuda_engine(self.plan)
        if self._engine is None:
            raise QATError(
                f"{self.runtime.title} cannot load {self._title}: it is corrupt, or was built by another version or for "
                f"another GPU. Build it again here{self.load_log.quote()}"
            )

    def _signature(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        if self._tensors is None:
            self._tensors = _tensors(self.runtime.module, self.handle)
        return self._tensors


def load(path: str | os.PathLike[str], runtime: Runtime | str | None = None, *, host_code: bool = False) -> Engine:
    """Read a plan that :meth:`Engine.save` or another of TensorRT's tools wrote.

    Args:
        path: The plan.
        runtime: What is to run it; by default what is installed.
        host_code: Let the plan bring code that runs on the CPU. Engines built with ``version_compatible`` need it; allow it
            only for plans from a source you trust.

    Returns:
        The engine. Whether its version and GPU fit shows when it is first used.

    Raises:
        QATError: If no runtime is installed or the file cannot be read or is empty.
    """
    plan = read_whole(path)
    if not plan:
        raise QATError(f"{os.fspath(path)}: the file is empty, not a TensorRT plan")
    return Engine(plan, as_runtime(runtime), host_code=host_code, title=os.fspath(path))


def _tensors(trt: Any, engine: Any) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    inputs, outputs = [], []
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        dtype, shape = dtype_of(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, opt, high = (tuple(s) for s in engine.get_tensor_profile_shape(name, 0))
            inputs.append(TensorInfo(name, dtype, shape, low, opt, high))
        else:
            outputs.append(TensorInfo(name, dtype, shape))
    return tuple(inputs), tuple(outputs)
