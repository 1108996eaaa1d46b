"""PyTorch's side of a verification; the only module here that needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import QATError
from ..export.inputs import call_arguments, output_names, run
from ..nn.add import fusing_adds
from ..support.inputs import tensors
from ..support.modes import looking_at
from .differences import TIE, ParityReport
from .onnx_parity import _float32, parity
from .reference import Reference


class Model:
    """A fake-quantizing model, run in the way that ``qat.parity`` does.

    Args:
        model: The model.
        graph: The graph of the file that was made of it.
    """

    def __init__(self, model: nn.Module, graph: Reference) -> None:
        self.model, self.graph = model, graph
        self.fuse_adds = graph.metadata.get("qat.fuse_adds") == "true"
        first = next(model.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")

    def outputs(self, inputs: Any, argument: str) -> dict[str, np.ndarray]:
        """The outputs, under the names that the graph gives them."""
        args, kwargs = call_arguments(self.on_device(inputs), argument)
        with looking_at(self.model), fusing_adds(self.model, self.fuse_adds), _float32():
            output = run(self.model, args, kwargs, argument)
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors(output)]
        if len(arrays) != len(self.graph.outputs):
            count, found = len(self.graph.outputs), output_names(output)
            raise QATError(f"onnx_path={self.graph.path!r} has {count} outputs, the model {len(arrays)}: {found}")
        return dict(zip(self.graph.outputs, arrays, strict=True))

    def parity(self, inputs: Any, *, segments: bool = False) -> ParityReport:
        """``qat.parity`` of the model and the file."""
        return parity(self.model, self.graph.path, self.on_device(inputs), segments=segments)

    def first_site(self, inputs: Any) -> str | None:
        """The first site, in the order of the graph, at which the file computes something else than PyTorch.

        Each part between two sites is fed PyTorch's own input to it, so that no earlier difference shows.
        """
        report = self.parity(inputs, segments=True)
        wrong = [
            segment.site
            for segment in report.segments
            if (segment.differing if segment.is_weight else segment.max_difference > 1)
            or (segment.differing and segment.tie_distance > TIE)
        ]
        order = {node.name.rpartition("/")[0]: i for i, node in enumerate(self.graph.nodes)}
        return min(wrong, key=lambda site: order.get(site, len(order)), default=None)

    def on_device(self, inputs: Any) -> Any:
        """Arrays as tensors, and all of them where the model is."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                leaf = torch.from_numpy(np.ascontiguousarray(leaf))
            return leaf.to(self.device) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(move, inputs)
