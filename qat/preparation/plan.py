"""The placement, decided before anything is changed: which site goes where, and which sites share a quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from ..core.config import QuantConfig, SiteConfig, matches
from ..errors import QATError
from ..nn.add import Add
from ..nn.layers import QUANTIZABLE, is_conv_transposed
from ..nn.pool import AVERAGE_POOLS
from .adds import ITERATES, Located, find_adds, find_pools
from .check import check_layer
from .fast import PATCHES, UNREAD, cuts_patches, is_read, read_values
from .flow import Flow, has_forward
from .gates import find_gates
from .head import find_head
from .placement import Left
from .run import Run, observe
from .trace import Trace

OWN_FORWARD = "its forward is set on the instance, so changing its class has no effect: define it in a class"
Slot = tuple[str, str]  # module path, which input


@dataclass
class PlannedExpression:
    """An addition, product or functional pooling that becomes a submodule ``name`` of the module at ``located.path``."""

    located: Located
    name: str
    inputs: tuple[bool, ...]

    @property
    def path(self) -> str:
        """Path of the submodule."""
        if self.located.key is None:
            return self.located.path
        return f"{self.located.path}.{self.name}" if self.located.path else self.name


@dataclass
class Plan:
    """What ``prepare`` will do.

    Attributes:
        layers: Settings of each weighted module that gets sites, by path.
        pools: Paths of the pooling modules that get a site.
        inputs: Paths of the other modules whose input gets a site.
        adds: Additions.
        gates: Products of a tensor and its gate.
        pool_calls: Functional poolings.
        groups: Representative of the slots that read the same tensor, by slot.
        left: What stays in float.
        head: Paths of the head's layers.
        head_source: How they were found.
    """

    config: QuantConfig
    layers: dict[str, SiteConfig] = field(default_factory=dict)
    pools: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    adds: list[PlannedExpression] = field(default_factory=list)
    gates: list[PlannedExpression] = field(default_factory=list)
    pool_calls: list[PlannedExpression] = field(default_factory=list)
    groups: dict[Slot, Slot] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    head: tuple[str, ...] = ()
    head_source: str = ""

    def places(self) -> dict[tuple[str, Any], str]:
        """Paths of the Adds, gates and poolings with sites, by where they are: unlike their numbers, that does not change."""
        planned = (*self.adds, *self.gates, *self.pool_calls)
        return {(path, None): path for path in self.pools} | {(x.located.path, x.located.key): x.path for x in planned}


def make_plan(model: nn.Module, config: QuantConfig, example_inputs: Any) -> Plan:
    """Decide the placement for ``model``, which stays untouched.

    Raises:
        QATError: When the head cannot be found, a glob matches nothing, or nothing is left to quantize.
    """
    flow = Flow(model)
    plan = Plan(config)
    run = None if example_inputs is None or flow.is_traced else observe(flow, example_inputs)
    _place_head(plan, flow, run)
    _place_layers(plan, flow)
    if config.pool_inputs:
        _place_pools(plan, flow)
    _place_inputs(plan, flow)
    if config.gate_inputs:
        _place_gates(plan, flow)
    if config.add_inputs != "none":
        _place_adds(plan, flow, run)
    if not plan.layers:
        wanted = ", ".join(cls.__name__ for cls in (*QUANTIZABLE, nn.MultiheadAttention))
        why = "".join(f"\n  {item.path}: {item.why}" for item in plan.left)
        raise QATError(f"Nothing to quantize: looked for {wanted}.{why}")
    _check_globs(plan, flow)
    _group(plan, flow)
    return plan


def _place_head(plan: Plan, flow: Flow, run: Run | None) -> None:
    globs = plan.config.head
    if globs is None:
        if flow.weighted:
            head, plan.head_source = find_head(flow, run)
        else:
            head, plan.head_source = set(), "no layers"
    else:
        for glob in globs:
            if not any(matches(glob, path) for path in flow.weighted):
                raise QATError(f"head: {glob!r} matches no convolution, linear or attention layer")
        head = {path for path in flow.weighted if any(matches(glob, path) for glob in globs)}
        plan.head_source = "as configured"
    plan.head = tuple(path for path in flow.paths.values() if path in head)


def _place_layers(plan: Plan, flow: Flow) -> None:
    for path, module in flow.model.named_modules():
        if path not in flow.weighted:
            continue
        site = plan.config.site(path)
        why = None
        if site.quantize is False:
            why = "excluded by a rule"
        elif path in plan.head and site.quantize is None:
            why = "classifier head"
        elif is_conv_transposed(module) and not plan.config.conv_transpose and site.quantize is None:
            why = "transposed convolution: TensorRT runs it in half precision; QuantConfig(conv_transpose=True) to include"
        elif "forward" in module.__dict__:
            why = OWN_FORWARD
        else:
            why = flow.unreached(path)
            if why and why.startswith("its weight is used"):
                why += ": missed; call the module instead"
            if why is None and plan.config.placement == "fast" and cuts_patches(module) and site.quantize is None:
                why = PATCHES
        if why:
            plan.left.append(Left(path, type(module).__name__, why))
        else:
            check_layer(path, module)
            plan.layers[path] = site
    plan.left += [Left(path, name, why) for path, name, why in flow.functional_layers()]


def _place_pools(plan: Plan, flow: Flow) -> None:
    for path, module in flow.model.named_modules():
        if isinstance(module, AVERAGE_POOLS) and path not in flow.traces:
            _place(plan, flow, path, module, plan.pools)
    for located, name in _named(flow, find_pools(flow), "quant_pool"):
        planned = PlannedExpression(located, name, (True,))
        if not _is_left(plan, flow, planned, "pooling"):
            plan.pool_calls.append(planned)


def _place_inputs(plan: Plan, flow: Flow) -> None:
    for glob in plan.config.module_inputs:
        found = {path: module for path, module in flow.model.named_modules() if fnmatchcase(path, glob)}
        fitting = [path for path, module in found.items() if _takes_site(path, module, flow)]
        if not fitting:
            raise QATError(
                f"module_inputs: {glob!r} matches {'no module' if not found else 'only layers, or modules made of others'}; "
                "name modules such as nn.MaxPool2d or nn.Identity"
            )
        for path in (path for path in fitting if path not in (*plan.pools, *plan.inputs)):
            _place(plan, flow, path, found[path], plan.inputs)


def _place(plan: Plan, flow: Flow, path: str, module: nn.Module, placed: list[str]) -> None:
    """Add a module to those that get a site at their input, or say why it is left."""
    why = "excluded by a rule" if plan.config.site(path).quantize is False else flow.unreached(path)
    why = why or (OWN_FORWARD if "forward" in module.__dict__ else None)
    if why:
        plan.left.append(Left(path, type(module).__name__, why))
    else:
        placed.append(path)


def _takes_site(path: str, module: nn.Module, flow: Flow) -> bool:
    """Whether a site at its input is all that can be asked of a module: layers have theirs, and an Add two inputs."""
    placed_otherwise = path in flow.weighted or path in flow.traces or isinstance(module, Add)
    return path != "" and not placed_otherwise and has_forward(module) and not module._modules


def _place_gates(plan: Plan, flow: Flow) -> None:
    gates = find_gates(flow, set(plan.layers))
    plan.left += gates.left
    for located, name in _named(flow, gates.products, "quant_mul"):
        planned = PlannedExpression(located, name, (True, True))
        if not _is_left(plan, flow, planned, "gate"):
            plan.gates.append(planned)
    for located, name in _named(flow, gates.means if plan.config.pool_inputs else [], "quant_mean"):
        planned = PlannedExpression(located, name, (True,))
        if not _is_left(plan, flow, planned, "mean"):
            plan.pool_calls.append(planned)


def _place_adds(plan: Plan, flow: Flow, run: Run | None) -> None:
    found, left = find_adds(flow, set(plan.layers), run)
    plan.left += left
    values = None
    if plan.config.placement == "fast":
        values = read_values(flow, (*plan.layers, *plan.pools), [item.located for item in (*plan.pool_calls, *plan.gates)])
    for located, name in _named(flow, found, "quant_add"):
        inputs = (True, True)
        if plan.config.add_inputs == "residual" and located.fusable is not None:
            inputs = (located.fusable != 0, located.fusable != 1)
        planned = PlannedExpression(located, name, inputs)
        if _is_left(plan, flow, planned, "addition"):
            continue
        if values is not None and plan.config.site(planned.path).quantize is None and not is_read(flow, located, values):
            plan.left.append(Left(planned.path, "addition", UNREAD))
        else:
            plan.adds.append(planned)


def _is_left(plan: Plan, flow: Flow, planned: PlannedExpression, what: str) -> bool:
    why = None
    if plan.config.site(planned.path).quantize is False:
        why = "excluded by a rule"
    elif planned.located.key is not None and flow.traces[planned.located.path].source.iterates:
        why = ITERATES
    if why:
        plan.left.append(Left(planned.path, what, why))
    return why is not None


def _named(flow: Flow, found: list[Located], stem: str) -> Iterator[tuple[Located, str]]:
    """Number the expressions of each module; a name that the module already uses is passed over."""
    counts: dict[str, int] = {}
    for located in found:
        module = flow.model.get_submodule(located.path)
        count = counts.get(located.path, 0)
        while hasattr(module, f"{stem}{count}"):
            count += 1
        counts[located.path] = count + 1
        yield located, f"{stem}{count}"


def _check_globs(plan: Plan, flow: Flow) -> None:
    paths = [*flow.weighted, *plan.pools, *plan.inputs, *(item.path for item in (*plan.adds, *plan.gates, *plan.pool_calls))]
    paths += [item.path for item in plan.left]
    for rule in plan.config.rules:
        if not any(matches(rule.match, path) for path in paths):
            raise QATError(f"rules: {rule.match!r} matches no layer, Add, gate or pooling of this model")


def _group(plan: Plan, flow: Flow) -> None:
    """Unite the slots that read the same tensor and have the same settings."""
    parent: dict[Slot, Slot] = {slot: slot for slot in slots(plan, flow.model)}

    def top(slot: Slot) -> Slot:
        while parent[slot] != slot:
            slot = parent[slot]
        return slot

    readers = _Readers(plan, flow)
    for trace in flow.traces.values():
        for graph in trace.graphs:
            for node in graph.nodes:
                by_setting: dict[Any, Slot] = {}
                for slot in readers.of(trace, node):
                    if slot in parent:
                        site = plan.config.site(slot[0])
                        first = by_setting.setdefault((site.activation_format, site.learn_scales), slot)
                        parent[top(slot)] = top(first)
    plan.groups = {slot: top(slot) for slot in parent}


def slots(plan: Plan, model: nn.Module) -> Iterator[Slot]:
    """All activation sites of a plan."""
    for path in plan.layers:
        attention = isinstance(model.get_submodule(path), nn.MultiheadAttention)
        yield from ((path, what) for what in (("query", "key", "value", "out") if attention else ("input",)))
    yield from ((path, "input") for path in (*plan.pools, *plan.inputs))
    for item in plan.adds:
        yield from ((item.path, what) for what, placed in zip("ab", item.inputs, strict=True) if placed)
    yield from ((item.path, what) for item in plan.gates for what in "ab")
    yield from ((item.path, "input") for item in plan.pool_calls)


class _Readers:
    """Which slots read a value, directly or as the input of a container."""

    def __init__(self, plan: Plan, flow: Flow) -> None:
        self.flow = flow
        self.expressions: dict[tuple[str, fx.Node], list[Slot]] = {}
        # Each graph of a container asks again: without this, the time doubles with each level of nesting.
        self._found: dict[tuple[str, fx.Node], list[Slot]] = {}
        for item in (*plan.adds, *plan.gates, *plan.pool_calls):
            whats = ("a", "b") if len(item.inputs) == 2 else ("input",)
            for operands in item.located.operands:
                for node, what in zip(operands, whats, strict=True):
                    trace = item.located.trace
                    if trace is not None:
                        self.expressions.setdefault((trace.path, node), []).append((item.path, what))

    def of(self, trace: Trace, node: fx.Node) -> list[Slot]:
        """The slots that read ``node``."""
        if (trace.path, node) not in self._found:
            self._found[trace.path, node] = self._readers(trace, node)
        return self._found[trace.path, node]

    def _readers(self, trace: Trace, node: fx.Node) -> list[Slot]:
        found = list(self.expressions.get((trace.path, node), ()))
        for user in node.users:
            if user.op != "call_module":
                continue
            path = self.flow.path_of(trace, user)
            names = [n.lstrip("*") for n, values in self.flow.arguments(trace, user).items() if node in values]
            inner = self.flow.traces.get(path)
            if inner is None:
                found += [(path, name if name in ("query", "key", "value") else "input") for name in names]
                continue
            for graph in inner.graphs:
                for placeholder in graph.nodes:
                    if placeholder.op == "placeholder" and str(placeholder.target).lstrip("*") in names:
                        found += self.of(inner, placeholder)
        return list(dict.fromkeys(found))
