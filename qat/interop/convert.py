"""Models of pytorch-quantization become models of ``qat``.

It fake-quantizes with ``s = 127 / amax``: ``clamp(round(x * s), -128, 127) / s`` (``pytorch_quantization/tensor_quant.py``,
release 2.2.1), and exports ``scale = amax / 127``, as this package computes. The two differ by roundings of float32: in the
last places of the result, and by one code next to a tie. Where ``amax`` is 127 times a power of two both are exact.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..core.quantizer import Quantizer, is_prepared
from ..errors import QATError
from ..preparation.check import check_model
from .place import Placement, set_present
from .result import Imported
from .source import Source, drop_disabled, is_tensor_quantizer, read_quantizer, read_state, split_state


def load_pytorch_quantization(
    model: nn.Module,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    *,
    sites: Mapping[str, str] | None = None,
    disabled: Sequence[str] = (),
    example_inputs: Any = None,
) -> Imported:
    """Load a state dict of pytorch-quantization or ModelOpt into ``model``, in place: weights, and sites with its ranges.

    A float model gets exactly the sites that have a range in the state dict. Ranges of weights stay as stored; they do not
    follow the weights. A quantizer that stands alone in a forward, such as ``layer1.0.residual_quantizer``, belongs to the
    identity branch of the one residual Add beside it, or to a module of the same name (an ``nn.Identity`` will do). In a
    prepared model the sites that are there get the ranges; others stay as they are.

    What is no part of a state dict is taken to be the default: 8 bits, signed, full range, switched on.

    Args:
        model: The model as it was before quantization, with equal names of modules; or the same one, prepared.
        state_dict: With keys such as ``conv1._input_quantizer._amax``, or ``conv1.input_quantizer._amax`` as ModelOpt writes
            them; in a dict around it or with a common prefix, too. Or a file that holds it, which is read with
            ``weights_only=True``: nothing in it is executed.
        sites: Names of quantizers by the path of their site in ``model``, where the two are not matched by themselves:
            ``{"layer1.0.quant_add0.b_quantizer": "layer1.0.my_quantizer"}``.
        disabled: Globs of quantizers to leave out, ``"fc._*"``: a switched-off quantizer keeps its key, and nothing in the
            state dict tells.
        example_inputs: As in :func:`qat.prepare`.

    Returns:
        What was placed and set. Sites that have no range are warned of: that tool would take each batch's own maximum.

    Raises:
        QATError: If a quantizer fits no site, a range or a weight does not fit, or the file cannot be read. The model is then
            unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> state = dict(model.state_dict())
        >>> state["2._input_quantizer._amax"] = torch.tensor(4.0)
        >>> state["2._weight_quantizer._amax"] = model[2].weight.detach().abs().amax((1, 2, 3), keepdim=True)
        >>> print(load_pytorch_quantization(model, state))
        2 ranges imported; 2 sites, 2 quantizers: 1 conv; 1 left in float
    """
    check_model(model)
    state = read_state(state_dict, model)
    own = {key for key in model.state_dict() if not _is_site_key(model, key)}
    weights, sources = split_state(state, own)
    sources = drop_disabled(sources, disabled)
    _check_weights(model, own, weights)
    if is_prepared(model):
        imported = set_present(model, sources, sites or {}, weights)
        model.load_state_dict(weights, strict=False)
    else:
        placement = Placement(model, sources, sites or {}, weights, example_inputs)
        model.load_state_dict(weights)
        imported = placement.apply()
    _warn(imported)
    return imported


def from_pytorch_quantization(model: nn.Module, *, disabled: Sequence[str] = (), example_inputs: Any = None) -> Imported:
    """Turn a model that is made of pytorch-quantization's modules into one of ``qat``, in place.

    Its quantized layers become torch's own with sites, a ``TensorQuantizer`` that the model calls itself becomes an
    ``nn.Identity`` with a site at its input. Parameters keep their identity. Quantizers that are switched off get no range.
    The modules are known by their attributes; that package is not imported.

    Args:
        model: On its device, neither wrapped nor compiled.
        disabled: Globs of quantizers to leave out.
        example_inputs: As in :func:`qat.prepare`.

    Returns:
        As :func:`load_pytorch_quantization`.

    Raises:
        QATError: If there are no such quantizers, or one has a setting without equal here: unsigned, other than 8 bits, a range
            learned inside of its grid. The model is then unchanged.
    """
    check_model(model)
    if is_prepared(model):
        raise QATError("model: has sites already. Import before qat.prepare")
    found = {path: module for path, module in model.named_modules() if is_tensor_quantizer(module)}
    if not found:
        raise QATError(
            "model: holds no TensorQuantizer of pytorch-quantization. For a state dict use load_pytorch_quantization"
        )
    sources = drop_disabled(filter(None, (_read(model, path, module) for path, module in found.items())), disabled)
    with ExitStack() as undo:
        for owner in [module for module in model.modules() if any(is_tensor_quantizer(child) for child in module.children())]:
            _make_float(owner, undo)
        imported = Placement(model, sources, {}, {}, example_inputs).apply()
        undo.pop_all()
    _warn(imported)
    return imported


def _is_site_key(model: nn.Module, key: str) -> bool:
    owner = key.rpartition(".")[0]
    try:
        return isinstance(model.get_submodule(owner), Quantizer)
    except AttributeError:
        return False


def _check_weights(model: nn.Module, own: set[str], weights: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own - set(weights)), sorted(set(weights) - own)
    if missing or unexpected:
        what = [f"{missing[0]} is missing"] if missing else []
        what += [f"{unexpected[0]} is not in the model"] if unexpected else []
        raise QATError(f"state_dict: {' and '.join(what)}. Build the model that it was saved from, with the same names")
    for key, tensor in model.state_dict().items():
        if key in own and isinstance(tensor, Tensor) and tensor.shape != weights[key].shape:
            shapes = f"{tuple(weights[key].shape)}, the model's {tuple(tensor.shape)}"
            raise QATError(f"{key}: has shape {shapes}. Build the model that the state dict was saved from")


def _warn(imported: Imported) -> None:
    if imported.unset:
        warnings.warn(
            f"{', '.join(imported.unset)}: without a range, because there was none or the quantizer is switched off; tensors "
            "pass through unchanged. qat.calibrate(model, loader) gives all sites ranges; importing again sets the old ones",
            stacklevel=3,
        )


def _read(model: nn.Module, path: str, module: nn.Module) -> Source | None:
    owner, _, name = path.rpartition(".")
    weight = getattr(model.get_submodule(owner), "weight", None) if name == "_weight_quantizer" else None
    return read_quantizer(path, module, weight)


def _make_float(owner: nn.Module, undo: ExitStack) -> None:
    """Take the quantizers out of ``owner``; how to put them back goes to ``undo``."""
    cls, children = type(owner), dict(owner._modules)

    def put_back() -> None:
        owner.__class__ = cls
        owner._modules.clear()
        owner._modules.update(children)

    undo.callback(put_back)
    own = {name: child for name, child in children.items() if child is not None and is_tensor_quantizer(child)}
    float_class = _float_class(owner) if set(own) <= {"_input_quantizer", "_weight_quantizer"} else None
    if float_class is None:
        for name, child in own.items():
            owner._modules[name] = nn.Identity().train(child.training)
        return
    package = type(next(iter(own.values()))).__module__.partition(".")[0]
    forward_of = next(base for base in cls.__mro__ if "forward" in vars(base))
    if forward_of.__module__.partition(".")[0] not in (package, "torch"):
        raise QATError(f"{cls.__name__}: has a forward of its own, which its float class {float_class.__name__} would not run")
    for name in own:
        del owner._modules[name]
    owner.__class__ = float_class


def _float_class(module: nn.Module) -> Any:
    """The class of torch that a quantized layer stands for; ``None`` for a module of the model's author."""
    if isinstance(module, _ConvNd):
        return getattr(nn, f"Conv{'Transpose' if module.transposed else ''}{module.weight.ndim - 2}d")
    bases = [cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Module]
    return bases[0] if bases else None
