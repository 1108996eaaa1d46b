"""Which expressions of which modules are residual Adds or functional poolings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..nn.add import Add
from .flow import Flow
from .placement import Left
from .run import Operand, Run
from .source import ADD_FORMS, Key
from .trace import Trace, is_activation, located_add, located_pool

IN_PLACE = ("+=", "add_", "*=", "mul_")
ITERATES = (
    "its forward goes through its children, so none can be added for an addition or pooling in it: hold the layers in "
    "an attribute, the addition in another (qat.nn.Add())"
)
_REMEDY = "if it is a residual addition, make it a module: qat.nn.Add()"


@dataclass(frozen=True)
class Located:
    """An expression, or a ``qat.nn.Add`` module, that gets sites.

    Attributes:
        path: Module whose forward holds it, or the ``Add`` module.
        key: The expression; ``None`` for an ``Add`` module.
        operands: One tuple of graph nodes for each place where a trace meets it.
        trace: Where those nodes live.
        fusable: For an addition: which operand a layer feeds directly.
    """

    path: str
    key: Key | None
    operands: tuple[tuple[fx.Node, ...], ...]
    trace: Trace | None
    fusable: int | None = None


def find_adds(flow: Flow, quantized: set[str], run: Run | None = None) -> tuple[list[Located], list[Left]]:
    """All residual Adds: of two activations of different origin, of which at least one comes from a quantized layer.

    Args:
        flow: The model's dataflow.
        quantized: Paths of the layers that get sites.
        run: What a run on example inputs showed of the forwards that cannot be traced.

    Returns:
        The Adds, and what could not be located or rewritten.
    """
    found: list[Located] = []
    left: list[Left] = []
    for trace in flow.traces.values():
        keys = [key for key in trace.source.keys if key.form in ADD_FORMS]
        if "forward" in trace.module.__dict__:
            left += [Left(trace.path, "forward", f"its forward is set on the instance: not rewritten; {_REMEDY}")]
            continue
        left += [Left(trace.path, name, f"{why}: not searched; {_REMEDY}") for name, why in trace.source.unread.items()]
        if not trace.graphs and not flow.holds_weights(trace.path):
            continue  # anchors, image transforms: no layer in it could feed an Add
        if keys and not trace.graphs and run is not None:
            observed = list(_observed(trace, keys, quantized, run))
            for item in observed:
                if item.key is not None and item.key.form not in IN_PLACE:
                    found.append(item)
                else:
                    why = f"it is in place, in a forward that cannot be traced ({trace.failure}): not rewritten; {_REMEDY}"
                    left.append(_left_addition(trace.path, item.key, why))
            continue
        if keys and not trace.graphs:
            why = f"its forward cannot be traced ({trace.failure}): pass example_inputs=; {_REMEDY}"
            left += [_left_addition(trace.path, key, why) for key in keys]
            continue
        for key in keys:
            nodes = [n for graph in trace.graphs for n in graph.nodes if n.target is located_add and n.args[0] == key]
            residual = [n for n in nodes if _is_residual(flow, trace, n, quantized)]
            if not residual:
                continue
            if key.form in IN_PLACE and any(read_later(n) for n in residual):
                why = f"it changes a tensor in place that is read again later: not rewritten; {_REMEDY}"
                left.append(_left_addition(trace.path, key, why))
                continue
            operands = tuple(tuple(n.args[1:]) for n in residual)
            found.append(Located(trace.path, key, operands, trace, fusable_input(flow, trace, *operands[0])))
    for located in _add_modules(flow):
        idle = flow.unreached(located.path)
        if idle:
            left.append(Left(located.path, "addition", idle))
        else:
            found.append(located)
    return found, left


def _left_addition(path: str, key: Key | None, why: str) -> Left:
    """Tell one addition, and which expression of its method it is, in source order."""
    where = "" if key is None else f"expression {key.index + 1} of {key.method}: "
    return Left(path, "addition", f"{where}{why}")


def _observed(trace: Trace, keys: list[Key], quantized: set[str], run: Run) -> Iterator[Located]:
    """The residual Adds of an untraceable forward, from what ran."""
    for key in keys:
        calls = [(a, b) for a, b in run.adds.get((trace.path, key), ()) if _ran_residual(a, b, quantized)]
        if calls:
            fusable = {next((i for i, operand in enumerate(pair) if operand.direct), None) for pair in calls}
            yield Located(trace.path, key, (), None, fusable.pop() if len(fusable) == 1 else None)


def _ran_residual(a: Operand, b: Operand, quantized: set[str]) -> bool:
    if not (a.ancestors and b.ancestors) or not (a.layers | b.layers) & quantized or a.layers == b.layers:
        return False
    return bool(a.layers and b.layers) or bool(a.ancestors & b.ancestors)


def _add_modules(flow: Flow) -> Iterator[Located]:
    for path, module in flow.model.named_modules():
        if type(module) is Add:
            calls = [(t, n) for t, n in flow.callers(path) if len(n.args) == 2 and all(map(is_activation, n.args))]
            trace = calls[0][0] if calls else None
            operands = tuple(tuple(n.args) for t, n in calls if t is trace)
            fusable = fusable_input(flow, trace, *operands[0]) if trace else None  # type: ignore[arg-type]
            yield Located(path, None, operands, trace, fusable)  # type: ignore[arg-type]


def find_pools(flow: Flow) -> list[Located]:
    """All functional average poolings of activations."""
    found = []
    for trace in flow.traces.values():
        if flow.unreached(trace.path) or "forward" in trace.module.__dict__:
            continue
        for key in (key for key in trace.source.keys if key.form == "pool"):
            nodes = [n for graph in trace.graphs for n in graph.nodes if n.target is located_pool and n.args[0] == key]
            operands = tuple(tuple(n.args[1:]) for n in nodes if is_activation(n.args[1]))
            if operands:
                found.append(Located(trace.path, key, operands, trace))
    return found


def _is_residual(flow: Flow, trace: Trace, node: fx.Node, quantized: set[str]) -> bool:
    _, a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and is_activation(a) and is_activation(b)):
        return False
    if flow.unreached(trace.path):
        return False
    first, second = flow.resolve(trace, a), flow.resolve(trace, b)
    if not (first.layers | second.layers) & quantized or first == second:
        return False  # nothing quantized feeds it, or a function of one tensor: x + x ** 3
    # A mask or another input of its own that no layer feeds is no branch of a residual.
    return bool(first.layers and second.layers) or bool(_ancestors(a) & _ancestors(b))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at not in found and is_activation(at):
            found.add(at)
            stack += at.all_input_nodes
    return found


def read_later(node: fx.Node) -> bool:
    """Whether the first operand of a marked expression is read after it."""
    order = {n: position for position, n in enumerate(node.graph.nodes)}
    changed = node.args[1]
    return isinstance(changed, fx.Node) and any(order[user] > order[node] for user in changed.users)


def fusable_input(flow: Flow, trace: Trace, a: fx.Node, b: fx.Node) -> int | None:
    """Which operand TensorRT can fuse with the addition: the one that a layer feeds; of two, the longer branch."""
    fed = [flow.fed_by_layer(trace, a), flow.fed_by_layer(trace, b)]
    if all(fed):
        return 0 if flow.depth(trace, a) > flow.depth(trace, b) else 1
    return fed.index(True) if any(fed) else None
