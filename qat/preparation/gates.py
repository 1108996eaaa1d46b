"""Which products gate a tensor by a function of its own average, as squeeze-and-excitation does (Hu et al. 2018).

Left in float, such a product makes whatever computes the tensor write float, and what reads the product convert it. With
both of its inputs quantized, the convolutions before and behind it keep to INT8 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..nn.pool import AVERAGE_POOLS
from .adds import IN_PLACE, Located, read_later
from .flow import Flow, output_of
from .placement import Left
from .source import MUL_FORMS, Key
from .trace import Trace, data_inputs, is_activation, located_mul, located_pool

_SPATIAL = ({2, 3}, {-2, -1}, {2, 3, 4}, {-3, -2, -1})


@dataclass
class Gates:
    """What :func:`find_gates` found.

    Attributes:
        products: The products.
        means: Averages by ``mean`` that the gates are computed from.
        left: Products that cannot be rewritten.
    """

    products: list[Located] = field(default_factory=list)
    means: list[Located] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


@dataclass(frozen=True)
class _Average:
    """A value of a trace that is averaged over its spatial dimensions, and the ``mean`` that does it, if no pooling does."""

    value: fx.Node
    mean: tuple[str, Key, fx.Node] | None


def find_gates(flow: Flow, quantized: set[str]) -> Gates:
    """All products ``x * gate`` of which quantized layers compute ``x`` and the average of ``x`` goes into the gate.

    Args:
        flow: The model's dataflow. Forwards that could not be traced are passed over.
        quantized: Paths of the layers that get sites.
    """
    gates = Gates()
    means: dict[tuple[str, Key], set[fx.Node]] = {}
    for trace in flow.traces.values():
        if "forward" in trace.module.__dict__ or flow.unreached(trace.path):
            continue
        for key in (key for key in trace.source.keys if key.form in MUL_FORMS):
            nodes = [n for graph in trace.graphs for n in graph.nodes if n.target is located_mul and n.args[0] == key]
            found = {node: averages for node in nodes if (averages := _gated(flow, trace, node, quantized))}
            if not found:
                continue
            if key.form in IN_PLACE and any(read_later(node) for node in found):
                why = "it changes a tensor in place that is read again later: not rewritten; multiply out of place"
                gates.left.append(Left(trace.path, "gate in place", why))
                continue
            gates.products.append(Located(trace.path, key, tuple(tuple(node.args[1:]) for node in found), trace))
            for average in (average for averages in found.values() for average in averages):
                if average.mean is not None:
                    path, mean, value = average.mean
                    means.setdefault((path, mean), set()).add(value)
    for (path, key), values in means.items():
        gates.means.append(Located(path, key, tuple((value,) for value in values), flow.traces[path]))
    return gates


def _gated(flow: Flow, trace: Trace, node: fx.Node, quantized: set[str]) -> list[_Average]:
    """The averages of one operand that the other operand is computed from."""
    _, *operands = node.args
    values = [x for x in operands if isinstance(x, fx.Node) and is_activation(x)]
    if len(values) < 2:
        return []
    for x, gate in (values, values[::-1]):
        found = [average for average in _averages(flow, trace, gate) if average.value is x]
        if found and flow.resolve(trace, x).layers & quantized:
            return found
    return []


def _averages(flow: Flow, trace: Trace, node: Any) -> Iterator[_Average]:
    """What is averaged on the way to ``node``, in this module or in those that it calls."""
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        before = [x for x in data_inputs(at) if x not in seen]
        stack += before
        seen.update(before)
        if at.op == "call_module":
            inner = flow.traces.get(flow.path_of(trace, at))
            if isinstance(trace.child(at), AVERAGE_POOLS):
                yield from (_Average(x, None) for x in data_inputs(at))
            elif inner is not None and inner.graphs:
                arguments = flow.arguments(trace, at)
                for average in _averages(flow, inner, output_of(inner.graphs[0])):
                    if average.value.op == "placeholder":
                        for x in arguments.get(str(average.value.target), ()):
                            yield _Average(x, average.mean)
        elif at.target is located_pool and at.args[0].form == "pool":
            yield _Average(at.args[1], None)
        elif _is_spatial_mean(at):
            marker = at.all_input_nodes[0]
            yield _Average(marker.args[1], (trace.path, marker.args[0], marker.args[1]))


def _is_spatial_mean(node: fx.Node) -> bool:
    """Whether ``node`` averages a value that the trace has marked over all of its spatial dimensions."""
    if not (node.op == "call_method" and node.target == "mean") and node.target is not torch.mean:
        return False
    inputs = node.all_input_nodes
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if len(inputs) != 1 or inputs[0].target is not located_pool or not isinstance(dims, tuple | list):
        return False
    return set(dims) in _SPATIAL
