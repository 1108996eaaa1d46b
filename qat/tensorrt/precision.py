"""Which layers of a network may or must compute in which type."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import QATError
from .calibrators import Calibrator
from .context import dtype_of
from .runtime import Runtime

HALF, BF16 = "float16", "bfloat16"


@dataclass(frozen=True)
class Types:
    """What a parsed graph holds."""

    dtypes: frozenset[str]
    quantized: bool

    @classmethod
    def of(cls, trt: Any, network: Any) -> Types:
        dtypes, quantized = set(), False
        for layer in layers_of(network):
            quantized |= layer.type == trt.LayerType.DEQUANTIZE
            dtypes |= {str(dtype_of(layer.get_output(i).dtype)) for i in range(layer.num_outputs)}
        return cls(frozenset(dtypes), quantized)


def layers_of(network: Any) -> Iterator[Any]:
    """The layers of a network, in its order."""
    return (network.get_layer(i) for i in range(network.num_layers))


def set_flag(config: Any, flag: Any, on: bool) -> None:
    """Set or clear a builder flag."""
    if on:
        config.set_flag(flag)
    else:
        config.clear_flag(flag)


def set_precisions(
    runtime: Runtime,
    config: Any,
    strong: bool,
    types: Types,
    *,
    fp16: bool | None,
    bf16: bool | None,
    int8: bool | None,
    calibrator: Calibrator | None,
) -> None:
    """Set the builder's precision flags, or check that the graph's types are those asked for."""
    if types.quantized and calibrator is not None:
        raise QATError("calibrator: the graph holds Q/DQ, whose scales TensorRT takes. Leave the calibrator out")
    if types.quantized and int8 is False:
        raise QATError("int8=False: the graph holds Q/DQ. Export the float model instead")
    if int8 and not types.quantized and calibrator is None:
        raise QATError("int8=True: the graph holds no Q/DQ. Export a model that went through qat.prepare and qat.calibrate")
    if strong:
        for name, asked, dtype in (("fp16", fp16, HALF), ("bf16", bf16, BF16)):
            if asked is not None and asked != (dtype in types.dtypes):
                holds = "holds" if dtype in types.dtypes else "holds no"
                precision = name if asked else "fp32"
                raise QATError(
                    f"{name}={asked}: {runtime.title} computes in the graph's types here, and the graph {holds} {dtype}. "
                    f'Export with qat.export_onnx(..., precision="{precision}")'
                )
        return
    flag = runtime.module.BuilderFlag
    if bf16 and not hasattr(flag, "BF16"):
        raise QATError(f"bf16=True: {runtime.title} has no BF16. Use fp16=True")
    set_flag(config, flag.FP16, fp16 is None or fp16)
    set_flag(config, flag.INT8, types.quantized or calibrator is not None)
    if bf16:
        set_flag(config, flag.BF16, True)


def keep_float(runtime: Runtime, config: Any, network: Any, strong: bool, names: Sequence[str]) -> None:
    """Keep the layers of the ONNX nodes ``names`` in float32."""
    if strong:
        raise QATError(
            f"fp32_layers: {runtime.title} computes in the graph's types here. Export those nodes in float32 "
            '(qat.export_onnx(..., precision="fp32") does so for all)'
        )
    trt: Any = runtime.module
    known = {layer.name: layer for layer in layers_of(network)}
    for name in names:
        found = [layer for layer in known.values() if _is_of(layer, name)]
        if not found:
            near = difflib.get_close_matches(name, list(known), n=3)
            raise QATError(f"fp32_layers: the network has no node {name!r}; the nearest are {', '.join(near) or 'none'}")
        for layer in found:
            layer.precision = trt.DataType.FLOAT
            for i in range(layer.num_outputs):
                if layer.get_output(i).dtype in (trt.DataType.FLOAT, trt.DataType.HALF):
                    layer.set_output_type(i, trt.DataType.FLOAT)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def attention_in_half(trt: Any, config: Any, network: Any, fp32_layers: Sequence[str] = ()) -> None:
    """Ask for FP16 where attention is computed: products of two activations, what scales their operands, and softmax.

    Beside Q/DQ, TensorRT 8.6 leaves them in the graph's float32 and does not take its fused kernel for attention, however
    much faster FP16 would be (measured: benchmarks/RESULTS.md). What a caller keeps in float32 stays so.
    """
    edges = _Edges(trt, network)
    found: dict[str, Any] = {}
    pending = [layer for layer in layers_of(network) if edges.is_product_of_activations(layer)]
    while pending:
        layer = pending.pop()
        if layer.name not in found:
            found[layer.name] = layer
            pending += [near for near in edges.around(layer) if edges.belongs_to_attention(near)]
    kind = trt.LayerType
    asked = [layer for layer in found.values() if layer.type in (kind.MATRIX_MULTIPLY, kind.SOFTMAX, kind.ELEMENTWISE)]
    asked = [layer for layer in asked if not any(_is_of(layer, name) for name in fp32_layers)]
    for layer in asked:
        layer.precision = trt.DataType.HALF
    # Both flags at once would leave open which of them counts.
    if asked and not fp32_layers:
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)


class _Edges:
    """A network's layers by the tensors between them."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt, self._kind = trt, trt.LayerType
        self._producer: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = {}
        for layer in layers_of(network):
            for i in range(layer.num_outputs):
                self._producer[layer.get_output(i).name] = layer
            for tensor in self._inputs(layer):
                self._readers.setdefault(tensor.name, []).append(layer)

    def around(self, layer: Any) -> Iterator[Any]:
        """The layers that write its inputs and read its outputs."""
        for tensor in self._inputs(layer):
            if tensor.name in self._producer:
                yield self._producer[tensor.name]
        for i in range(layer.num_outputs):
            yield from self._readers.get(layer.get_output(i).name, ())

    def is_product_of_activations(self, layer: Any) -> bool:
        fixed = (self._kind.CONSTANT, self._kind.DEQUANTIZE)
        return (
            layer.type == self._kind.MATRIX_MULTIPLY
            and layer.get_output(0).dtype in (self._trt.DataType.FLOAT, self._trt.DataType.HALF)
            and not any(self._origin(tensor) in fixed for tensor in self._inputs(layer))
        )

    def belongs_to_attention(self, layer: Any) -> bool:
        """Whether a layer next to one of attention's is another: a product, softmax, a constant factor, what moves values."""
        if layer.type == self._kind.ELEMENTWISE:
            layer.__class__ = self._trt.IElementWiseLayer  # the bindings hand out the base class
            scales = layer.op == self._trt.ElementWiseOperation.PROD
            return scales and any(self._origin(tensor) == self._kind.CONSTANT for tensor in self._inputs(layer))
        if layer.type in (self._kind.SHUFFLE, self._kind.SLICE, self._kind.GATHER, self._kind.SOFTMAX):
            return self._origin(layer.get_input(0)) not in (self._kind.CONSTANT, self._kind.DEQUANTIZE)
        return self.is_product_of_activations(layer)

    def _inputs(self, layer: Any) -> list[Any]:
        tensors = (layer.get_input(i) for i in range(layer.num_inputs))
        return [tensor for tensor in tensors if tensor is not None]

    def _origin(self, tensor: Any) -> Any:
        """Type of the layer that computes a tensor, before what reshapes and transposes it; None for an input."""
        layer = self._producer.get(tensor.name)
        while layer is not None and layer.type == self._kind.SHUFFLE:
            layer = self._producer.get(layer.get_input(0).name)
        return None if layer is None else layer.type


def _is_of(layer: Any, node: str) -> bool:
    """Whether a layer comes from an ONNX node: by its metadata, where the version has them, else by its name."""
    return layer.name == node or f"[ONNX Layer: {node}]" in getattr(layer, "metadata", "")
