"""Checkpoints of quantized LightningModules, loaded without a Trainer."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..core.config import QuantConfig
from ..errors import QATError
from ..preparation import prepare
from ..support.tensor_files import read_tensors
from ..training.checkpoints import CHECKPOINT_KEY, changed_settings, frozen_in, is_site_key
from ..training.ranges import freeze_ranges, stale_ranges
from .targets import prepare_module

if TYPE_CHECKING:
    import lightning.pytorch as pl

Module = TypeVar("Module", bound="pl.LightningModule")


def load_from_checkpoint(
    module_class: type[Module],
    path: str | os.PathLike[str],
    *,
    quantized: bool = True,
    config: QuantConfig | Mapping[str, Any] | None = None,
    map_location: Any = None,
    **arguments: Any,
) -> Module:
    """A LightningModule with the weights and sites of a checkpoint that was saved during quantization-aware training.

    Lightning's own ``load_from_checkpoint`` builds the float model, in which a quantized checkpoint finds unexpected keys.

    Args:
        module_class: The class of the LightningModule. It is built with the hyper-parameters in the checkpoint, as by
            Lightning, and with ``arguments``.
        path: The checkpoint. Read with ``weights_only=True``: nothing in it is executed.
        quantized: With false, the float model with the trained weights, without sites.
        config: The settings of the sites, only where the checkpoint does not hold them
            (``ModelCheckpoint(save_weights_only=True)``). The defaults if ``None``.
        map_location: As in ``torch.load``.
        arguments: Arguments of ``module_class``, instead of those in the checkpoint.

    Returns:
        The module in training mode. A checkpoint of the float model gives the float model.

    Raises:
        QATError: If the file is no checkpoint or damaged, if ``config`` is not the one in the checkpoint, or if the weights
            do not fit the module.

    Example::

        module = qat.load_from_checkpoint(LitModel, "best.ckpt")
        qat.export_onnx(module.model, "model.onnx", images)
    """
    checkpoint = _read(path)
    state = checkpoint["state_dict"]
    sites = {key for key in state if is_site_key(key, state)}
    saved = checkpoint.get(CHECKPOINT_KEY, {}).get("configs")
    given = QuantConfig.from_dict(config) if isinstance(config, Mapping) else config
    for name, settings in (saved or {}).items():
        if given is not None and changed_settings(name, QuantConfig.from_dict(settings), given):
            raise QATError(f"config: {os.fspath(path)} holds its own settings, which are others. Leave config out")

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        # Before sites make another one of it.
        self.__class__ = module_class
        if not quantized:
            checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key not in sites}
        elif saved:
            # With several sub-models, nobody knows whose it is.
            example = getattr(self, "example_input_array", None) if len(saved) == 1 else None
            for name, settings in saved.items():
                prepare(_child(self, name, path), QuantConfig.from_dict(settings), example_inputs=example)
        elif sites:
            if given is None:
                # Ranges of other formats have the same names and shapes.
                warnings.warn(
                    f"{os.fspath(path)} does not hold the settings of its sites: the defaults are assumed. Pass config=",
                    stacklevel=2,
                )
            prepare_module(self, given)
        self.on_load_checkpoint(checkpoint)

    saved_arguments = checkpoint.get(module_class.CHECKPOINT_HYPER_PARAMS_KEY)
    takes_any = inspect.getfullargspec(module_class.__init__).varkw is not None
    if isinstance(saved_arguments, Mapping) and "_class_path" in saved_arguments and not takes_any:
        # The subclass that LightningCLI was told to train. Lightning does not pass it to a class that has no argument for it,
        # but first refuses it unless it names a subclass of the one that is loaded: the class below has none.
        arguments["_class_path"] = None

    # A class for this call alone: Lightning shows the checkpoint to the module before it loads the weights.
    loading: Any = type(module_class.__name__, (module_class,), {"on_load_checkpoint": on_load_checkpoint})
    loading.__module__, loading.__qualname__ = module_class.__module__, module_class.__qualname__
    try:
        module = loading.load_from_checkpoint(path, map_location=map_location, weights_only=True, **arguments)
    except RuntimeError as error:
        hint = "" if saved or not sites else ". It does not hold the settings of its sites: pass config="
        raise QATError(f"{os.fspath(path)}: does not fit {module_class.__name__}{hint}: {error}") from error
    settings = checkpoint.get(CHECKPOINT_KEY)
    if quantized:
        freeze_ranges(module, refresh=False, sites=stale_ranges(module) if settings is None else frozen_in(settings, module))
    return module


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    checkpoint = read_tensors(path, remedy="Pass a checkpoint of a LightningModule", mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise QATError(f"{os.fspath(path)}: no checkpoint of a LightningModule: it has no state_dict")
    if not isinstance(checkpoint.get(CHECKPOINT_KEY, {}), dict):
        raise QATError(f"{os.fspath(path)}: damaged: its entry {CHECKPOINT_KEY!r} is no dictionary")
    return checkpoint


def _child(module: pl.LightningModule, name: str, path: str | os.PathLike[str]) -> torch.nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise QATError(f"{os.fspath(path)}: holds sites of {name!r}, which {type(module).__name__} does not have") from error
