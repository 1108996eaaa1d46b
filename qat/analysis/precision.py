"""Mixed precision: which layers to leave in float."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core.config import Rule
from ..core.quantizer import Quantizer
from ..errors import QATError
from ..nn.add import QuantAdd
from ..nn.mul import QuantMul
from ..preparation import prepared_report, restore
from ..preparation.plan import make_plan
from ..support.batches import example_of
from .layers import Layer, analysing, each_batch
from .metrics import Mean, Metric, relative_error
from .results import Result, Sensitivity, make_table
from .sensitivity import sensitivity

if TYPE_CHECKING:
    from ..tensorrt import Inspection

_WEIGHTED = ("conv", "linear", "attention")


@dataclass(frozen=True)
class Choice:
    """One layer, Add, gate or pooling that is left in float.

    Attributes:
        path: Module path.
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"add"``, ``"gate"`` or ``"pool"``.
        change: Its entry in the ranking.
        extra_ms: What that costs by the profiles, in ms; ``None`` if they do not tell.
        follows: Whether it gets no site because nothing that feeds it is quantized. Such a one needs no rule.
    """

    path: str
    kind: str
    change: float
    extra_ms: float | None
    follows: bool = False


@dataclass(frozen=True)
class MixedPrecision(Result):
    """What :func:`mixed_precision` chose; prints as a table.

    Attributes:
        layers: Left in float, the most sensitive first, then what is so because of them.
        metric: Name of the metric.
        value: The metric with these layers in float, evaluated.
        quantized: The metric with all layers quantized, evaluated.
        budget: What ``value`` was to reach, if that was asked for.
        latency_ms: What the profiles add up to, an estimate: build the engine and measure it. ``None`` without profiles.
        latency: What ``latency_ms`` was to reach, if that was asked for.
        evaluations: How many evaluations this took, besides the ranking.
    """

    layers: tuple[Choice, ...]
    metric: str
    value: float
    quantized: float
    budget: float | None
    latency_ms: float | None
    latency: float | None
    evaluations: int

    @property
    def met(self) -> bool:
        """Whether every budget is met; that of the latency by its estimate."""
        accurate = self.budget is None or self.value <= self.budget
        return accurate and (self.latency is None or (self.latency_ms is not None and self.latency_ms <= self.latency))

    @property
    def rules(self) -> list[dict[str, Any]]:
        """For ``qat.QuantConfig(rules=...)`` or its YAML file: what leaves these layers in float."""
        return [_rule(layer.path) for layer in self.layers if not layer.follows]

    def to_rules(self) -> tuple[Rule, ...]:
        """The same as :class:`qat.Rule`."""
        return tuple(Rule(**rule) for rule in self.rules)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**super().to_dict(), "met": self.met, "rules": self.rules}

    def table(self) -> Table:
        rows = [(x.path, x.kind, f"{x.change:+.4g}", "" if x.extra_ms is None else f"{x.extra_ms:+.4f}") for x in self.layers]
        caption = f"{self.metric}: {self.value:.4g}, all quantized {self.quantized:.4g}"
        caption += "" if self.budget is None else f", budget {self.budget:.4g}"
        caption += "" if self.latency_ms is None else f"; about {self.latency_ms:.4f} ms"
        caption += "" if self.latency is None else f", budget {self.latency:.4f} ms"
        caption += "" if self.budget is None and self.latency is None else ("; met" if self.met else "; NOT MET")
        return make_table(f"{len(rows)} layers left in float", ("layer", "kind"), ("change", "ms"), rows, caption)


def mixed_precision(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    latency: float | None = None,
    profiles: tuple[Inspection, Inspection] | None = None,
    metric: Metric | None = None,
    ranking: Sensitivity | None = None,
) -> MixedPrecision:
    """Choose what stays in float: the fewest layers that meet an accuracy budget, or the most sensitive that a latency allows.

    Layers are taken in the order of ``ranking``, as many as ``budget`` needs (found by bisection); then each is given back, the
    last one first, unless that breaks the budget. Every set is judged by a complete evaluation of the model with that set in
    float, the one returned included. This is a greedy search: a smaller set may exist. With ``latency`` alone, the layers that
    fit are taken in the order of the ranking.

    Nothing is changed: prepare a float model with ``QuantConfig(rules=result.rules)``. It has the value that was evaluated:
    an Add, a gate or a pooling that no quantized layer feeds any more gets no site, and is counted so, as far as the model
    was prepared as a whole. Of several Adds, gates or poolings in the forward of one module none is chosen: they are
    numbered, so that a rule may mean another one once such a site is gone.

    Args:
        model: Prepared and calibrated. Sites that are off stay off.
        batches: As for ``qat.calibrate``; all are held in memory, and so are the float outputs.
        budget: The largest value of the metric to accept.
        latency: In ms, of the engine; needs ``profiles``.
        profiles: What ``qat.tensorrt.inspect(engine, times=...)`` tells of the INT8 and of the FP16 engine.
        metric: As for :func:`sensitivity`; lower is better.
        ranking: Of :func:`sensitivity` or :func:`estimate_sensitivity`; by default the former with ``switch="on"``.

    Returns:
        The layers, and whether that is enough (``met``); if no set that was tried meets ``budget``, the best of them.

    Raises:
        QATError: If there is no budget, no site quantizes, the profiles have no times or name no layer of the model, the
            ranking is of another model, or the batches are empty. Of batches that do not fit, the model's own error.
    """
    if budget is None and latency is None:
        raise QATError("budget: pass budget= for the metric, latency= in ms, or both")
    if latency is not None and profiles is None:
        raise QATError("profiles: a latency budget needs the layer profiles of the INT8 and of the FP16 engine")
    batches = list(each_batch(batches))
    metric = metric or relative_error
    ranking = ranking or sensitivity(model, batches, metric=metric)
    placement = _Placement(model, batches[0])
    with analysing(model) as bench:
        missing = set(bench.layers) - {layer.path for layer in ranking.layers}
        if missing:
            raise QATError(f"ranking: says nothing about {min(missing)}. Rank the layers of this model")
        kinds = {path: layer.kind for path, layer in bench.layers.items()}
        order = [layer.path for layer in ranking.layers if layer.path in kinds and not _is_numbered(bench.layers, layer.path)]
        total, extra = _costs(profiles, order)
        judge = _Judge(bench.run, batches, frozenset(bench.layers), metric)
        if budget is None:
            assert latency is not None
            chosen = _that_fit([path for path in order if path in extra], extra, latency - total)
        else:
            chosen = _fewest(order, judge, budget)
        gone = placement.follow({path for path in chosen if kinds[path] in _WEIGHTED})
        follow = [path for path in bench.layers if path in gone]
        chosen = [path for path in chosen if path not in gone]
        value, quantized = judge((*chosen, *follow)), judge(())
    changes = {layer.path: layer.change for layer in ranking.layers}
    layers = tuple(Choice(path, kinds[path], changes[path], extra.get(path), path in gone) for path in (*chosen, *follow))
    estimate = total + sum(extra.get(layer.path, 0.0) for layer in layers) if profiles else None
    name = getattr(metric, "__name__", type(metric).__name__)
    return MixedPrecision(layers, name, value, quantized, budget, estimate, latency, len(judge.known))


class _Judge:
    """The metric with some layers in float, each set evaluated once."""

    def __init__(
        self, run: Callable[[Any, Collection[str]], Any], batches: Sequence[Any], layers: frozenset[str], metric: Metric
    ) -> None:
        self.run, self.batches, self.layers, self.metric = run, batches, layers, metric
        self.references = [run(batch, ()) for batch in batches]
        self.known: dict[frozenset[str], float] = {}

    def __call__(self, paths: Collection[str]) -> float:
        left = frozenset(paths)
        if left not in self.known:
            mean = Mean()
            for batch, reference in zip(self.batches, self.references, strict=True):
                mean.add(self.metric(self.run(batch, self.layers - left), reference, batch))
            self.known[left] = mean.value
        return self.known[left]


def _rule(path: str) -> dict[str, Any]:
    return {"match": glob.escape(path), "quantize": False}


class _Placement:
    """Where ``qat.prepare`` puts sites, depending on what is left in float. Plans with a float copy of the model."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._report = prepared_report(inner)
        if self._report is not None:
            self._plain = restore(copy.deepcopy(inner))
            tensor = next(inner.parameters(), None)
            inputs = example_of(inner, batch, None if tensor is None else tensor.device)
            # A copy, as a model may change its input in place.
            self._inputs = tree_map_only(Tensor, Tensor.clone, inputs)

    def follow(self, layers: Collection[str]) -> set[str]:
        """Paths of the Adds, gates and poolings that get no site if ``layers`` are left in float."""
        if self._report is None or not layers:
            return set()
        config = self._report.config
        rules = (*config.rules, *(Rule(**_rule(path)) for path in layers))
        everything = make_plan(self._plain, config, self._inputs)
        places = everything.places()
        if everything.layers.keys() <= set(layers):
            return set(places.values())
        left = make_plan(self._plain, config.replace(rules=rules), self._inputs).places()
        return {path for place, path in places.items() if place not in left}


def _is_numbered(layers: Mapping[str, Layer], path: str) -> bool:
    """Whether a site is one of several of its kind in the forward of one module, whose names depend on each other."""
    parent, kind = path.rpartition(".")[0], layers[path].kind
    alike = [other for other in layers.values() if other.kind == kind and other.path.rpartition(".")[0] == parent]
    return len(alike) > 1 and isinstance(layers[path].module, QuantAdd | QuantMul | Quantizer)


def _fewest(order: list[str], judge: _Judge, budget: float) -> list[str]:
    """The first layers of ``order`` that meet the budget, less those that are not needed; the best set seen if none does."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if judge(order[:middle]) <= budget else (middle + 1, high)
    chosen = order[:low]
    if judge(chosen) > budget:
        # Errors may cancel, so that more layers in float need not be better.
        judge(())
        best = min(judge.known, key=lambda paths: (judge.known[paths], len(paths)))
        return [path for path in order if path in best]
    for path in reversed(order[:low]):
        rest = [other for other in chosen if other != path]
        if judge(rest) <= budget:
            chosen = rest
    return chosen


def _that_fit(order: list[str], extra: Mapping[str, float], room: float) -> list[str]:
    """The layers of ``order`` whose costs fit, the first ones first. What costs nothing always does."""
    chosen = []
    for path in order:
        if extra[path] <= max(room, 0.0):
            chosen.append(path)
            room -= extra[path]
    return chosen


def _costs(profiles: tuple[Inspection, Inspection] | None, paths: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The time of the INT8 engine, and for each layer how much longer it takes in float, in ms."""
    if profiles is None:
        return 0.0, {}
    quantized, floating = (layer_times(profile, paths) for profile in profiles)
    total = sum(layer.time_ms or 0.0 for layer in profiles[0].layers)
    return total, {path: floating[path] - quantized[path] for path in paths if path in quantized and path in floating}


def layer_times(profile: Inspection, paths: Iterable[str]) -> dict[str, float]:
    """How long an engine takes for each of some modules.

    Args:
        profile: Of ``qat.tensorrt.inspect`` with ``times``.
        paths: Module paths. ONNX nodes are named after them.

    Returns:
        Milliseconds by path, for those that the profile names. A kernel that computes several of them counts for each in equal
        parts.

    Raises:
        QATError: If the profile has no times, or names none of the modules.
    """
    if not any(layer.time_ms for layer in profile.layers):
        raise QATError("profiles: no times. Pass qat.tensorrt.inspect(engine, times=qat.tensorrt.layer_times(engine, inputs))")
    wanted = list(paths)
    times: dict[str, float] = {}
    for layer in profile.layers:
        modules = {module for node in layer.onnx_nodes for module in _around(node.rpartition("/")[0]) if module in wanted}
        for module in modules:
            times[module] = times.get(module, 0.0) + (layer.time_ms or 0.0) / len(modules)
    if wanted and not times:
        raise QATError(f"profiles: no layer of the engine is called after {wanted[0]!r} or any other of the model")
    return times


def _around(path: str) -> Iterator[str]:
    """A module and those that hold it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
