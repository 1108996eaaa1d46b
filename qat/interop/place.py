"""Sites where another tool had its quantizers, with its ranges."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import QuantConfig, Rule
from ..core.quantizer import Quantizer, WeightQuantizer, quantizers
from ..errors import QATError
from ..nn.add import Add
from ..nn.layers import is_conv_transposed, is_quantizable
from ..nn.pool import AVERAGE_POOLS
from ..preparation import Report, prepared_report
from ..preparation.check import check_model
from ..preparation.flow import has_forward, is_weighted
from ..preparation.plan import Plan, Slot, make_plan
from ..preparation.swap import apply_plan
from .fit import fitted, notes_on
from .match import canonical, join, match, planned_sites, present_sites
from .result import Imported
from .source import Source


class Placement:
    """Sites for a float model, decided before anything is changed.

    Args:
        model: A float model.
        sources: The quantizers it should get.
        given: Names of quantizers by the path of their site, where the caller knows better.
        weights: Weights that will be loaded, by key.
        example_inputs: As in :func:`qat.prepare`.

    Raises:
        QATError: If one of the quantizers fits no site, or its range does not fit there.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[Source],
        given: Mapping[str, str],
        weights: Mapping[str, Tensor],
        example_inputs: Any,
    ) -> None:
        check_model(model)
        self.model = model
        everything = _everything(model, sources, given)
        # Tracing runs what does not depend on the inputs, random numbers included.
        with torch.random.fork_rng(devices=[]):
            plan = make_plan(model, everything, example_inputs)
            sites = planned_sites(plan, model)
            self.matched = {path: _agreeing(path, found) for path, found in match(sources, sites, model, given).items()}
            placed = {slot: self.matched[path] for path, slot in sites.slots.items() if slot and path in self.matched}
            self.plan = make_plan(model, _narrowed(everything, plan, placed, model), example_inputs)
        self.notes = _split_groups(self.plan, placed)
        _refuse_unequal_shared_weights(self.plan, placed, model)
        self.ranges: dict[str, Tensor] = {}
        for path, source in self.matched.items():
            if source.amax is not None:
                self.ranges[path] = self._range(sites.slots[path], source, source.amax, weights)
                if source.role is None and path not in given:
                    self.notes.append(f"{source.name}: taken for {path}")

    def _range(self, slot: Slot | None, source: Source, amax: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        weight = channels = None
        if slot is not None and slot[1] == "weight":
            module: Any = self.model.get_submodule(slot[0])
            _refuse_padding(slot[0], module, source)
            weight = weights.get(join(slot[0], "weight"), module.weight)
            if self.plan.config.site(slot[0]).weight_granularity == "channel" and not is_conv_transposed(module):
                channels = weight.shape[0]
        found = fitted(source.name, amax, weight, channels)
        self.notes += notes_on(source, found, weight)
        return found

    def apply(self) -> Imported:
        """Change the model in place. Does not fail."""
        report = apply_plan(self.model, self.plan)
        for path, amax in self.ranges.items():
            site = self.model.get_submodule(path)
            assert isinstance(site, Quantizer)
            site.set_range(amax)
        return _result(self.model, report, self.matched, self.ranges, self.notes)


def set_present(
    model: nn.Module, sources: Sequence[Source], given: Mapping[str, str], weights: Mapping[str, Tensor]
) -> Imported:
    """Set ranges of a model that is prepared, in place. Sites that no quantizer belongs to stay as they are.

    Raises:
        QATError: As :class:`Placement`, and if quantizers of unequal ranges belong to sites that share one. Nothing is then
            changed.
    """
    report = prepared_report(model)
    if report is None:
        raise QATError("Only a part of this model is prepared: import into its parts, or qat.restore(model) first")
    owners = {id(child): module for module in model.modules() for child in module.children()}
    matched: dict[str, Source] = {}
    by_site: dict[Quantizer, list[Source]] = {}
    for path, found in match(sources, present_sites(model), model, given).items():
        matched[path] = found[0]
        site = model.get_submodule(path)
        assert isinstance(site, Quantizer)
        by_site.setdefault(site, []).extend(found)
    ranges: dict[Quantizer, Tensor] = {}
    notes: list[str] = []
    for site, found in by_site.items():
        source = _agreeing("one tensor's site", found)
        if source.amax is None:
            continue
        if source.fmt != site.fmt:
            raise QATError(f"{source.name}: is {source.fmt}, its site {site.fmt}. qat.restore(model) before importing")
        weight: Any = getattr(owners[id(site)], "weight", None) if isinstance(site, WeightQuantizer) else None
        channels = None if site.axis is None else site.amax.shape[0]
        ranges[site] = fitted(source.name, source.amax, weight, channels)
        notes += notes_on(source, ranges[site], weight)
    for site, amax in ranges.items():
        if isinstance(site, WeightQuantizer):
            site.follow = False
        site.set_range(amax)
    kept = [path for path, site in quantizers(model) if site not in ranges and site.has_range]
    if kept:
        notes.append(f"not in what was imported, so as before: {', '.join(kept)}")
    set_paths = {path for path in matched if model.get_submodule(path) in ranges}
    return _result(model, report, matched, set_paths, notes)


def _result(
    model: nn.Module, report: Report, matched: Mapping[str, Source], ranges: Iterable[str], notes: list[str]
) -> Imported:
    notes = [*notes, *(f"{source.name}: {source.note}" for source in matched.values() if source.note)]
    unset = tuple(path for path, site in quantizers(model) if not site.has_range)
    return Imported(report, {path: matched[path].name for path in ranges}, unset, tuple(notes))


def _agreeing(where: str, found: Sequence[Source]) -> Source:
    """The one range that all of them have."""
    first = found[0]
    for other in found[1:]:
        if (first.amax is None) != (other.amax is None) or (
            first.amax is not None and other.amax is not None and not torch.equal(first.amax, other.amax)
        ):
            raise QATError(
                f"{other.name}: its range is not that of {first.name}, and both belong to {where}. Import into the float model "
                "(qat.restore(model)), where sites can differ, or make the ranges equal"
            )
    return first


def _everything(model: nn.Module, sources: Sequence[Source], given: Mapping[str, str]) -> QuantConfig:
    """Settings that place every site which a quantizer may belong to."""
    owners = {canonical(model, source.owner) for source in sources if source.role is not None}
    owners |= {canonical(model, site.rpartition(".")[0]) for site in given}
    marks = {canonical(model, source.name) for source in sources if source.role is None}
    rules: list[Rule] = []
    inputs: list[str] = []
    for path, module in model.named_modules():
        if is_weighted(module):
            inside = any(
                isinstance(above, nn.MultiheadAttention) and _is_below(path, top) for top, above in model.named_modules()
            )
            if path not in owners and not inside:
                rules.append(Rule(_exactly(path), quantize=False))
        elif path in owners | marks and _has_input_site(module):
            inputs.append(glob.escape(path))
    return QuantConfig(
        weight_range="frozen", add_inputs="both", conv_transpose=True, module_inputs=tuple(inputs), head=(), rules=tuple(rules)
    )


def _is_below(path: str, top: str) -> bool:
    return path != top and (top == "" or path.startswith(f"{top}."))


def _has_input_site(module: nn.Module) -> bool:
    own = isinstance(module, (*AVERAGE_POOLS, Add))
    return not own and not module._modules and has_forward(module) and not isinstance(module, nn.RNNBase | nn.RNNCellBase)


def _exactly(path: str) -> str:
    # A model that is a layer itself has the empty path.
    return glob.escape(path) or "*"


def _narrowed(config: QuantConfig, plan: Plan, placed: Mapping[Slot, Source], model: nn.Module) -> QuantConfig:
    """``config`` without the sites that nothing belongs to."""
    used = {path for path, _ in placed}
    rules = list(config.rules)
    for path in plan.layers:
        if path not in used:
            rules.append(Rule(_exactly(path), quantize=False))
            continue
        source = placed.get((path, "weight"))
        if source is not None and source.fmt.name != config.weight_format:
            rules.append(Rule(_exactly(path), weight_format=source.fmt.name))
        module = model.get_submodule(path)
        if source is not None and source.amax is not None and source.amax.numel() == 1 and not is_conv_transposed(module):
            weight = module.weight
            if isinstance(weight, Tensor) and weight.shape[0] > 1:
                rules.append(Rule(_exactly(path), weight_granularity="tensor"))
    pools = [*plan.pools, *(item.path for item in plan.pool_calls)]
    gates = [item.path for item in plan.gates]
    adds = {item.path: item.located.fusable for item in plan.adds}
    both = any(fusable is not None and (path, "ab"[fusable]) in placed for path, fusable in adds.items())
    for paths in (pools, gates, list(adds)):
        if used.intersection(paths):
            rules += [Rule(_exactly(path), quantize=False) for path in paths if path not in used]
    return config.replace(
        rules=tuple(rules),
        pool_inputs=bool(used.intersection(pools)),
        gate_inputs=bool(used.intersection(gates)),
        add_inputs=("both" if both else "residual") if used.intersection(adds) else "none",
        conv_transpose=any(is_conv_transposed(model.get_submodule(path)) for path in plan.layers if path in used),
    )


def _split_groups(plan: Plan, placed: Mapping[Slot, Source]) -> list[str]:
    """Let sites that read one tensor share a quantizer only if their ranges are equal; tells where they are not."""
    tops: dict[tuple[Slot, float | None], Slot] = {}
    ranges: dict[Slot, list[float | None]] = {}
    for slot, top in list(plan.groups.items()):
        source = placed.get(slot)
        value = None if source is None or source.amax is None or source.amax.numel() != 1 else float(source.amax)
        plan.groups[slot] = tops.setdefault((top, value), slot)
        if value is not None and value not in ranges.setdefault(top, []):
            ranges[top].append(value)
    return [
        f"{'.'.join(top)}: sites of this tensor have the ranges {', '.join(f'{value:g}' for value in values)}: kept apart"
        for top, values in ranges.items()
        if len(values) > 1
    ]


def _refuse_unequal_shared_weights(plan: Plan, placed: Mapping[Slot, Source], model: nn.Module) -> None:
    by_weight: dict[int, list[Source]] = {}
    for path in plan.layers:
        source = placed.get((path, "weight"))
        if source is not None:
            by_weight.setdefault(id(model.get_submodule(path).weight), []).append(source)
    for found in by_weight.values():
        _agreeing("one shared weight", found)


def _refuse_padding(path: str, module: nn.Module, source: Source) -> None:
    mode = getattr(module, "padding_mode", "zeros")
    if source.is_original and is_quantizable(module) and mode != "zeros":
        raise QATError(
            f"{path}: has padding_mode={mode!r}, for which pytorch-quantization pads otherwise than torch does. Set "
            "padding_mode='zeros' if that is what the model was trained with, or pad in a module of its own"
        )
