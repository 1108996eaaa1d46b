"""What quantization does to the output of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from ..errors import QATError
from .layers import Layer, analysing, each_batch
from .metrics import Distance, floats
from .results import Result, make_table


@dataclass(frozen=True)
class LayerError:
    """The output of one layer, quantized against float.

    Attributes:
        path: Module path.
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"add"``, ``"gate"`` or ``"pool"``.
        sqnr: Signal-to-quantization-noise ratio in dB with only this layer quantized, on the inputs of the float model.
        cosine: Cosine similarity, likewise.
        sqnr_accumulated: SQNR in dB in the quantized model: with the errors of the layers before it.
        cosine_accumulated: Cosine similarity, likewise.
    """

    path: str
    kind: str
    sqnr: float
    cosine: float
    sqnr_accumulated: float
    cosine_accumulated: float


@dataclass(frozen=True)
class LayerErrors(Result):
    """What :func:`layer_errors` found; prints as a table.

    Attributes:
        layers: In the order in which they run.
        output_sqnr: SQNR of the model's output in dB.
        output_cosine: Its cosine similarity.
    """

    layers: tuple[LayerError, ...]
    output_sqnr: float
    output_cosine: float

    def table(self) -> Table:
        rows = [
            (e.path, e.kind, f"{e.sqnr:.1f}", f"{e.cosine:.5f}", f"{e.sqnr_accumulated:.1f}", f"{e.cosine_accumulated:.5f}")
            for e in self.layers
        ]
        caption = f"Output of the model: SQNR {self.output_sqnr:.1f} dB, cosine {self.output_cosine:.5f}"
        numbers = ("SQNR dB", "cosine", "SQNR dB, all", "cosine, all")
        return make_table("Outputs of the layers, quantized against float", ("layer", "kind"), numbers, rows, caption)


def layer_errors(model: nn.Module, batches: Iterable[Any]) -> LayerErrors:
    """Compare the output of every quantized layer with that of the float model: alone, and with all others quantized.

    Costs about three evaluations, whatever the number of layers: the float model, each layer once more on its float inputs,
    and the quantized model. Holds the layers' outputs of one batch. The model is afterwards what it was.

    Args:
        model: Prepared and calibrated. Sites that are off stay off.
        batches: As for ``qat.calibrate``: tensors, mappings, or tuples and lists ``(inputs, target, ...)``.

    Returns:
        One entry for each layer that ran.

    Raises:
        QATError: If no site quantizes, the batches are empty, or a layer runs another number of times, or on tensors of another
            size, once the model quantizes. Of batches that do not fit, the model's own error.

    Example:
        >>> import qat, torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [torch.randn(32, 4)]
        >>> _ = qat.prepare(model), qat.calibrate(model, data, progress=False)
        >>> [error.path for error in layer_errors(model, data).layers]
        ['0', '2']
    """
    alone: dict[str, Distance] = {}
    accumulated: dict[str, Distance] = {}
    output = Distance()
    with analysing(model) as bench:
        for batch in each_batch(batches):
            kept: dict[str, list[list[Tensor]]] = {}

            def keep(layer: Layer, run_alone: Callable[[], Any], out: Any, kept: Any = kept) -> None:
                # A copy: an activation behind the layer may change its output in place.
                kept.setdefault(layer.path, []).append([tensor.clone() for tensor in floats(out)])
                alone.setdefault(layer.path, Distance()).add(out, run_alone())

            def compare(layer: Layer, run_alone: Callable[[], Any], out: Any, kept: Any = kept) -> None:
                if not kept.get(layer.path):
                    raise _rerouted(layer.path)
                reference = kept[layer.path].pop(0)
                if [tensor.shape for tensor in reference] != [tensor.shape for tensor in floats(out)]:
                    raise _rerouted(layer.path)
                accumulated.setdefault(layer.path, Distance()).add(reference, out)

            with bench.watching(keep):
                reference = bench.run(batch, ())
            with bench.watching(compare):
                output.add(reference, bench.run(batch, bench.layers.keys()))
            for path, outputs in kept.items():
                if outputs:
                    raise _rerouted(path)
    found = []
    for path, one in alone.items():
        every = accumulated[path]
        kind = bench.layers[path].kind
        found.append(LayerError(path, kind, one.sqnr, one.cosine, every.sqnr, every.cosine))
    return LayerErrors(tuple(found), output.sqnr, output.cosine)


def _rerouted(path: str) -> QATError:
    return QATError(
        f"{path}: runs another number of times in the quantized model than in float, or on tensors of another size: which "
        "layers run depends on the data. Pass batches in which the routes agree, or leave what chooses the route in float"
    )
