"""The ONNX file as the yardstick: what ONNX Runtime computes in it, and how far rounding alone may move each tensor.

ONNX Runtime runs without its graph optimizations, so every tensor has the value that the file says.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from ..errors import QATError
from ..graph.graph import DQ, Graph
from ..graph.reading import load_model
from ..graph.run import marked, run_model
from . import variants

# They hand values on unchanged: no runtime departs there, and marking their outputs tells nothing new.
_HANDED_ON = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Cast"})


@dataclass(frozen=True)
class Cut:
    """A tensor that can be marked as an output, and the node that computes it.

    Attributes:
        tensor: Name of the tensor.
        node: Name of the node.
        op: Its operator.
        before: The nearest such tensors that it is computed from.
    """

    tensor: str
    node: str
    op: str
    before: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """The Q/DQ pair behind a dequantized tensor: what enters it, and its scale."""

    x: str
    scale: float


class Reference(Graph):
    """An ONNX file with its weights, and what ONNX Runtime computes in it.

    Args:
        path: The file.

    Attributes:
        path: The same as text.

    Raises:
        QATError: If there is no such file, or it is no ONNX graph, or its weights are not beside it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(self.path).is_file():
            raise QATError(f"onnx_path={self.path!r}: no such file. Run qat.export_onnx(model, path, example_inputs) first")
        try:
            model = load_model(self.path)
            super().__init__(model)
        except QATError as error:
            raise QATError(f"onnx_path: not an ONNX file to compare with: {error}") from error
        if not self.nodes or not self.outputs:
            raise QATError(f"onnx_path={self.path!r}: not an ONNX file, or one without a graph")
        if model.functions:
            # What is marked and changed are the nodes inside of them.
            del model.functions[:]
            del model.graph.node[:]
            model.graph.node.extend(self.nodes)

    @property
    def is_half(self) -> bool:
        """Whether the graph itself computes in 16 bits: some float tensor between its nodes is no float32."""
        halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return any(self.element_type(name) in halves for node in self.nodes if node.op_type != "Cast" for name in node.output)

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """The tensors that can be marked, in topological order: float results, and what a Q/DQ pair gives."""
        wanted = {
            name
            for node in self.nodes
            for name in node.output
            if name in self.depends_on_input
            and (name in self.outputs or (self.is_float(name) and node.op_type not in _HANDED_ON))
        }
        return self.cuts_among(wanted)

    def cuts_among(self, wanted: Collection[str]) -> dict[str, Cut]:
        """The tensors ``wanted``, in topological order, and how they depend on each other."""
        found: dict[str, Cut] = {}
        # Of those wanted, the nearest that a tensor comes from: itself if it is one.
        nearest: dict[str, tuple[str, ...]] = {}
        for node in self.nodes:
            before = tuple(dict.fromkeys(cut for name in node.input for cut in nearest.get(name, ())))
            for name in node.output:
                nearest[name] = (name,) if name in wanted else before
                if name in wanted:
                    found[name] = Cut(name, node.name or f"node of {name}", node.op_type, before)
        return found

    def pair(self, tensor: str) -> Pair | None:
        """The Q/DQ pair with one scale that gives ``tensor``, if one does."""
        dequantize = self.producer.get(tensor)
        if dequantize is None or dequantize.op_type != DQ or dequantize.input[1] not in self.constants:
            return None
        quantize = self.quantizer(dequantize)
        scale = numpy_helper.to_array(self.constants[dequantize.input[1]])
        # What moves codes in between changes where they are.
        if quantize is None or quantize.output[0] != dequantize.input[0] or scale.size != 1:
            return None
        return Pair(quantize.input[0], float(scale.reshape(())))

    def run(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """All outputs, and the tensors ``extra``."""
        return self._run(self.model, feeds, extra)

    def run_reversed(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """The same of :func:`qat.verify.variants.reversed_sums`."""
        return self._run(variants.reversed_sums(self), feeds, extra)

    def run_rounded(
        self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = (), *, half: bool, nodes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The same of :func:`qat.verify.variants.rounded`."""
        return self._run(variants.rounded(self, half=half, nodes=nodes), feeds, extra)

    def run_unquantized(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """The same of :func:`qat.verify.variants.unquantized`."""
        return self._run(variants.unquantized(self), feeds, extra)

    def _run(self, model: ModelProto, feeds: Mapping[str, np.ndarray], extra: Collection[str]) -> dict[str, np.ndarray]:
        blame = f"onnx_path={self.path!r}: ONNX Runtime does not run it on these inputs"
        return run_model(marked(model, extra), feeds, blame=blame)
