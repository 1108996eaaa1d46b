"""Which quantizer of another tool is which site of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..core.quantizer import Quantizer
from ..errors import QATError
from ..nn.add import QuantAdd
from ..preparation.plan import Plan, Slot, slots
from .source import Source


@dataclass(frozen=True)
class Sites:
    """The sites that a model has, or may get.

    Attributes:
        slots: By path; the slot in the plan, ``None`` in a model that is prepared.
        identities: Path of the site on the identity branch of each residual Add, by the module whose forward adds; ``None``
            for an Add of which it is unclear.
        left: Why a module has no sites, by its path.
    """

    slots: dict[str, Slot | None]
    identities: dict[str, list[str | None]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def join(*parts: str) -> str:
    """A module path from its parts, empty ones left out."""
    return ".".join(part for part in parts if part)


def planned_sites(plan: Plan, model: nn.Module) -> Sites:
    """The sites of a plan."""
    calls = {item.path for item in plan.pool_calls}
    found: dict[str, Slot | None] = {
        path if path in calls else join(path, f"{what}_quantizer"): (path, what) for path, what in slots(plan, model)
    }
    for path in plan.layers:
        if not isinstance(model.get_submodule(path), nn.MultiheadAttention):
            found[join(path, "weight_quantizer")] = (path, "weight")
    sites = Sites(found, left={item.path: item.why for item in plan.left})
    for item in plan.adds:
        _add_identity(sites, item.path, item.located.fusable)
    return sites


def present_sites(model: nn.Module) -> Sites:
    """The sites of a prepared model."""
    found = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)]
    sites = Sites(dict.fromkeys(found))
    for path, module in model.named_modules():
        if isinstance(module, QuantAdd):
            _add_identity(sites, path, module.fusable)
    return sites


def _add_identity(sites: Sites, path: str, fusable: int | None) -> None:
    site = None if fusable is None else join(path, f"{'ba'[fusable]}_quantizer")
    sites.identities.setdefault(path.rpartition(".")[0], []).append(site)


def match(sources: Sequence[Source], sites: Sites, model: nn.Module, given: Mapping[str, str]) -> dict[str, list[Source]]:
    """The quantizers by the path of their site; more than one where a module has several names.

    Args:
        sources: The quantizers.
        sites: The sites there are.
        model: The model they belong to.
        given: Names of quantizers by the path of their site, where the caller knows better.

    Raises:
        QATError: For one that fits no site; names it.
    """
    targets = {name: path for path, name in given.items()}
    names = [source.name for source in sources]
    unknown = next((name for name in targets if name not in names), None)
    if unknown is not None:
        raise QATError(f"sites: {unknown!r} is no quantizer that was found; they are called e.g. {names[0] if names else '-'}")
    alone = Counter(source.owner for source in sources if source.role is None and source.name not in targets)
    matched: dict[str, list[Source]] = {}
    for source in sources:
        target = targets.get(source.name) or _target(source, sites, model, alone[source.owner] == 1)
        if target not in sites.slots:
            raise QATError(f"{source.name}: {_why_no_site(source, target, sites, model)}")
        matched.setdefault(target, []).append(source)
    return matched


def canonical(model: nn.Module, path: str) -> str:
    """The first path of the module at ``path``: what plans call it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return path
    return next(name for name, other in model.named_modules() if other is module)


def _target(source: Source, sites: Sites, model: nn.Module, only_one: bool) -> str | None:
    if source.role is not None:
        return join(canonical(model, source.owner), f"{source.role}_quantizer")
    own = join(canonical(model, source.name), "input_quantizer")
    if own in sites.slots:
        return own
    identities = sites.identities.get(canonical(model, source.owner), [])
    return identities[0] if only_one and len(identities) == 1 else None


def _why_no_site(source: Source, target: str | None, sites: Sites, model: nn.Module) -> str:
    remedy = "Name its site by sites={site: quantizer}, or leave it out by disabled=[glob], which changes the outputs"
    if source.role is None:
        near = [path for path in sites.slots if path.startswith(join(source.owner, ""))] if source.owner else list(sites.slots)
        there = f"; sites there: {', '.join(near[:8])}" if near else ""
        return f"stands alone in a forward, and no one residual Add with a known identity branch is beside it{there}. {remedy}"
    try:
        module = model.get_submodule(source.owner)
    except AttributeError:
        return f"the model has no module {source.owner!r}. {remedy}"
    why = sites.left.get(canonical(model, source.owner))
    return f"{type(module).__name__} gets no site {target!r}{f': {why}' if why else ''}. {remedy}"
