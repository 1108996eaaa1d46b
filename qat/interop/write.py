"""A state dict in the layout of pytorch-quantization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..core.quantizer import Quantizer, State, WeightQuantizer, is_prepared
from ..errors import QATError
from ..nn.add import QuantAdd
from ..nn.attention import QuantAttention
from ..nn.layers import InterceptedLayer, QuantLayer
from ..nn.mul import QuantMul
from ..nn.pool import QuantPool
from .match import join


def to_pytorch_quantization(model: nn.Module, *, sites: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The state dict of ``model`` as pytorch-quantization lays it out; the inverse of ``load_pytorch_quantization``.

    Weights keep their names. Ranges of layers and poolings become ``conv1._input_quantizer._amax``, of shape ``()``, and
    ``conv1._weight_quantizer._amax``, of shape ``(C_out, 1, 1, 1)`` for a convolution and ``(C_out, 1)`` for a linear layer.
    The site on the identity branch of a residual Add becomes ``<module>.residual_quantizer._amax``, which a model of that
    package must define itself. Number formats are no part of that layout.

    Args:
        model: Prepared and calibrated. Sites without a range are left out; that package then takes each batch's own maximum.
        sites: Names that quantizers get, by the path of the site, such as ``Imported.sites``; the others are as above.

    Returns:
        Keys to tensors, those of the weights as ``model.state_dict()`` gives them.

    Raises:
        QATError: If the model has no ranges, a site has no name in that layout, or is switched off while it has a range.
    """
    if not is_prepared(model):
        raise QATError("model: not prepared, it has no ranges. Run qat.prepare(model) and qat.calibrate(model, loader) first")
    # Brings the ranges that follow weights up to date.
    state = model.state_dict()
    given = dict(sites or {})
    present = {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)}
    unknown = next((path for path in given if path not in present), None)
    if unknown is not None:
        raise QATError(f"sites: {unknown!r} is no site of this model")
    found = {key: value for key, value in state.items() if key.rpartition(".")[0] not in present}
    nameless = []
    names = {**_names(model), **given}
    ranges: dict[str, Tensor] = {}
    for path in sorted(present):
        site = model.get_submodule(path)
        assert isinstance(site, Quantizer)
        if not site.has_range:
            continue
        if site.state is not State.QUANTIZING:
            raise QATError(f"{path}: has a range, but does not quantize; a state dict cannot tell that. Set its state first")
        if path not in names:
            nameless.append(path)
        else:
            ranges[f"{names[path]}._amax"] = _shaped(model, path, site)
    if nameless:
        raise QATError(
            f"{', '.join(nameless)}: pytorch-quantization has no name for such a site. Name it by sites={{path: name}} as the "
            f"model there does, or prepare without it: QuantConfig({', '.join(sorted(_remedies(model, nameless)))})"
        )
    if not ranges:
        raise QATError("model: no site has a range. Run qat.calibrate(model, loader) first")
    return {**found, **ranges}


def _remedies(model: nn.Module, paths: list[str]) -> set[str]:
    """The settings of QuantConfig that make no such sites."""
    found = set()
    for path in paths:
        owner = path.rpartition(".")[0]
        module = model.get_submodule(owner)
        if isinstance(module, QuantAdd):
            found.add("add_inputs='residual'")
        elif isinstance(module, QuantMul):
            found.add("gate_inputs=False")
        elif isinstance(module, QuantAttention):
            found.add(f"rules=[{{'match': {owner!r}, 'quantize': False}}]")
        else:
            found.add("pool_inputs=False")
    return found


def _names(model: nn.Module) -> dict[str, str]:
    """The names that quantizers have there, by the path of the site."""
    names = dict(_layer_names(model))
    adds = [(path, module) for path, module in model.named_modules() if isinstance(module, QuantAdd)]
    count = Counter(path.rpartition(".")[0] for path, _ in adds)
    for path, module in adds:
        above = path.rpartition(".")[0]
        if module.fusable is not None and count[above] == 1:
            names[join(path, f"{'ba'[module.fusable]}_quantizer")] = join(above, "residual_quantizer")
    return names


def _layer_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantPool) and module.float_class is nn.Identity:
            yield join(path, "input_quantizer"), path
        elif isinstance(module, QuantLayer | QuantPool):
            yield join(path, "input_quantizer"), join(path, "_input_quantizer")
        if isinstance(module, QuantLayer):
            yield join(path, "weight_quantizer"), join(path, "_weight_quantizer")


def _shaped(model: nn.Module, path: str, site: Quantizer) -> Tensor:
    """The range of a site in the rank of the weight that it belongs to."""
    amax = site.amax.detach().abs()
    if not isinstance(site, WeightQuantizer):
        return amax
    layer = model.get_submodule(path.rpartition(".")[0])
    if site.follow and isinstance(layer, InterceptedLayer):
        raise QATError(f"{path}: follows a weight that is computed in each forward. Prepare with weight_range='frozen'")
    if site.axis is None or not isinstance(layer, QuantLayer):
        return amax
    return amax.reshape([-1 if dim == site.axis else 1 for dim in range(layer.weight.ndim)])
