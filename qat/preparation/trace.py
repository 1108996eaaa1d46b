"""The dataflow of each module's own ``forward``, children as leaves.

A trace only *locates* things. The traced graph is never executed: it has baked in flags and attributes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .source import MUL_FORMS, POOL_FORMS, ClassSource, Key, derive_class, plain_operation, read_class

# What a user's forward may raise when its inputs are fx proxies: control flow on values, unpacking, missing attributes.
TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    AttributeError,
    NameError,
    RuntimeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)
_SHAPE_METHODS = {"size", "dim", "numel", "ndimension", "nelement", "stride", "is_floating_point", "type", "element_size"}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}


def located_add(key: Key, a: Any, b: Any) -> Any:
    """Marks an addition in a traced graph."""
    operands = [x for x in (a, b) if isinstance(x, fx.Proxy)]
    if operands:
        return operands[0].tracer.create_proxy("call_function", located_add, (key, a, b), {})
    return plain_operation(key.form)(a, b)


def located_mul(key: Key, a: Any, b: Any) -> Any:
    """Marks a product of two values of a traced graph."""
    if isinstance(a, fx.Proxy) and isinstance(b, fx.Proxy):
        return a.tracer.create_proxy("call_function", located_mul, (key, a, b), {})
    return plain_operation(key.form)(a, b)


def located_pool(key: Key, x: Any) -> Any:
    """Marks the input of a functional pooling in a traced graph."""
    return x.tracer.create_proxy("call_function", located_pool, (key, x), {}) if isinstance(x, fx.Proxy) else x


class _Marker:
    """Descriptor that binds a marker function to its key, as a method would bind ``self``."""

    def __init__(self, key: Key) -> None:
        marker = located_pool if key.form in POOL_FORMS else located_mul if key.form in MUL_FORMS else located_add
        self.bound = functools.partial(marker, key)

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.bound


class _LeafTracer(fx.Tracer):
    """Children are leaves; parameters and buffers become nodes."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        # Keys are plain constants of the markers, whatever tuple type they derive from.
        return a if isinstance(a, Key) else super().create_arg(a)


@dataclass
class Trace:
    """What tracing one module gave.

    Attributes:
        path: Of the module.
        module: The module itself, untouched.
        source: Its rewritable expressions.
        graphs: In evaluation mode, then in training mode; those that could be traced.
        evaluated: Whether the evaluation mode could be traced.
        failure: Why tracing failed in evaluation mode, or ``""``.
    """

    path: str
    module: nn.Module
    source: ClassSource
    graphs: list[fx.Graph]
    evaluated: bool
    failure: str

    def child(self, node: fx.Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        return self.module.get_submodule(str(node.target))


def trace_module(path: str, module: nn.Module) -> Trace:
    """Trace ``module``'s own forward, in evaluation and in training mode, on a copy."""
    source = read_class(type(module))
    names = {key: f"_qat_{position}" for position, key in enumerate(source.keys)}
    members: dict[str, Any] = {name: _Marker(key) for key, name in names.items()}
    cls = derive_class(source, names, (), members)
    graphs, failure = [], ""
    for training in (False, True):
        twin = copy_alone(module, cls)
        twin.training = training
        try:
            graphs.append(_LeafTracer().trace(twin, concrete_args=_defaults(cls)))
        except TRACE_ERRORS as error:
            failure = failure or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if not training:
                evaluated = False
        else:
            if not training:
                evaluated = True
    return Trace(path, module, source, graphs, evaluated, failure)


def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    """Optional arguments of ``forward`` keep their default values: their branches depend on them."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def copy_alone(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A copy of ``module`` alone: side effects of tracing stay in its own attributes; tensors and children are shared."""
    twin = cls.__new__(cls)
    memo: dict[int, Any] = {id(module): twin}
    for shared in (*module.parameters(), *module.buffers(), *module.modules()):
        if shared is not module:
            memo[id(shared)] = shared
    twin.__dict__.update({name: _copied(value, memo) for name, value in module.__dict__.items()})
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError, pickle.PicklingError):
        return value  # a lock, a generator, a tensor inside an autograd graph: cannot be copied


def is_shape(node: fx.Node) -> bool:
    """Whether ``node`` computes from shapes and types only, not from values."""
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return True
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in _SHAPE_ATTRIBUTES
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_shape(x) for x in inputs) and not _makes_tensor(node)
    return False


def _makes_tensor(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", None) == torch.__name__ and node.target in (torch.zeros, torch.ones, torch.full)


def is_constant(node: fx.Node) -> bool:
    """Whether ``node`` computes from parameters, buffers and shapes only."""
    if node.op == "get_attr" or is_shape(node):
        return True
    if node.op in ("placeholder", "call_module", "output"):
        return False
    return all(is_constant(x) for x in node.all_input_nodes)


def is_activation(value: Any) -> bool:
    """Whether an operand in a graph is a tensor computed from the module's input."""
    return isinstance(value, fx.Node) and not is_constant(value)


def data_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose values, not only shapes, ``node`` reads."""
    return (x for x in node.all_input_nodes if not is_shape(x))
