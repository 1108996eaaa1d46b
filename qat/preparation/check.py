"""Models that cannot be prepared, and the remedy."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..errors import QATError
from ..nn.attention import projections


def check_model(model: nn.Module) -> None:
    """Refuse wrapped, compiled, scripted, lazy and meta-device models.

    Raises:
        QATError: Names the module and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise QATError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    for path, module in model.named_modules():
        where = path or "the model"
        name = type(module).__name__
        if isinstance(module, _wrappers()):
            raise QATError(f"{where} is wrapped by {name}: prepare the model first, then wrap it")
        if isinstance(module, _compiled()):
            raise QATError(f"{where} is compiled: prepare the original (model._orig_mod), then call torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise QATError(f"{where} is a TorchScript module ({name}): prepare the Python model it was made from")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise QATError(f"{where} is a lazy {name} without shapes yet: run one forward pass first")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise QATError(f"{path} is on the meta device and has no values: load the weights first, then prepare")


def check_layer(path: str, module: nn.Module) -> None:
    """Refuse a layer whose weight is recomputed from other tensors.

    Raises:
        QATError: Names the layer and the remedy.
    """
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise QATError(
            f"{path}: {names} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations(module, name) "
            "first, or leave the layer in float with a rule (quantize: false)"
        )
    weights = projections(module).values() if isinstance(module, nn.MultiheadAttention) else [module.weight]
    if not all(isinstance(w, nn.Parameter) for w in weights):
        raise QATError(
            f"{path}: its weight is recomputed before each forward (weight_norm, spectral_norm, pruning); make it "
            "permanent first (remove_weight_norm, remove_spectral_norm, prune.remove), or leave the layer in float "
            "with a rule (quantize: false)"
        )


def _wrappers() -> tuple[type, ...]:
    found: list[type] = [nn.DataParallel, nn.parallel.DistributedDataParallel]
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        found += [FullyShardedDataParallel, FSDPModule]
    return tuple(found)


def _compiled() -> tuple[type, ...]:
    # torch._dynamo takes seconds to import; a compiled model has imported it already.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return (frames.OptimizedModule,) if frames else ()
