"""CUDA events, graphs and pinned memory without PyTorch, through the CUDA runtime library that polygraphy finds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..errors import QATError

_NON_BLOCKING_STREAM = 1
_BLOCKING_SYNC_EVENT = 1
_CAPTURE_THREAD_LOCAL = 1


class Event(Protocol):
    """A point in a stream's work."""

    def record(self) -> None:
        """Put the event behind the work enqueued so far."""

    def synchronize(self) -> None:
        """Wait until the GPU has reached the event."""

    def since(self, earlier: Any) -> float:
        """Milliseconds from ``earlier`` to this event; both must have been reached."""


class Stream(Protocol):
    """A CUDA stream on which a target enqueues its work."""

    device: str

    def event(self) -> Event:
        """A new event of this stream."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def close(self) -> None:
        """Give the stream and its events back."""


class CudaRuntime:
    """The CUDA runtime library, its calls checked.

    Args:
        library: The loaded library; by default what polygraphy finds.

    Raises:
        QATError: If polygraphy or the library is missing.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                from polygraphy.cuda import wrapper  # type: ignore[import-untyped]

                library = wrapper().handle
            except ImportError as error:
                raise QATError("measuring an engine needs polygraphy: install it with `pip install polygraphy`") from error
            except OSError as error:
                raise QATError(f"the CUDA runtime library was not found ({error}); add it to LD_LIBRARY_PATH") from error
        self._library = library
        self._error_string = library["cudaGetErrorString"]
        self._error_string.restype = ctypes.c_char_p
        self._last_error = library["cudaGetLastError"]

    def function(self, name: str, *types: Any) -> Callable[..., None]:
        """A function of the library that raises instead of returning a status.

        Args:
            name: As in the library.
            *types: ctypes types of its arguments.
        """
        # Looked up by item, a function object is made anew: its types are not seen by other users of the library.
        raw = self._library[name]
        raw.argtypes = types

        def call(*arguments: Any) -> None:
            status = raw(*arguments)
            if status:
                # An error that is not fetched would be reported again by the next, innocent call.
                self._last_error()
                raise QATError(f"{name}: CUDA error {status} ({self._error_string(status).decode()})")

        return call


class CudaEvent:
    """A timing event, made by :meth:`CudaEvents.event`."""

    def __init__(self, events: CudaEvents, handle: int) -> None:
        self.handle = handle
        self._events = events

    def record(self) -> None:
        """Put the event behind the work enqueued so far."""
        self._events.record(self.handle, self._events.stream)

    def synchronize(self) -> None:
        """Wait until the GPU has reached the event."""
        self._events.wait(self.handle)

    def since(self, earlier: CudaEvent) -> float:
        """Milliseconds from ``earlier`` to this event; both must have been reached."""
        self._events.elapsed(self._events.milliseconds_at, earlier.handle, self.handle)
        return self._events.milliseconds.value


class CudaEvents:
    """A stream of its own and its timing events.

    Args:
        spin_wait: Wait by polling; otherwise the waiting thread sleeps, which costs some 10 µs per run.
        runtime: The CUDA runtime.
    """

    def __init__(self, *, spin_wait: bool = True, runtime: CudaRuntime | None = None) -> None:
        pointer, flags, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
        self.runtime = runtime = runtime or CudaRuntime()
        self.record = runtime.function("cudaEventRecord", pointer, pointer)
        self.wait = runtime.function("cudaEventSynchronize", pointer)
        self.elapsed = runtime.function("cudaEventElapsedTime", pointer, pointer, pointer)
        self.milliseconds = ctypes.c_float()
        self.milliseconds_at = ctypes.byref(self.milliseconds)
        self._create_event = runtime.function("cudaEventCreateWithFlags", pointer, flags)
        self._destroy_event = runtime.function("cudaEventDestroy", pointer)
        self._synchronize = runtime.function("cudaStreamSynchronize", pointer)
        self._destroy_stream = runtime.function("cudaStreamDestroy", pointer)
        self._allocate_pinned = runtime.function("cudaHostAlloc", pointer, size, flags)
        self._free_pinned = runtime.function("cudaFreeHost", pointer)
        self._event_flags = 0 if spin_wait else _BLOCKING_SYNC_EVENT
        self._events: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[CapturedGraph] = []
        stream = ctypes.c_void_p()
        runtime.function("cudaStreamCreateWithFlags", pointer, flags)(ctypes.byref(stream), _NON_BLOCKING_STREAM)
        self.stream = stream.value or 0
        self.device = self._bus_id()

    def _bus_id(self) -> str:
        index = ctypes.c_int()
        self.runtime.function("cudaGetDevice", ctypes.c_void_p)(ctypes.byref(index))
        text = ctypes.create_string_buffer(32)
        get = self.runtime.function("cudaDeviceGetPCIBusId", ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
        get(text, len(text), index.value)
        return text.value.decode()

    def event(self) -> CudaEvent:
        """A new timing event; it lives as long as this object is open."""
        handle = ctypes.c_void_p()
        self._create_event(ctypes.byref(handle), self._event_flags)
        self._events.append(handle.value or 0)
        return CudaEvent(self, handle.value or 0)

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self._synchronize(self.stream)

    def pinned(self, size: int) -> np.ndarray:
        """Page-locked host memory of ``size`` bytes, as uint8 zeros; valid while this object is open."""
        address = ctypes.c_void_p()
        self._allocate_pinned(ctypes.byref(address), max(size, 1), 0)
        self._pinned.append(address.value or 0)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address.value or 0))
        memory[:] = 0
        return memory

    def capture(self, enqueue: Callable[[], object]) -> CapturedGraph:
        """Capture what ``enqueue`` puts on the stream; nothing of it runs.

        Raises:
            QATError: If it does something that cannot be captured. The stream can be used afterwards.
        """
        graph = CapturedGraph(self, enqueue)
        self._graphs.append(graph)
        return graph

    def close(self) -> None:
        """Give events, pinned memory and the stream back, after all work is done."""
        if not self.stream:
            return
        stream, self.stream = self.stream, 0
        self._synchronize(stream)
        for graph in self._graphs:
            graph.close()
        for handle in self._events:
            self._destroy_event(handle)
        for address in self._pinned:
            self._free_pinned(address)
        self._graphs, self._events, self._pinned = [], [], []
        self._destroy_stream(stream)


class CapturedGraph:
    """A CUDA graph of work on the stream of a :class:`CudaEvents`."""

    def __init__(self, events: CudaEvents, enqueue: Callable[[], object]) -> None:
        runtime, pointer = events.runtime, ctypes.c_void_p
        begin = runtime.function("cudaStreamBeginCapture", pointer, ctypes.c_int)
        end = runtime.function("cudaStreamEndCapture", pointer, pointer)
        # Unlike cudaGraphInstantiate, this one has the same arguments in CUDA 11.4, 12 and 13.
        instantiate = runtime.function("cudaGraphInstantiateWithFlags", pointer, pointer, ctypes.c_ulonglong)
        destroy = runtime.function("cudaGraphDestroy", pointer)
        self._launch = runtime.function("cudaGraphLaunch", pointer, pointer)
        self._destroy_executable = runtime.function("cudaGraphExecDestroy", pointer)
        self._events = events
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        begin(events.stream, _CAPTURE_THREAD_LOCAL)
        captured = False
        try:
            enqueue()
            captured = True
        finally:
            # The capture is ended in any case, or the stream would stay unusable; a failure of enqueue says more than
            # the failure of ending that it causes.
            try:
                end(events.stream, ctypes.byref(graph))
            except QATError as error:
                if captured:
                    raise QATError(f"the engine can't be captured as a CUDA graph: {error}. Pass cuda_graph=False") from error
        try:
            instantiate(ctypes.byref(executable), graph.value, 0)
        finally:
            destroy(graph.value)
        self._executable = executable.value or 0

    def launch(self) -> None:
        """Enqueue the graph on the stream."""
        self._launch(self._executable, self._events.stream)

    def close(self) -> None:
        """Give the graph back."""
        if self._executable:
            executable, self._executable = self._executable, 0
            self._destroy_executable(executable)
