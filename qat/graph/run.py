"""The ONNX graph as the yardstick: what ONNX Runtime computes in it, and how far rounding alone may move each tensor.

ONNX Runtime runs without its graph optimizations, so every tensor has the value that the file says. Variants of the same
graph tell what is no fault of an engine: one with its sums in another order; one whose results are rounded to fewer bits,
as Winograd and integer kernels do; one whose results are rounded to FP16. A last one, without Q/DQ, tells what INT8 costs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QATError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

Q, DQ = "QuantizeLinear", "DequantizeLinear"
# They hand values on unchanged: no runtime departs there, and marking their outputs tells nothing new.
_HANDED_ON = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Cast"})
# Float32 has 24. Winograd kernels lose some 7 of them; INT8 kernels that add the bias in units of their accumulator
# (scale of the data times scale of the weight) lose up to 10.
KEPT_BITS = 14
_FLOAT32_BITS, _FLOAT16_BITS = 24, 11
_PROTOBUF_LIMIT = 2**31 - 2**20


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
class Site:
    """The pair behind a dequantized tensor: what enters it, and its scale."""

    x: str
    scale: float


def import_onnx() -> tuple[Any, Any]:
    """The packages ``onnx`` and ``onnxruntime``.

    Raises:
        QATError: Naming the one that is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise QATError(f"verify compares with ONNX Runtime and needs the package {error.name!r}; install it") from error
    return onnx, onnxruntime


class Graph:
    """An ONNX file, and what ONNX Runtime computes in it.

    Args:
        path: The file.

    Raises:
        QATError: If there is no such file, or it is no ONNX graph.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        onnx, _ = import_onnx()
        self.path = os.fspath(path)
        if not Path(self.path).is_file():
            raise QATError(f"onnx_path={self.path!r}: no such file. Run qat.export_onnx(model, path, example_inputs) first")
        try:
            self.proto: ModelProto = onnx.load(self.path)
        # What protobuf and the loader of external data raise; the first is no subclass of ValueError.
        except (onnx.checker.ValidationError, _decode_error(), OSError, ValueError) as error:
            raise QATError(f"onnx_path={self.path!r}: not an ONNX file: {error}") from error
        graph = self.proto.graph
        if not graph.node or not graph.output:
            raise QATError(f"onnx_path={self.path!r}: not an ONNX file, or one without a graph")
        self.nodes = list(graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in graph.output]
        self.producer: dict[str, NodeProto] = {output: node for node in self.nodes for output in node.output if output}

    # -- what is where -------------------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type of every tensor that shape inference knows."""
        onnx, _ = import_onnx()
        light = onnx.ModelProto()
        light.CopyFrom(self.proto)
        if light.ByteSize() >= _PROTOBUF_LIMIT:
            # Types do not depend on values, save for those that are shapes, which are short.
            for tensor in light.graph.initializer:
                if len(tensor.raw_data) > 2**16:
                    tensor.raw_data = b""
        values = onnx.shape_inference.infer_shapes(light).graph
        found = {v.name: v.type.tensor_type.elem_type for v in (*values.value_info, *values.input, *values.output)}
        return {**found, **{name: tensor.data_type for name, tensor in self.constants.items()}}

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of every tensor of which shape inference knows it."""
        onnx, _ = import_onnx()
        is_small = self.proto.ByteSize() < _PROTOBUF_LIMIT
        graph = onnx.shape_inference.infer_shapes(self.proto).graph if is_small else self.proto.graph
        return {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in (*graph.value_info, *graph.input)
            if v.type.tensor_type.HasField("shape")
        }

    @cached_property
    def depends_on_input(self) -> frozenset[str]:
        """Tensors that are computed from the graph's inputs."""
        found = {value.name for value in self.inputs}
        for node in self.nodes:
            if any(name in found for name in node.input):
                found.update(node.output)
        return frozenset(found)

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of a floating type."""
        onnx, _ = import_onnx()
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        return self.types.get(name) in floats

    @property
    def is_half(self) -> bool:
        """Whether the graph itself computes in 16 bits: some float tensor between its nodes is no float32."""
        onnx, _ = import_onnx()
        halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        return any(self.types.get(name) in halves for node in self.nodes if node.op_type != "Cast" for name in node.output)

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

    def site(self, tensor: str) -> Site | None:
        """The Q/DQ pair with one scale that gives ``tensor``, if one does."""
        onnx, _ = import_onnx()
        dequantize = self.producer.get(tensor)
        if dequantize is None or dequantize.op_type != DQ or dequantize.input[1] not in self.constants:
            return None
        quantize = self.producer.get(dequantize.input[0])
        scale = onnx.numpy_helper.to_array(self.constants[dequantize.input[1]])
        if quantize is None or quantize.op_type != Q or scale.size != 1:
            return None
        return Site(quantize.input[0], float(scale.reshape(())))

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """All outputs, and the tensors ``extra``."""
        return self._run(self.proto, feeds, extra)

    def run_reversed(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """The same with convolutions and matrix products adding up their terms from last to first."""
        return self._run(self._changed(self._reversed), feeds, extra)

    def run_rounded(
        self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = (), *, half: bool, nodes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The same with every float32 result rounded.

        Args:
            feeds: The inputs.
            extra: Tensors to return besides the outputs.
            half: Round to FP16, the constants and inputs that a node reads included, and what is FP16 already to one bit
                less; otherwise to ``KEPT_BITS`` bits.
            nodes: Names of the nodes whose results are rounded; all by default.
        """
        return self._run(self._changed(lambda node: self._rounded(node, half, nodes)), feeds, extra)

    def _run(self, proto: ModelProto, feeds: Mapping[str, np.ndarray], extra: Collection[str]) -> dict[str, np.ndarray]:
        onnx, runtime = import_onnx()
        marked = onnx.ModelProto()
        marked.CopyFrom(proto)
        names = [*self.outputs, *(name for name in dict.fromkeys(extra) if name not in self.outputs)]
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[len(self.outputs) :])
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        errors = runtime.capi.onnxruntime_pybind11_state
        try:
            with tempfile.TemporaryDirectory() as folder:
                source: Any
                if marked.ByteSize() < _PROTOBUF_LIMIT:
                    source = marked.SerializeToString()
                else:
                    source = str(Path(folder) / "marked.onnx")
                    onnx.save(marked, source, save_as_external_data=True, location="marked.data")
                session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except (
            errors.Fail,
            errors.InvalidArgument,
            errors.InvalidGraph,
            errors.NotImplemented,
            errors.RuntimeException,
        ) as error:
            raise QATError(f"onnx_path={self.path!r}: ONNX Runtime does not run it on these inputs: {error}") from error

    def run_unquantized(self, feeds: Mapping[str, np.ndarray], extra: Collection[str] = ()) -> dict[str, np.ndarray]:
        """The same without its Q/DQ pairs; weights that are stored as codes stay rounded."""
        return self._run(self._changed(self._unquantized), feeds, extra)

    # -- variants ------------------------------------------------------------------------------------------------------

    def _changed(self, change: Any) -> ModelProto:
        """A copy in which each node is replaced by those that ``change`` makes of it."""
        onnx, _ = import_onnx()
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        del copy.graph.node[:]
        copy.graph.node.extend(new for node in self.nodes for new in change(node))
        return copy

    def _reversed(self, node: NodeProto) -> Iterator[NodeProto]:
        onnx, _ = import_onnx()
        axes = self._summed(node)
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        for i, (axis, groups, size) in enumerate(axes):
            prefix = f"{node.output[0]}/reversed{i}"
            changed.input[i] = prefix
            if groups == 1:
                for key, value in (("starts", -1), ("ends", -(2**62)), ("axes", axis), ("steps", -1)):
                    yield _constant(f"{prefix}/{key}", np.array([value], np.int64))
                names = [f"{prefix}/{key}" for key in ("starts", "ends", "axes", "steps")]
                yield onnx.helper.make_node("Slice", [node.input[i], *names], [prefix], name=prefix)
            else:
                order = np.arange(groups * size).reshape(groups, size)[:, ::-1].reshape(-1)
                yield _constant(f"{prefix}/order", order.astype(np.int64))
                yield onnx.helper.make_node("Gather", [node.input[i], f"{prefix}/order"], [prefix], name=prefix, axis=axis)
        yield changed

    def _unquantized(self, node: NodeProto) -> Iterator[NodeProto]:
        onnx, _ = import_onnx()
        quantize = self.producer.get(node.input[0]) if node.op_type == DQ else None
        if quantize is None or quantize.op_type != Q:
            yield node
        else:
            yield onnx.helper.make_node("Identity", [quantize.input[0]], [node.output[0]], name=node.name)

    def _summed(self, node: NodeProto) -> list[tuple[int, int, int]]:
        """For both operands of a product: the axis that is summed over, its number of groups and their size."""
        given = _attributes(node)
        if node.op_type in ("Conv", "ConvTranspose"):
            weight = self._constant_shape(node.input[1])
            groups = int(given.get("group", 1))
            if weight is None:
                return []
            if node.op_type == "Conv":
                return [(1, groups, weight[1]), (1, 1, weight[1])] if weight[1] > 1 else []
            size = weight[0] // groups
            return [(1, groups, size), (0, groups, size)] if size > 1 else []
        if node.op_type == "Gemm":
            return [(0 if given.get("transA") else 1, 1, 0), (1 if given.get("transB") else 0, 1, 0)]
        if node.op_type == "MatMul":
            shape = self._constant_shape(node.input[1])
            rank = len(shape) if shape is not None else self.ranks.get(node.input[1])
            return [(-1, 1, 0), (-1 if rank == 1 else -2, 1, 0)] if rank else []
        return []

    def _constant_shape(self, name: str) -> list[int] | None:
        """Shape of a constant, seen through its Q/DQ pair."""
        while name not in self.constants:
            node = self.producer.get(name)
            if node is None or node.op_type not in (Q, DQ, "Cast", "Identity"):
                return None
            name = node.input[0]
        return list(self.constants[name].dims)

    def _rounded(self, node: NodeProto, half: bool, chosen: Collection[str] | None) -> Iterator[NodeProto]:
        onnx, _ = import_onnx()
        if not self.is_rounded(node, chosen):
            yield node
            return
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        float32 = onnx.TensorProto.FLOAT
        for i, name in enumerate(node.input if half else ()):
            producer = self.producer.get(name)
            # What comes from a rounded node is rounded already; products of codes are exact in any precision.
            is_exact = producer is not None and (producer.op_type == DQ or self.is_rounded(producer, chosen))
            if self.types.get(name) == float32 and not is_exact:
                changed.input[i] = f"{node.output[0]}/operand{i}"
                yield from _to_half_and_back(name, changed.input[i])
        kinds = (float32, onnx.TensorProto.FLOAT16) if half else (float32,)
        results = [i for i, name in enumerate(node.output) if name and self.types.get(name) in kinds]
        for i in results:
            changed.output[i] = f"{node.output[i]}/exact"
        yield changed
        for i in results:
            is_float32 = self.types[node.output[i]] == float32
            make = _to_fewer_bits if not half else _to_half_and_back if is_float32 else _to_fewer_bits_of_half
            yield from make(changed.output[i], node.output[i])

    def is_rounded(self, node: NodeProto, chosen: Collection[str] | None = None) -> bool:
        """Whether a node computes anew in float: codes are exact in any precision, and their scales stay float32."""
        if node.op_type in (Q, DQ, "Constant", "Cast", "Shape", "Identity") or node.output[0] not in self.depends_on_input:
            return False
        return chosen is None or node.name in chosen


def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    return DecodeError


def _attributes(node: NodeProto) -> dict[str, Any]:
    onnx, _ = import_onnx()
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _constant(name: str, value: np.ndarray) -> NodeProto:
    onnx, _ = import_onnx()
    return onnx.helper.make_node("Constant", [], [name], name=name, value=onnx.numpy_helper.from_array(value, name))


def _to_half_and_back(source: str, target: str) -> Iterable[NodeProto]:
    onnx, _ = import_onnx()
    make, half = onnx.helper.make_node, f"{target}/half"
    return [
        make("Cast", [source], [half], name=half, to=onnx.TensorProto.FLOAT16),
        make("Cast", [half], [target], name=f"{target}/float", to=onnx.TensorProto.FLOAT),
    ]


def _to_fewer_bits_of_half(source: str, target: str) -> Iterable[NodeProto]:
    """One bit less than FP16's 11: two FP16 kernels differ in the last one."""
    onnx, _ = import_onnx()
    make, wide, narrow = onnx.helper.make_node, f"{target}/wide", f"{target}/narrow"
    return [
        make("Cast", [source], [wide], name=wide, to=onnx.TensorProto.FLOAT),
        *_to_fewer_bits(wide, narrow, _FLOAT16_BITS - 1),
        make("Cast", [narrow], [target], name=f"{target}/half", to=onnx.TensorProto.FLOAT16),
    ]


def _to_fewer_bits(source: str, target: str, kept: int = KEPT_BITS) -> Iterable[NodeProto]:
    """Veltkamp's splitting (Dekker 1971, section 5): c = (2^s + 1) x, and c - (c - x) is x rounded to 24 - s bits."""
    onnx, _ = import_onnx()
    make = onnx.helper.make_node
    factor, product, rest = f"{target}/factor", f"{target}/product", f"{target}/rest"
    return [
        _constant(factor, np.array(2 ** (_FLOAT32_BITS - kept) + 1, np.float32)),
        make("Mul", [source, factor], [product], name=product),
        make("Sub", [product, source], [rest], name=rest),
        make("Sub", [product, rest], [target], name=f"{target}/rounded"),
    ]
