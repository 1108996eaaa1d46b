"""PyTorch modules as targets: on the CPU, on a GPU's current stream, or as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import QATError
from ..support.inputs import call, tensors
from .capture import CudaGraph, cuda_graph
from .target import Target, batch_of


class TorchEvent:
    """A CUDA timing event on a fixed stream."""

    def __init__(self, stream: torch.cuda.Stream, spin_wait: bool) -> None:
        self._stream = stream
        self._event = torch.cuda.Event(enable_timing=True, blocking=not spin_wait)

    def record(self) -> None:
        """Put the event behind the work enqueued so far."""
        self._event.record(self._stream)

    def synchronize(self) -> None:
        """Wait until the GPU has reached the event."""
        self._event.synchronize()

    def since(self, earlier: TorchEvent) -> float:
        """Milliseconds from ``earlier`` to this event; both must have been reached."""
        return earlier._event.elapsed_time(self._event)


class TorchStream:
    """A stream of PyTorch's as :class:`qat.bench.cuda.Stream`."""

    def __init__(self, stream: torch.cuda.Stream, spin_wait: bool) -> None:
        self._stream = stream
        self._spin_wait = spin_wait
        uuid = str(torch.cuda.get_device_properties(stream.device).uuid)
        self.device = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"

    def event(self) -> TorchEvent:
        """A new event of this stream."""
        return TorchEvent(self._stream, self._spin_wait)

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self._stream.synchronize()

    def close(self) -> None:
        """The stream is PyTorch's own, there is nothing to give back."""


def open_module(
    module: nn.Module,
    inputs: Any,
    batch: int | None,
    copies: bool,
    graph: bool,
    spin_wait: bool,
    stack: contextlib.ExitStack,
) -> Target:
    """The adapter of a module; gradients are off until ``stack`` is left.

    A :class:`qat.bench.CudaGraph` is measured as it is called, with the copies into and out of its static buffers;
    ``graph=True`` measures the replay alone.

    Raises:
        QATError: If there are no inputs, or module and inputs are on several devices, or memory does not suffice.
    """
    if inputs is None:
        if not isinstance(module, CudaGraph):
            raise QATError("inputs: a PyTorch module needs an example to run with, such as a batch of images")
        inputs = module.example
    device = _device(module, inputs, move=copies)
    notes = ("the module is in training mode: call model.eval() first",) if module.training else ()
    name = f"CUDA graph of {type(module.module).__name__}" if isinstance(module, CudaGraph) else type(module).__name__
    versions = {"torch": str(torch.__version__)}
    if device.type != "cuda":
        stack.enter_context(torch.inference_mode())
        return Target(
            f"PyTorch {name}",
            lambda: call(module, inputs),
            batch=batch_of(tensors(inputs), batch),
            device=f"{device.type}, {torch.get_num_threads()} threads",
            versions=versions,
            notes=notes,
        )
    stack.enter_context(torch.cuda.device(device))
    versions["cuda"] = str(torch.version.cuda or torch.version.hip)
    stream = TorchStream(torch.cuda.current_stream(device), spin_wait)
    hosts = [value.detach().cpu().pin_memory() for value in tensors(inputs)] if copies else []
    # With copies the run reads buffers of its own, so that the caller's tensors are not written to.
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(device, copy=copies), inputs)
    replay: CudaGraph | None = None
    if graph:
        if isinstance(module, CudaGraph):
            raise QATError("cuda_graph=True: the target is a CUDA graph already")
        replay = cuda_graph(module, inputs, clone_outputs=False)
        targets = tensors(replay.example)
    else:
        targets = tensors(inputs)
    stack.enter_context(torch.inference_mode())
    run: Callable[[], Any] = (lambda: call(module, inputs)) if replay is None else replay.replay
    results = tensors(_first_run(run, batch_of(tensors(inputs), batch)))
    target = Target(
        f"PyTorch {'CUDA graph of ' if graph else ''}{name}",
        run,
        batch=batch_of(tensors(inputs), batch),
        stream=stream,
        device=torch.cuda.get_device_name(device),
        cuda_graph=graph or isinstance(module, CudaGraph),
        versions=versions,
        notes=notes,
    )
    if copies:
        _add_copies(target, run, hosts, targets, results)
    return target


def _add_copies(
    target: Target, run: Callable[[], Any], hosts: list[torch.Tensor], inputs: list[torch.Tensor], results: list[torch.Tensor]
) -> None:
    """Make each run of ``target`` begin and end in pinned host memory."""
    latest: list[Any] = [None]
    received = [torch.empty_like(result, device="cpu", pin_memory=True) for result in results if result.is_cuda]

    def enqueue() -> None:
        latest[0] = run()

    def copy_in() -> None:
        for value, host in zip(inputs, hosts, strict=True):
            value.copy_(host, non_blocking=True)

    def copy_out() -> None:
        outputs = (value for value in tensors(latest[0]) if value.is_cuda)
        for host, value in zip(received, outputs, strict=True):
            host.copy_(value, non_blocking=True)

    target.enqueue, target.copy_in, target.copy_out = enqueue, copy_in, copy_out


def _device(module: nn.Module, inputs: Any, *, move: bool) -> torch.device:
    """The one device of a module and its inputs; with ``move`` the inputs may be elsewhere."""
    weights = {value.device for value in (*module.parameters(), *module.buffers())}
    given = {value.device for value in tensors(inputs)}
    devices = weights if move and weights else weights | given
    if not devices:
        return torch.device("cpu")
    if len(devices) > 1:
        raise QATError(
            f"module on {', '.join(sorted(map(str, weights)))}, inputs on {', '.join(sorted(map(str, given)))}: "
            "move them to one device"
        )
    return devices.pop()


def _first_run(run: Callable[[], Any], batch: int | None) -> Any:
    try:
        return run()
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    # Here, not above: the exception keeps the frames, and so the tensors, of the failed run alive.
    torch.cuda.empty_cache()
    raise QATError(f"{'' if batch is None else f'batch {batch}: '}GPU memory does not suffice ({reason})")
