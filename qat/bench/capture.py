"""CUDA graphs of PyTorch models: captured once, replayed with one launch.

See the CUDA programming guide, "CUDA graphs", and PyTorch's notes on CUDA semantics: a graph replays the same kernels on the
same memory, so shapes, control flow and addresses are those of the capture.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import QATError
from ..support.inputs import call

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def cuda_graph(
    model: nn.Module,
    example: Any,
    *,
    submodules: Sequence[str] | None = None,
    warm_up: int = 3,
    clone_outputs: bool = True,
) -> Any:
    """Capture a model, or static parts of it, as CUDA graphs; ``model`` itself is not changed.

    Args:
        model: In evaluation mode, on one CUDA device.
        example: Inputs of the shapes to capture, on that device; a tuple holds positional arguments, a dict keyword ones.
        submodules: Paths of submodules to capture one by one, for a model whose remainder is dynamic. Each must be called
            with the same shapes in every call.
        warm_up: Runs before the capture, in which libraries choose their kernels.
        clone_outputs: Return copies. Otherwise the outputs are the graph's own memory, which the next call overwrites.

    Returns:
        A :class:`CudaGraph`; with ``submodules`` a model of the same class that shares all weights and other submodules
        with ``model`` and holds a :class:`CudaGraph` in place of each named submodule.

    Raises:
        QATError: If the model is in training mode, or not on a CUDA device, synchronizes with the host, or a submodule does
            not exist, is not called, or is called with differing shapes.
    """
    if warm_up < 1:
        raise QATError(f"warm_up={warm_up}: at least 1 run must come before the capture")
    _check_evaluation(model, "model")
    if isinstance(submodules, str):
        raise QATError(f"submodules={submodules!r}: pass a list of paths, such as [{submodules!r}]")
    if submodules is None:
        return CudaGraph(model, *arguments(example), name="model", warm_up=warm_up, clone_outputs=clone_outputs)
    if not submodules:
        raise QATError("submodules is empty: name at least one, or leave it out to capture the whole model")
    parts = _find(model, submodules)
    with torch.no_grad():
        calls = _record_calls(parts, lambda: call(model, example))
    graphs: dict[str, nn.Module] = {
        name: CudaGraph(part, *_only_call(name, calls[name]), name=name, warm_up=warm_up, clone_outputs=clone_outputs)
        for name, part in parts.items()
    }
    graphed = _with_replaced(model, graphs)
    with torch.no_grad():
        replayed = _record_calls(graphs, lambda: call(graphed, example))
    if unused := [name for name, seen in replayed.items() if len(seen) != len(calls[name])]:
        raise QATError(f"{unused[0]}: the model does not call it by this path. Capture a module around it")
    return graphed


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call with example inputs (see :func:`qat.support.inputs.call`)."""
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict):
        return (), example
    return (example,), {}


class CudaGraph(nn.Module):
    """A module captured as a CUDA graph; called like the module, with inputs like those of the capture.

    Shares parameters and buffers with the module: changes in place are seen by the graph. It cannot be moved, cast, trained,
    copied or pickled, and must not be called on two streams at a time. Forward hooks of the module ran at the capture only.

    Args:
        module: In evaluation mode, on one CUDA device.
        args: Positional arguments of the capture.
        kwargs: Keyword arguments of the capture.
        name: Of the module, for messages.
        warm_up: Runs before the capture.
        clone_outputs: Return copies, not the graph's own memory.

    Attributes:
        module: The captured module.
    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        name: str = "model",
        warm_up: int = 3,
        clone_outputs: bool = True,
    ) -> None:
        super().__init__()
        _check_evaluation(module, name)
        # Past nn.Module, which would put "module." before all names in the state dict.
        self.__dict__.update(module=module, _parameters=module._parameters, _buffers=module._buffers, _modules=module._modules)
        self.training = False
        self._name = name
        self._clone = clone_outputs
        leaves, self._spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        device = _device(name, module, leaves)
        with torch.no_grad():
            self._leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        static_args, static_kwargs = self._arguments = pytree.tree_unflatten(self._leaves, self._spec)
        # Should the weights be moved, the graph still reads this memory: it must not be freed.
        self._weights = [value.detach() for value in (*module.parameters(), *module.buffers())]
        self._first = next(iter([*module.parameters(), *module.buffers()]), None)
        outputs, self._replay = _record(module, lambda: module(*static_args, **static_kwargs), name, device, warm_up)
        self._outputs, self._output_spec = pytree.tree_flatten(outputs)
        for output in self._outputs:
            if not isinstance(output, (torch.Tensor, *_CONSTANTS)):
                raise QATError(
                    f"{name} returns a {type(output).__name__}, whose tensors can't be found. "
                    "Return tensors in tuples, lists or dicts"
                )

    @property
    def example(self) -> Any:
        """The static inputs, in the form that :func:`cuda_graph` takes an example."""
        args, kwargs = self._arguments
        return kwargs if kwargs and not args else args

    def replay(self) -> Any:
        """Run on the static inputs; returns the graph's own outputs."""
        self._replay()
        return pytree.tree_unflatten(self._outputs, self._output_spec)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._check(leaves, spec)
        with torch.no_grad():
            for static, value in zip(self._leaves, leaves, strict=True):
                if isinstance(static, torch.Tensor) and static is not value:
                    static.copy_(value)
            self._replay()
            results = [o.clone() if self._clone and isinstance(o, torch.Tensor) else o for o in self._outputs]
        return pytree.tree_unflatten(results, self._output_spec)

    def _check(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        if spec != self._spec:
            raise QATError(f"{self._name}: called with other arguments than at the capture. Capture again with these")
        for static, value in zip(self._leaves, leaves, strict=True):
            if (found := describe(value)) != (wanted := describe(static)):
                raise QATError(f"{self._name}: captured for {wanted}, called with {found}. Capture again for these inputs")
            if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise QATError(f"{self._name}: a CUDA graph has no gradient. Call it under torch.no_grad()")
        if self._first is not None and self._first.data_ptr() != self._weights[0].data_ptr():
            raise QATError(f"{self._name}: its weights were moved or cast since the capture. Capture again")

    def train(self, mode: bool = True) -> CudaGraph:
        if mode:
            raise QATError(f"{self._name}: a CUDA graph can't be trained. Train the model and capture it afterwards")
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CudaGraph:
        raise QATError(f"{self._name}: a CUDA graph can't be moved or cast. Do that to the model and capture it again")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QATError(f"{self._name}: a CUDA graph can't be copied or pickled. Copy the model and capture it again")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What a surrounding model reads from its part, such as out_channels.
            if "module" not in self.__dict__:
                raise
            return getattr(self.module, name)


def describe(value: Any) -> str:
    """What of an input a capture fixes: shape, dtype and device of a tensor, the value of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def _check_evaluation(module: nn.Module, name: str) -> None:
    if module.training:
        raise QATError(f"{name} is in training mode, a CUDA graph has no gradient. Call model.eval() first")


def _device(name: str, module: nn.Module, leaves: list[Any]) -> torch.device:
    """The CUDA device of all input tensors and weights."""
    inputs = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    if not inputs:
        raise QATError(f"{name}: the example holds no tensor")
    weights = {value.device for value in (*module.parameters(), *module.buffers())}
    for what, devices in (("inputs", inputs), ("weights", weights)):
        if others := [device for device in devices if device.type != "cuda"]:
            there = "" if torch.cuda.is_available() else " (PyTorch finds none here)"
            raise QATError(f"{name}: {what} on the {others[0]}. CUDA graphs need a CUDA device{there}; move model and example")
    if len(inputs | weights) > 1:
        raise QATError(f"{name}: inputs and weights are on {', '.join(sorted(map(str, inputs | weights)))}. Use one device")
    return inputs.pop()


def _record(
    module: nn.Module, run: Callable[[], Any], name: str, device: torch.device, warm_up: int
) -> tuple[Any, Callable[[], None]]:
    """Capture ``run``; returns its static outputs and the replay."""
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.no_grad(), _uncached_autocast():
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                run()
            # Before the capture, because one that fails leaves PyTorch's allocator and generators in a bad state.
            with _locate(module, name) as where, _synchronisation_refused():
                try:
                    run()
                except RuntimeError as error:
                    raise QATError(_blame(where, error)) from error
        stream.synchronize()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with _locate(module, name) as where:
            try:
                # thread_local: what other threads do meanwhile (data loading, sampling of clocks) is no concern of ours.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
            except RuntimeError as error:
                _recover(device, pool, stream)
                raise QATError(_blame(where, error)) from error
    torch.cuda.current_stream(device).wait_stream(stream)
    return outputs, graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: for each further one cuBLAS would keep another workspace for good."""
    return torch.cuda.Stream(device)


def _blame(where: list[str], error: RuntimeError) -> str:
    return (
        f"{where[-1]}: works on the CPU or waits for the GPU, which a CUDA graph can't contain ({str(error).splitlines()[0]}). "
        "Avoid .item(), .cpu(), .tolist(), nonzero, boolean masks, tensors made on the CPU and synchronize(), or capture the "
        "static parts only: submodules=[...]"
    )


def _recover(device: torch.device, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Bring PyTorch back to order after a capture whose end failed.

    ``CUDAGraph.capture_end`` stops where CUDA reports the broken capture: the caching allocator still takes the pool to be in
    use (emptying the cache would then fail), and the random generators still count for the capture.
    """
    with contextlib.suppress(RuntimeError):  # it had ended after all
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with warnings.catch_warnings():
        # A capture that ends well resets the generators. It is empty, which PyTorch warns about.
        warnings.simplefilter("ignore")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            pass
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Without autocast's cache of cast weights: the graph would keep reading them after they were freed."""
    if not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False):
        yield


@contextlib.contextmanager
def _synchronisation_refused() -> Iterator[None]:
    """Make PyTorch raise where it would wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # "prototype feature": it misses explicit synchronize() calls, which the capture finds.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _locate(module: nn.Module, name: str) -> Iterator[list[str]]:
    """A list whose last entry names the innermost module that is running, or was when an error left it."""
    where = [f"{name} ({type(module).__name__})"]
    with contextlib.ExitStack() as stack:
        for path, child in module.named_modules():
            if child is module:
                continue
            label = f"{path if name == 'model' else f'{name}.{path}'} ({type(child).__name__})"

            def enter(_: nn.Module, __: Any, label: str = label) -> None:
                where.append(label)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                where.pop()

            stack.callback(child.register_forward_pre_hook(enter).remove)
            stack.callback(child.register_forward_hook(leave).remove)
        yield where


def _find(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if not name or name not in known:
            children = ", ".join(child for child, _ in model.named_children())
            raise QATError(f"submodules: the model has no submodule {name!r}. Its children are {children or 'none'}")
        if outer := next((other for other in names if name.startswith(f"{other}.")), None):
            raise QATError(f"submodules: {name!r} lies inside {outer!r}. Name one of them")
    return {name: known[name] for name in names}


def _record_calls(
    parts: Mapping[str, nn.Module], run: Callable[[], Any]
) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments of each call of each part during ``run``."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in parts}
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                calls[name].append((args, kwargs))

            stack.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    return calls


def _only_call(name: str, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that all calls of a submodule have in common as far as a capture fixes them."""
    if not calls:
        raise QATError(f"{name}: the model does not call it with this example. Leave it out of submodules")
    signatures = {(str(pytree.tree_structure(c)), *map(describe, pytree.tree_leaves(c))) for c in calls}
    if len(signatures) > 1:
        raise QATError(f"{name}: the model calls it with {len(signatures)} different shapes, so that it is not static")
    return calls[0]


def _with_replaced(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A module like ``module`` that shares everything with it but the submodules at the given paths."""
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    # Hooks too: one that is added to the clone is not meant for the original.
    clone.__dict__.update(
        {k: v.copy() for k, v in module.__dict__.items() if k.endswith(("_modules", "_hooks")) and v is not None}
    )
    below: dict[str, dict[str, nn.Module]] = {}
    for path, new in replaced.items():
        child, _, rest = path.partition(".")
        below.setdefault(child, {})[rest] = new
    for child, group in below.items():
        clone._modules[child] = group[""] if "" in group else _with_replaced(module.get_submodule(child), group)
    return clone
