"""Loading a checkpoint into a Trainer: before callbacks see it, Lightning has loaded the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.quantizer import Quantizer
from ..errors import QATError
from ..support.tensor_files import check_intact
from ..training.checkpoints import CHECKPOINT_KEY, check_same_configs, frozen_by_config, frozen_in, is_site_key
from ..training.ranges import freeze_ranges, frozen_ranges, stale_ranges
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


class IntactCheckpointIO:
    """Reading and writing of checkpoints by another plugin, with a name for those that are damaged.

    Args:
        plugin: Lightning's own ``TorchCheckpointIO``.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read by the plugin.

        Raises:
            QATError: For a local file that :func:`~qat.support.tensor_files.check_intact` refuses.
        """
        if Path(path).is_file():
            check_intact(path)
        return self.plugin.load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write by the plugin."""
        self.plugin.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove by the plugin."""
        self.plugin.remove_checkpoint(path)

    def teardown(self) -> None:
        """Close the plugin."""
        self.plugin.teardown()


def read_intact(trainer: pl.Trainer) -> None:
    """Let the trainer refuse damaged checkpoints by name.

    Other plugins than Lightning's own know the files that they write. No hook comes between the path of a checkpoint and its
    loading.
    """
    strategy: Any = trainer.strategy
    if type(strategy.checkpoint_io) is lightning_of(trainer).plugins.io.TorchCheckpointIO:
        strategy.checkpoint_io = IntactCheckpointIO(strategy.checkpoint_io)


def freeze_stale_ranges(trainer: pl.Trainer) -> Callable[..., None]:
    """A hook for checkpoints without the state of callbacks (``save_weights_only``), which do not tell of frozen ranges."""

    def freeze(module: nn.Module, keys: Any) -> None:
        loaded = _loaded(trainer)
        if loaded and CHECKPOINT_KEY not in loaded:
            freeze_ranges(module, refresh=False, sites=stale_ranges(module))

    return freeze


def frozen_by_checkpoint(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> set[str]:
    """The sites whose ranges were frozen when a checkpoint was saved.

    Raises:
        QATError: In training, if others are frozen here: nothing sets a range free again.
    """
    frozen = set(frozen_in(checkpoint.get(CHECKPOINT_KEY, {}), pl_module))
    if trainer.training and CHECKPOINT_KEY in checkpoint:
        more = sorted(frozen_ranges(pl_module) - frozen_by_config(pl_module) - frozen)
        if more:
            raise QATError(
                f"{more[0]}: its range is frozen here, and moved when the checkpoint was saved. Build the LightningModule "
                "anew to resume from it"
            )
    return frozen


def load_guard(trainer: pl.Trainer) -> Callable[..., None]:
    """A hook that explains a checkpoint whose sites do not fit, where torch would only list its keys.

    Lightning loads the weights before it shows the checkpoint to callbacks.
    """

    def check(module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
        loaded = _loaded(trainer)
        held = {key for key in state_dict if is_site_key(key, state_dict)}
        # Not by its state dict: that may be overridden to hold only what trains.
        modules = module.named_modules(remove_duplicate=False)
        needed = {f"{path}.amax" for path, inner in modules if isinstance(inner, Quantizer)}
        if not loaded or held == needed:
            return
        if not held and CHECKPOINT_KEY not in loaded:
            raise QATError(
                f"{trainer.ckpt_path}: a checkpoint of the float model. Load it into the LightningModule before fit, "
                "without ckpt_path"
            )
        check_same_configs(loaded, module)
        if not held:
            raise QATError(
                f"{trainer.ckpt_path}: holds sites without their ranges. Keep '*.amax' where state_dict or on_save_checkpoint "
                "leaves entries out"
            )

    return check


def _loaded(trainer: pl.Trainer) -> dict[str, Any]:
    """The checkpoint that Lightning is loading at present; empty while a module loads a state dict by itself."""
    return trainer._checkpoint_connector._loaded_checkpoint
