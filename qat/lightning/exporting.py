"""The ONNX file that ``QATCallback(export=...)`` writes when ``fit`` ends."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import QATError
from ..export import export_onnx
from ..support.inputs import call
from ..support.modes import looking_at
from ..training.checkpoints import reports
from .batches import ERRORS_OF_A_FORWARD
from .package import lightning_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


def export_arguments(pl_module: pl.LightningModule, given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model to export, and the arguments of :func:`qat.export_onnx`: what is wrong with them must be said before training.

    Raises:
        QATError: If there are several models, no inputs, or no folder to write into.
    """
    paths = list(reports(pl_module))
    if len(paths) != 1:
        raise QATError(f"export: {len(paths)} prepared sub-models ({', '.join(paths)}): name one by target=")
    options = {"example_inputs": getattr(pl_module, "example_input_array", None), **given}
    if options["example_inputs"] is None:
        raise QATError(
            "export: set example_input_array in the LightningModule, or pass export={'path': ..., 'example_inputs': ...}"
        )
    folder = Path(options["path"]).parent
    if not folder.is_dir():
        raise QATError(f"export: {folder} is no folder to write {Path(options['path']).name} into. Make it first")
    return pl_module.get_submodule(paths[0]), options


def check_export(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Mapping[str, Any]) -> None:
    """Run the model on the inputs that it is to be exported with.

    Raises:
        QATError: If it cannot be run on them.
    """
    utilities = lightning_of(trainer).utilities
    model, options = export_arguments(pl_module, given)
    inputs = trainer.precision_plugin.convert_input(utilities.move_data_to_device(options["example_inputs"], pl_module.device))
    try:
        forward = trainer.precision_plugin.forward_context()
        with looking_at(model, keep_random=True), forward:
            call(model, inputs)
    except ERRORS_OF_A_FORWARD as error:
        raise QATError(
            f"export: the model cannot be run on example_inputs: {error}. Pass export={{'path': ..., 'example_inputs': "
            "...}} with what the model itself takes, which may be other than what the LightningModule takes"
        ) from error


def export_at_the_end(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Mapping[str, Any]) -> None:
    """Write the file in the first process; the others wait."""
    utilities = lightning_of(trainer).utilities
    if trainer.is_global_zero:
        model, options = export_arguments(pl_module, given)
        inputs = utilities.move_data_to_device(options.pop("example_inputs"), pl_module.device)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            # Of bf16-true: files are float32 between Q/DQ.
            model = copy.deepcopy(model).float()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Lightning keeps no checkpoints then, and a good file may be there.
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / Path(options.pop("path")).name
                export_onnx(model, path, example_inputs=inputs, **options)
            utilities.rank_zero_info("fast_dev_run: the export works; its file is not kept")
        else:
            export_onnx(model, example_inputs=inputs, **options)
    trainer.strategy.barrier("qat.export")
