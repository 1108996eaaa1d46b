"""Questions about the dataflow of a whole model, answered from the traces of its modules.

A *weighted* module is a convolution, linear layer or attention: what has weights to quantize. Everything else is looked
through: containers by their own trace, other leaves as functions of their inputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import QATError
from ..nn.add import Add
from ..nn.layers import WEIGHTED_FUNCTIONS, is_quantizable
from ..nn.pool import AVERAGE_POOLS
from .source import ADD_FORMS, read_class
from .trace import TRACE_ERRORS, Trace, copy_alone, data_inputs, is_constant, located_add, located_mul, trace_module


class Untraceable(QATError):
    """A module whose dataflow is needed and cannot be traced."""


def is_weighted(module: nn.Module) -> bool:
    """Whether ``module`` has weights to quantize."""
    return is_quantizable(module) or isinstance(module, nn.MultiheadAttention)


@dataclass
class Origin:
    """Where a value comes from, looking through everything that is not weighted.

    Attributes:
        layers: Paths of the nearest weighted modules.
        inputs: Names of the module inputs it reaches without meeting one.
    """

    layers: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)

    def add(self, other: Origin) -> None:
        """Unite in place."""
        self.layers |= other.layers
        self.inputs |= other.inputs


class Flow:
    """Traces of all modules of ``model`` that are no leaves, and what follows from them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        weighted = {path for path, module in model.named_modules() if is_weighted(module)}
        # The output projection inside attention belongs to the attention.
        self.weighted = {path for path in weighted if not weighted.intersection(_above(path))}
        self._holders = _holders(self.weighted)
        pools = {path for path, module in model.named_modules() if isinstance(module, (*AVERAGE_POOLS, Add))}
        self._traced = self._holders | _holders(pools)
        self.traces: dict[str, Trace] = {}
        for path, module in model.named_modules():
            if self._is_worth_tracing(path, module):
                self.traces[path] = trace_module(path, module)
        self._callers: dict[str, list[tuple[Trace, fx.Node]]] = {}
        for trace in self.traces.values():
            for graph in trace.graphs:
                for node in graph.nodes:
                    if node.op == "call_module":
                        self._callers.setdefault(self.path_of(trace, node), []).append((trace, node))
        self._reached = self._find_reached()
        self._outputs: dict[str, Origin] = {}
        self._identity: dict[int, bool] = {}

    def _is_worth_tracing(self, path: str, module: nn.Module) -> bool:
        # A module without its own forward (ModuleList, ModuleDict) is never called.
        if path in self.weighted or not has_forward(module) or any(top in self.weighted for top in _above(path)):
            return False
        if type(module) is Add or (isinstance(module, AVERAGE_POOLS) and path not in self._holders):
            return False  # a site itself, whatever its forward calls
        if path in self._traced:
            return True
        # PyTorch's own leaves add and pool nothing; a user's may.
        if type(module).__module__.startswith("torch."):
            return False
        return any(key.form in (*ADD_FORMS, "pool") for key in read_class(type(module)).keys)

    @property
    def is_traced(self) -> bool:
        """Whether every forward that matters could be traced in evaluation mode."""
        return all(trace.evaluated for trace in self.traces.values() if self.holds_weights(trace.path))

    def holds_weights(self, path: str) -> bool:
        """Whether there is a weighted module below ``path``."""
        return path in self._holders

    def path_of(self, trace: Trace, node: fx.Node) -> str:
        """Path in the model of the module that ``node`` calls."""
        return self.paths[id(trace.child(node))]

    # Where values come from.

    def origin(self, trace: Trace, node: fx.Node) -> Origin:
        """The origin of ``node`` within ``trace``.

        Raises:
            Untraceable: When it passes through a module that could not be traced.
        """
        return self._origin(trace, node, {})

    def _origin(self, trace: Trace, node: fx.Node, seen: dict[fx.Node, Origin]) -> Origin:
        if node in seen:
            return seen[node]
        result = seen[node] = Origin()
        if node.op == "placeholder":
            result.inputs.add(str(node.target))
        elif node.op == "call_module" and self.path_of(trace, node) in self.weighted:
            result.layers.add(self.path_of(trace, node))
        elif node.op == "call_module" and self.path_of(trace, node) in self._holders:
            inner = self.outputs(self.path_of(trace, node))
            result.layers |= inner.layers
            arguments = self.arguments(trace, node)
            for name in inner.inputs:
                for x in arguments.get(name, ()):
                    result.add(self._origin(trace, x, seen))
        elif used := self._weights_read(trace, node):
            result.layers |= used
        elif not (node.op == "call_function" and node.target in WEIGHTED_FUNCTIONS):
            for x in data_inputs(node):
                result.add(self._origin(trace, x, seen))
        return result

    def _weights_read(self, trace: Trace, node: fx.Node) -> set[str]:
        """Weighted modules whose parameters a function call reads: it computes what they would."""
        if node.op != "call_function":
            return set()
        names = [str(x.target).rpartition(".")[0] for x in node.all_input_nodes if x.op == "get_attr"]
        return {path for name in names if (path := self.paths[id(trace.module.get_submodule(name))]) in self.weighted}

    def outputs(self, path: str) -> Origin:
        """The origin of what the module at ``path`` returns, in evaluation and training together."""
        if path in self.weighted:
            return Origin(layers={path})
        if path not in self._outputs:
            trace = self.traces.get(path)
            if trace is None or not trace.evaluated:
                reason = trace.failure if trace else "it has no forward"
                raise Untraceable(f"{path or 'the model'}: its forward cannot be traced ({reason})")
            result = self._outputs[path] = Origin()
            for graph in trace.graphs:
                result.add(self.origin(trace, output_of(graph)))
        return self._outputs[path]

    def resolve(self, trace: Trace, node: fx.Node) -> Origin:
        """The origin of ``node`` in the whole model, up to the model's own inputs.

        Module inputs are followed into the callers. What cannot be traced is left out.
        """
        result = Origin()
        stack = [(trace, node)]
        seen = {(trace.path, node)}
        while stack:
            at, value = stack.pop()
            try:
                origin = self.origin(at, value)
            except Untraceable:
                continue
            result.layers |= origin.layers
            if not at.path:
                result.inputs |= origin.inputs
            for caller, call in self._callers.get(at.path, ()):
                arguments = self.arguments(caller, call)
                for x in (x for name in origin.inputs for x in arguments.get(name, ())):
                    if (caller.path, x) not in seen:
                        seen.add((caller.path, x))
                        stack.append((caller, x))
        return result

    def callers(self, path: str) -> list[tuple[Trace, fx.Node]]:
        """Where traced forwards call the module at ``path``."""
        return self._callers.get(path, [])

    def arguments(self, trace: Trace, node: fx.Node) -> dict[str, list[fx.Node]]:
        """The values that a call passes, by the parameter names of the called module's forward."""
        signature = inspect.signature(type(trace.child(node)).forward)
        try:
            bound = signature.bind(None, *node.args, **node.kwargs).arguments
        except TypeError:
            return {}
        named: dict[str, list[fx.Node]] = {}
        for name, value in bound.items():
            parameter = signature.parameters[name]
            prefix = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else prefix
            nodes: list[fx.Node] = []
            fx.node.map_arg(value, nodes.append)
            named[prefix + name] = nodes
        return named

    # Which modules run.

    def unreached(self, path: str) -> str | None:
        """Why the module at ``path`` is not called in evaluation; ``None`` if it is, or may be."""
        if not path:
            return None  # the model itself
        owners = [trace for trace in self.traces.values() if _below(path, trace.path)]
        if path in self.weighted and path not in self._callers:
            for trace in owners:
                relative = path[len(trace.path) + 1 :] if trace.path else path
                if any(_reads_parameter(graph, relative) for graph in trace.graphs):
                    return f"its weight is used by a function call in the forward of {trace.path or 'the model'}"
        if not all(trace.evaluated for trace in owners):
            return None
        for step in (path, *_above(path)):
            if has_forward(self.model.get_submodule(step)) and step not in self._reached[0]:
                if step in self._reached[1]:
                    return "it runs in training only, so the exported graph does not contain it"
                return "no forward calls it"
        return None

    def functional_layers(self) -> Iterator[tuple[str, str, str]]:
        """Convolutions and linear products that a forward computes by a function call: path, function, remedy."""
        for trace in self.traces.values():
            calls = {n.target for graph in trace.graphs for n in graph.nodes if n.target in WEIGHTED_FUNCTIONS}
            for function in calls:
                name = f"F.{getattr(function, '__name__', function)}"
                yield trace.path, name, "a function call: missed; use a module (nn.Conv2d, nn.Linear) instead"

    def _find_reached(self) -> tuple[set[str], set[str]]:
        """Paths of the modules that run in evaluation, and in any mode."""
        evaluating: set[str] = set()
        ever: set[str] = set()
        for trace in self.traces.values():
            for position, graph in enumerate(trace.graphs):
                for node in graph.nodes:
                    if node.op == "call_module":
                        path = self.path_of(trace, node)
                        # A forward may call a grandchild directly: what lies between counts as reached.
                        steps = {path, *(step for step in _above(path) if _below(step, trace.path))}
                        ever |= steps
                        if position == 0 and trace.evaluated:
                            evaluating |= steps
        return evaluating, ever

    # What an addition can be fused with.

    def fed_by_layer(self, trace: Trace, node: fx.Node) -> bool:
        """Whether a weighted module feeds ``node``.

        Normalization, dropout, drop-path, layer scale and permutations of dimensions may lie between.
        """
        while True:
            if node.op == "call_module":
                path = self.path_of(trace, node)
                if path in self.weighted:
                    return True
                module = trace.child(node)
                if path in self._holders:
                    inner = self.traces.get(path)
                    if inner is None or not inner.evaluated:
                        return False
                    last = output_of(inner.graphs[0]).args[0]
                    return isinstance(last, fx.Node) and self.fed_by_layer(inner, last)
                if not isinstance(module, _BatchNorm) and not self._is_identity(module) and not _is_layer_scale(module):
                    return False
            elif node.op == "placeholder" or not (_is_scaling(node) or _is_item(node) or _node_keeps_values(node)):
                return False
            inputs = [x for x in data_inputs(node) if not is_constant(x)]
            if len(inputs) != 1:
                return False
            node = inputs[0]

    def depth(self, trace: Trace, node: fx.Node) -> int:
        """The largest number of weighted modules on a path to ``node`` within ``trace``'s module."""
        return self._depth(trace, node, {})

    def _depth(self, trace: Trace, node: fx.Node, seen: dict[fx.Node, int]) -> int:
        if node not in seen:
            own = 0
            if node.op == "call_module":
                path = self.path_of(trace, node)
                inner = self.traces.get(path)
                if path in self.weighted:
                    own = 1
                elif inner is not None and inner.graphs:
                    own = self.depth(inner, output_of(inner.graphs[0]))
            seen[node] = own + max((self._depth(trace, x, seen) for x in data_inputs(node)), default=0)
        return seen[node]

    def _is_identity(self, module: nn.Module) -> bool:
        """Whether a leaf keeps the values of its input in evaluation, as dropout, drop-path and permutations do."""
        if id(module) not in self._identity:
            self._identity[id(module)] = _module_keeps_values(module)
        return self._identity[id(module)]


def _holders(paths: set[str]) -> set[str]:
    return {""} | {top for path in paths for top in _above(path)}


def has_forward(module: nn.Module) -> bool:
    """Whether the class of ``module`` defines a forward."""
    return type(module).forward is not nn.Module.forward


def output_of(graph: fx.Graph) -> fx.Node:
    """The node that returns the module's result."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _below(path: str, top: str) -> bool:
    return (top == "" and path != "") or path.startswith(top + ".")


def _above(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _reads_parameter(graph: fx.Graph, relative: str) -> bool:
    return any(n.op == "get_attr" and str(n.target).startswith(relative + ".") for n in graph.nodes)


def _keeps_values(call: Callable[[torch.Tensor], Any]) -> bool:
    """Whether ``call`` returns its input, at most with its dimensions in another order."""
    for rank in (4, 3, 5, 2):
        # No two dimensions of one size, so that the shape tells their order. Tiny and large values of both signs, so that no
        # activation passes for the identity.
        sizes = range(2, 2 + rank)
        probe = torch.linspace(-9.0, 9.0, math.prod(sizes)).pow(7).reshape(*sizes)
        try:
            with torch.no_grad():
                out = call(probe.clone())  # it may work in place
        except TRACE_ERRORS:
            # A permutation fits one rank only.
            continue
        if not isinstance(out, torch.Tensor) or sorted(out.shape) != list(sizes):
            return False
        return torch.equal(out, probe.permute([sizes.index(size) for size in out.shape]))
    return False


def _module_keeps_values(module: nn.Module) -> bool:
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    twin = copy_alone(module, type(module))
    twin.training = False
    return _keeps_values(lambda probe: type(twin).forward(twin, probe))


def _node_keeps_values(node: fx.Node) -> bool:
    """Whether a call returns its one tensor, as ``F.dropout(x, p, False)`` and ``x.transpose(1, 2)`` do."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1 or node.target is located_add:
        return False

    def call(probe: torch.Tensor) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: probe)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return _keeps_values(call)


def _is_layer_scale(module: nn.Module) -> bool:
    """Whether a leaf multiplies its input by a parameter and does nothing else."""
    if next(module.parameters(recurse=False), None) is None or is_weighted(module) or not has_forward(module):
        return False
    graphs = trace_module("", module).graphs
    if not graphs:
        return False
    last = output_of(graphs[0]).args[0]
    return isinstance(last, fx.Node) and _is_scaling(last) and any(x.op == "placeholder" for x in last.all_input_nodes)


def _is_scaling(node: fx.Node) -> bool:
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    elif node.op == "call_method":
        name = str(node.target)
    else:
        return False
    products = ("mul", "mul_", "multiply", located_mul.__name__)
    return name in products and any(is_constant(x) and not _is_number(x) for x in node.all_input_nodes)


def _is_number(node: fx.Node) -> bool:
    return node.op != "get_attr" and not node.all_input_nodes


def _is_item(node: fx.Node) -> bool:
    """Taking one element of a tuple output, as attention's."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)
