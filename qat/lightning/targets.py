"""Which sub-models of a LightningModule are quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torchmetrics import Metric, MetricCollection

from ..core.config import QuantConfig, Rule
from ..errors import QATError
from ..nn.attention import QuantAttention
from ..nn.layers import QUANTIZABLE
from ..preparation import Report, prepare, restore
from ..training.checkpoints import changed_settings, reports
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

LAYERS = (*QUANTIZABLE, nn.MultiheadAttention, QuantAttention)


def prepare_module(
    pl_module: pl.LightningModule, config: QuantConfig | None = None, target: Sequence[str] | None = None
) -> None:
    """Prepare the sub-models of a LightningModule in place; those that are prepared already stay as they are.

    Args:
        pl_module: The LightningModule.
        config: What is quantized and how; ``None`` means the defaults, or what a prepared sub-model has.
        target: Attribute paths of the sub-models; ``None`` finds them as :class:`QATCallback` says.

    Raises:
        QATError: For a path that does not exist, when there is nothing to quantize, or when a sub-model is prepared with
            another configuration. The module is then unchanged.
    """
    found = reports(pl_module)
    if config is not None:
        _check_unchanged({path: report for path, report in found.items() if target is None or path in target}, config)
    if target is not None:
        chosen = {path: _submodule(pl_module, path) for path in target if path not in found}
    elif found:
        return
    else:
        chosen, config = _find_targets(pl_module, config or QuantConfig())
    example_inputs = getattr(pl_module, "example_input_array", None)
    done: list[nn.Module] = []
    try:
        for module in chosen.values():
            # The example is what the LightningModule's own forward takes; with several sub-models, nobody knows whose.
            prepare(module, config, example_inputs=example_inputs if len(chosen) == 1 else None)
            done.append(module)
    except QATError:
        for module in done:
            restore(module)
        raise


def _check_unchanged(reports: Mapping[str, Report], config: QuantConfig) -> None:
    for path, report in reports.items():
        changed = changed_settings(path, report.config, config)
        if changed:
            raise QATError(
                f"{path or 'the LightningModule'} is prepared already, with another {', '.join(changed)}: call "
                "qat.restore on it first, or leave config out"
            )


def _submodule(pl_module: pl.LightningModule, path: str) -> nn.Module:
    try:
        return pl_module.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(name for name, _ in pl_module.named_children())
        raise QATError(f"target={path!r}: {type(pl_module).__name__} has no such module; its children: {children}") from error


def _find_targets(pl_module: pl.LightningModule, config: QuantConfig) -> tuple[dict[str, nn.Module], QuantConfig]:
    """The sub-models to prepare by path, and the configuration that leaves the rest alone."""
    with_layers = {
        name: child
        for name, child in pl_module.named_children()
        if not isinstance(child, Metric | MetricCollection) and _has_layers(child)
    }
    if not with_layers:
        kinds = ", ".join(kind.__name__ for kind in (*QUANTIZABLE, nn.MultiheadAttention))
        raise QATError(
            f"{type(pl_module).__name__}: nothing to quantize, no child holds any of {kinds}. Build the model in __init__ "
            "or configure_model (setup is too late), or name it: QATCallback(target=...)"
        )
    # A wholly frozen child next to one that trains is a teacher or a perceptual loss. Alone, it is the frozen model.
    trained = {n: m for n, m in with_layers.items() if any(p.requires_grad for p in m.parameters())} or with_layers
    if len(trained) == 1 and not isinstance(next(iter(trained.values())), LAYERS):
        return trained, config
    if not lightning_of(pl_module).utilities.model_helpers.is_overridden("forward", pl_module):
        models = {name: module for name, module in trained.items() if not isinstance(module, LAYERS)}
        if not models:
            raise QATError(
                f"{type(pl_module).__name__} has layers of its own ({', '.join(trained)}) and no forward that shows how they "
                "are used. Give it one, or put them into a sub-model"
            )
        return models, config
    # Several parts that one forward chains: only as a whole do they show which layer is the head.
    others = [name for name, child in pl_module.named_children() if name not in trained and _has_layers(child)]
    return {"": pl_module}, config.replace(rules=(*config.rules, *(Rule(name, quantize=False) for name in others)))


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in layers(module))


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that may become quantized, or are."""
    return (module for module in model.modules() if isinstance(module, LAYERS))


def config_for(found: Mapping[str, Report], config: QuantConfig | None, *, only_learn_scales: bool) -> QuantConfig | None:
    """The configuration to prepare with; ``None`` takes what is prepared as it is.

    Args:
        found: The reports of sub-models that are prepared already.
        config: The configuration that was asked for.
        only_learn_scales: Whether nothing but its ``learn_scales`` was asked for, and the rest are defaults.

    Raises:
        QATError: For a sub-model that is prepared with another ``learn_scales``.
    """
    if not found or not only_learn_scales:
        return config
    assert config is not None
    for path, report in found.items():
        if report.config.learn_scales != config.learn_scales:
            raise QATError(
                f"{path or 'the LightningModule'} is prepared already, with another learn_scales: call qat.restore on it "
                "first, or leave learn_scales out"
            )
    return None


def check_layers(pl_module: pl.LightningModule, seen: Collection[int]) -> None:
    """Refuse layers that train and were made too late.

    Args:
        pl_module: The module, prepared.
        seen: The ``id`` of every layer that there was when it was prepared.

    Raises:
        QATError: For a layer that is not among them.
    """
    measures = [m for m in pl_module.modules() if isinstance(m, Metric | MetricCollection)]
    apart = {id(inner) for measure in measures for inner in measure.modules()}
    late = [
        path
        for path, module in pl_module.named_modules()
        if isinstance(module, LAYERS)
        and id(module) not in seen
        and id(module) not in apart
        and any(p.requires_grad for p in module.parameters())
    ]
    if late:
        raise QATError(
            f"{late[0]} was made in LightningModule.setup, which comes after the sites and the head were chosen. Build the "
            "layers in __init__ or configure_model, or name the sub-model to quantize: QATCallback(target=...)"
        )
