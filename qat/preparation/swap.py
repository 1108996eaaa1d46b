"""Carrying out a plan: classes are exchanged in place, quantizers attached; and the way back."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..core.config import SiteConfig
from ..core.quantizer import Quantizer, WeightQuantizer
from ..nn.add import Add, QuantAdd
from ..nn.attention import QuantAttention, allow_fused_path, keep_python_path, projections, quant_attention_class
from ..nn.derive import Derived
from ..nn.layers import CONVS, CONVS_TRANSPOSED, make_weight_quantizer, quant_class
from ..nn.mul import QuantMul
from ..nn.pool import QuantPool, quant_pool_class
from .placement import Report, Site
from .plan import Plan, PlannedExpression, Slot
from .source import Key, derive_class, read_class

REPORT = "_qat_report"


class Rewritten(Derived):
    """Mixin of modules in whose forward some expressions are submodules.

    Attributes:
        names: Submodule for each expression.
    """

    names: tuple[tuple[Key, str], ...]

    def remove_quantizers(self) -> None:
        """Delete the submodules."""
        for _, name in self.names:
            delattr(self, name)

    @classmethod
    def rebuild_args(cls) -> tuple[Any, ...]:
        return rewritten_class, cls.float_class, cls.names


@functools.cache
def rewritten_class(float_class: type, names: tuple[tuple[Key, str], ...]) -> type[Rewritten]:
    """The class that derives from ``float_class`` with these expressions replaced."""
    members = {"float_class": float_class, "names": names, "__module__": __name__}
    return derive_class(read_class(float_class), dict(names), (Rewritten,), members)


def apply_plan(model: nn.Module, plan: Plan) -> Report:
    """Change ``model`` in place as planned."""
    home = next(iter(model.parameters())).device
    made: dict[Slot, Quantizer] = {}
    readers: dict[Slot, set[str]] = {}

    def quantizer(slot: Slot, device: torch.device) -> Quantizer:
        top = plan.groups[slot]
        if top not in made:
            site = plan.config.site(top[0])
            made[top] = Quantizer(site.activation_format, learned=site.learn_scales, device=device)
        # Attention asks once for what it reads as query, key and value.
        readers.setdefault(top, set()).add(slot[0])
        made[top].readers = len(readers[top])
        return made[top]

    weights: dict[Any, WeightQuantizer] = {}

    def weight_quantizer(weight: torch.Tensor, site: SiteConfig, *, per_channel: bool = True) -> WeightQuantizer:
        new = make_weight_quantizer(weight, site, per_channel=per_channel)
        # Modules that share a weight share its quantizer, unless they need different ones.
        return weights.setdefault((id(weight), new.fmt, new.axis, new.follow, new.learned), new)

    for path, site in plan.layers.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            tensors = projections(module)
            device = module.out_proj.weight.device
            inputs = {what: quantizer((path, what), device) for what in ("query", "key", "value", "out")}
            own = {key: weight_quantizer(w, site) for key, w in tensors.items()}
            _retype(module, quant_attention_class(_class(module))).add_quantizers(inputs, own)
        else:
            weight = module.get_parameter("weight")
            per_channel = not isinstance(module, CONVS_TRANSPOSED)
            weight_site = weight_quantizer(weight, site, per_channel=per_channel)
            input_site = quantizer((path, "input"), weight.device)
            _retype(module, quant_class(_class(module))).add_quantizers(input_site, weight_site)
    for path in (*plan.pools, *plan.inputs):
        module = model.get_submodule(path)
        _retype(module, quant_pool_class(_class(module))).add_quantizers(quantizer((path, "input"), home))
    _rewrite(model, plan, quantizer, home)
    keep_python_path(model)
    for module in list(model.modules()):
        for child in module.children():
            if isinstance(child, Quantizer | QuantAdd | QuantMul):
                child.train(module.training)
    report = _report(model, plan)
    setattr(model, REPORT, report)
    return report


def _rewrite(model: nn.Module, plan: Plan, quantizer: Any, home: torch.device) -> None:
    by_module: dict[str, list[tuple[PlannedExpression, nn.Module]]] = {}
    for item in plan.adds:
        a, b = (quantizer((item.path, what), home) if placed else None for what, placed in zip("ab", item.inputs, strict=True))
        if item.located.key is None:
            module = model.get_submodule(item.path)
            _retype(module, QuantAdd).set_quantizers(a, b, fusable=item.located.fusable)
        else:
            by_module.setdefault(item.located.path, []).append((item, QuantAdd(a, b, fusable=item.located.fusable)))
    for item in plan.gates:
        gate = QuantMul(quantizer((item.path, "a"), home), quantizer((item.path, "b"), home))
        by_module.setdefault(item.located.path, []).append((item, gate))
    for item in plan.pool_calls:
        by_module.setdefault(item.located.path, []).append((item, quantizer((item.path, "input"), home)))
    for path, items in by_module.items():
        module = model.get_submodule(path)
        names = tuple((item.located.key, item.name) for item, _ in items if item.located.key is not None)
        _retype(module, rewritten_class(_class(module), names))
        for item, child in items:
            module.add_module(item.name, child)


def _class(module: nn.Module) -> Any:
    return type(module)


def _retype(module: nn.Module, cls: type) -> Any:
    """Exchange the class of ``module`` in place."""
    module.__class__ = cls
    return module


def undo(model: nn.Module) -> int:
    """Take every exchanged class and every quantizer of ``model`` back; return how many modules were changed."""
    changed = 0
    for module in list(model.modules()):
        if type(module) is QuantAdd:
            module.remove_quantizers()
            _retype(module, Add)
        elif isinstance(module, Derived):
            module.remove_quantizers()
            _retype(module, module.float_class)
        else:
            continue
        changed += 1
    allow_fused_path(model)
    for module in model.modules():
        module.__dict__.pop(REPORT, None)
    return changed


def _report(model: nn.Module, plan: Plan) -> Report:
    paths = {id(module): path for path, module in model.named_modules()}
    kinds = {path: _kind(model.get_submodule(path)) for path in plan.layers}
    sites: list[Site] = []

    def add(path: str, what: str, kind: str, site: Quantizer, note: str = "") -> None:
        granularity = "per-tensor" if site.axis is None else "per-channel"
        sites.append(Site(path, what, kind, granularity, str(site.fmt), paths[id(site)], note))

    expressions = {item.path: item for item in (*plan.adds, *plan.gates, *plan.pool_calls)}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in kinds:
            for name, site in module._modules.items():
                if isinstance(site, Quantizer):
                    add(path, name.removesuffix("_quantizer"), kinds[path], site)
        elif isinstance(module, QuantPool) and path in (*plan.pools, *plan.inputs):
            add(path, "input", "pool" if path in plan.pools else "other", module.input_quantizer)
        elif path in expressions and isinstance(module, Quantizer):
            add(path, "input", "pool", module)
        elif path in expressions and isinstance(module, QuantAdd):
            for position, site in enumerate((module.a_quantizer, module.b_quantizer)):
                if site is not None:
                    fusable = "fusable into its layer" if module.fusable == position else ""
                    add(path, f"add {'ab'[position]}", "add", site, fusable)
        elif path in expressions and isinstance(module, QuantMul):
            for what, site in zip("ab", (module.a_quantizer, module.b_quantizer), strict=True):
                add(path, f"gate {what}", "gate", site)
    return Report(tuple(sites), tuple(plan.left), plan.head, plan.head_source, plan.config)


def _kind(module: nn.Module) -> str:
    if isinstance(module, QuantAttention):
        return "attention"
    return "conv" if isinstance(module, CONVS + CONVS_TRANSPOSED) else "linear"
