"""What ``placement="fast"`` leaves in float: sites that made engines slower, by the measurements in benchmarks/RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx, nn

from .adds import Located
from .flow import Flow, output_of
from .trace import Trace, data_inputs, is_constant, located_add

PATCHES = (
    "cuts an image into patches: INT8 kernels pad its few channels to 32, which takes longer than half precision "
    "(placement='fast')"
)
UNREAD = "no quantized layer reads an operand or the sum, so that its Q/DQ would only add work (placement='fast')"
# An image has at most so many channels.
_IMAGE_CHANNELS = 4

Value = tuple[str, fx.Node]


def cuts_patches(module: nn.Module) -> bool:
    """Whether ``module`` is the convolution of a patch embedding: windows of an image that do not overlap."""
    if not isinstance(module, nn.Conv2d) or module.in_channels > _IMAGE_CHANNELS:
        return False
    return module.kernel_size == module.stride and min(module.kernel_size) > 1


def read_values(flow: Flow, layers: Iterable[str], pools: Iterable[Located]) -> set[Value]:
    """Values that a quantized layer or pooling reads, directly or through activations and the like.

    Args:
        flow: The model's dataflow.
        layers: Paths of the modules whose inputs are quantized.
        pools: Functional poolings whose inputs are.

    Returns:
        Path of the module and node of its graph, for each value.
    """
    stack = [(trace, x) for path in layers for trace, node in flow.callers(path) for x in data_inputs(node)]
    stack += [(item.trace, x) for item in pools if item.trace is not None for nodes in item.operands for x in nodes]
    seen: set[Value] = set()
    while stack:
        trace, node = stack.pop()
        if (trace.path, node) not in seen:
            seen.add((trace.path, node))
            stack += _before(flow, trace, node)
    return seen


def is_read(flow: Flow, located: Located, values: set[Value]) -> bool:
    """Whether an operand of an addition or its sum is among ``values``; of one that could not be traced, True."""
    if located.trace is None:
        return True
    path = located.trace.path
    if any((path, x) in values for nodes in located.operands for x in nodes):
        return True
    return any((trace.path, node) in values for trace, node in _sums(flow, located))


def _sums(flow: Flow, located: Located) -> Iterator[tuple[Trace, fx.Node]]:
    if located.key is None:
        yield from flow.callers(located.path)
        return
    assert located.trace is not None
    for graph in located.trace.graphs:
        for node in graph.nodes:
            if node.target is located_add and node.args[0] == located.key:
                yield located.trace, node


def _before(flow: Flow, trace: Trace, node: fx.Node) -> Iterator[tuple[Trace, fx.Node]]:
    """What ``node`` is computed from by at most one function of one value: no layer, addition or normalization."""
    if node.op == "placeholder":
        for caller, call in flow.callers(trace.path):
            for x in flow.arguments(caller, call).get(str(node.target), ()):
                yield caller, x
    elif node.op == "call_module":
        path = flow.path_of(trace, node)
        inner = flow.traces.get(path)
        if inner is not None and inner.graphs:
            for graph in inner.graphs:
                for x in data_inputs(output_of(graph)):
                    yield inner, x
        elif path not in flow.weighted and not _normalizes(type(trace.child(node)).__name__):
            yield from _only_input(trace, node)
    elif node.target is not located_add and not _normalizes(str(getattr(node.target, "__name__", node.target))):
        yield from _only_input(trace, node)


def _only_input(trace: Trace, node: fx.Node) -> Iterator[tuple[Trace, fx.Node]]:
    inputs = [x for x in data_inputs(node) if not is_constant(x)]
    if len(inputs) == 1:
        yield trace, inputs[0]


def _normalizes(name: str) -> bool:
    """Whether a class or function computes with statistics of its input; batch normalization does not in an engine."""
    name = name.lower()
    return "softmax" in name or ("norm" in name and "batch" not in name)
