"""The few calls of the CUDA runtime that running an engine takes: memory, copies and streams.

polygraphy finds and loads the library. The calls are checked here, so that a failure is an error with CUDA's own words.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

from ..errors import QATError

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_OUT_OF_MEMORY = 2
# cudaDevAttrComputeCapabilityMajor and Minor.
_CAPABILITY = (75, 76)
_DISABLE_TIMING = 2


class Cuda:
    """The CUDA runtime library.

    Args:
        library: The loaded library; by default the one that polygraphy finds.

    Raises:
        QATError: If polygraphy or the library is not installed.
    """

    def __init__(self, library: Any = None) -> None:
        self._library: Any = _find() if library is None else library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any, what: str) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            words = self._library.cudaGetErrorString(status).decode()
            # Otherwise the next, innocent call would report this error again.
            self._library.cudaGetLastError()
            remedy = ". Use a smaller batch, or free GPU memory" if status == _OUT_OF_MEMORY else ""
            raise QATError(f"{what}: CUDA error {status} ({words}){remedy}")

    def devices(self) -> int:
        """Number of GPUs that can be used; 0 without a driver."""
        count = ctypes.c_int()
        if self._library.cudaGetDeviceCount(ctypes.byref(count)):
            self._library.cudaGetLastError()
            return 0
        return count.value

    def current_device(self) -> int:
        """Index of the calling thread's GPU."""
        index = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(index), what="no GPU")
        return index.value

    def capability(self) -> tuple[int, int]:
        """Compute capability of the current GPU, such as ``(8, 6)``."""
        parts = []
        for attribute in _CAPABILITY:
            value = ctypes.c_int()
            arguments = ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(self.current_device())
            self._call("cudaDeviceGetAttribute", *arguments, what="compute capability")
            parts.append(value.value)
        return parts[0], parts[1]

    def free_memory(self) -> int:
        """Free bytes of the current GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total), what="GPU memory")
        return free.value

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of GPU memory."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size), what=f"{size} bytes of GPU memory")
        return pointer.value or 0

    def release(self, address: int) -> None:
        """Give memory of :meth:`allocate` back."""
        self._call("cudaFree", ctypes.c_void_p(address), what="freeing GPU memory")

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes from the host to the GPU, in the order of ``stream``."""
        self._copy(device, host, size, _HOST_TO_DEVICE, stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes from the GPU to the host, in the order of ``stream``."""
        self._copy(host, device, size, _DEVICE_TO_HOST, stream)

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        arguments = (ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(kind))
        self._call("cudaMemcpyAsync", *arguments, ctypes.c_void_p(stream), what=f"copying {size} bytes")

    def create_stream(self) -> int:
        """A new stream."""
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream), what="creating a stream")
        return stream.value or 0

    def create_event(self) -> int:
        """A new event without timing."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), ctypes.c_uint(_DISABLE_TIMING), what="creating an event")
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Let ``event`` happen when ``stream`` has done what it has to do now."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream), what="recording an event")

    def wait(self, stream: int, event: int) -> None:
        """Let ``stream`` wait for ``event``; the host does not."""
        arguments = ctypes.c_void_p(stream), ctypes.c_void_p(event), ctypes.c_uint(0)
        self._call("cudaStreamWaitEvent", *arguments, what="waiting for an event")

    def synchronize_event(self, event: int) -> None:
        """Wait until ``event`` has happened."""
        self._call("cudaEventSynchronize", ctypes.c_void_p(event), what="waiting for the engine")

    def destroy_event(self, event: int) -> None:
        """Give an event of :meth:`create_event` back."""
        self._call("cudaEventDestroy", ctypes.c_void_p(event), what="destroying an event")

    def synchronize(self, stream: int) -> None:
        """Wait until ``stream`` has done its work."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream), what="waiting for the engine")

    def destroy_stream(self, stream: int) -> None:
        """Give a stream of :meth:`create_stream` back."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream), what="destroying a stream")


def _find() -> Any:
    try:
        from polygraphy.cuda import wrapper  # type: ignore[import-untyped]
    except ImportError as error:
        raise QATError("running an engine needs polygraphy: install it with `pip install polygraphy`") from error
    try:
        return wrapper().handle
    except OSError as error:
        raise QATError(f"the CUDA runtime library (libcudart) was not found: {error}. Add it to LD_LIBRARY_PATH") from error


class Handle:
    """Something of CUDA's that is given back once: on :meth:`close`, or when nobody holds this object any more."""

    def __init__(self, address: int, give_back: Callable[[int], None]) -> None:
        self.address = address
        self._finalizer = weakref.finalize(self, give_back, address)
        # At exit the driver frees everything, and may already be gone.
        self._finalizer.atexit = False

    def close(self) -> None:
        """Give it back."""
        self._finalizer()


class Buffer:
    """GPU memory that grows when more is asked for and is used again otherwise."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._memory: Handle | None = None
        self._size = 0

    @property
    def address(self) -> int:
        """Where it lies; 0 if there is none."""
        return self._memory.address if self._memory is not None else 0

    def reserve(self, size: int) -> int:
        """Address of at least ``size`` bytes; what was there before may be gone."""
        # TensorRT wants an address even for an empty tensor.
        size = max(size, 1)
        if size > self._size:
            self.close()
            self._memory = Handle(self._cuda.allocate(size), self._cuda.release)
            self._size = size
        return self.address

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self._memory.close()
        self._memory, self._size = None, 0


def local_target() -> str | None:
    """The GPU that is there as TensorRT-RTX names it, such as ``SM86``; ``None`` if none can be used."""
    try:
        cuda = Cuda()
        return "SM{}{}".format(*cuda.capability()) if cuda.devices() else None
    except QATError:  # no CUDA runtime, or no polygraphy to load it
        return None


def has_gpu() -> bool:
    """Whether an engine can run here: a CUDA runtime, a driver and a device are there."""
    try:
        return Cuda().devices() > 0
    except QATError:  # no CUDA runtime, or no polygraphy to load it
        return False
