"""From a PyTorch model to an ONNX graph in which every call of a site is one placeholder node.

While exporting, every site calls one opaque operator, which torch's exporter carries through. :mod:`.pairs` then replaces the
placeholders: names, scales, axes and zero-points are under our control, whatever the exporter's habits.
"""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.numerics import INT8
from ..core.quantizer import quantizers
from ..errors import QATError
from ..support.inputs import tensors
from . import pairs as graph
from .program import rewrite
from .state import SCALE


def parameter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of ``forward``'s parameters, one a tensor."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    names = []
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            names += [key for key, item in value.items() for _ in tensors(item)]
        else:
            leaves = tensors(value)
            names += [name] if len(leaves) == 1 else [f"{name}.{i}" for i in range(len(leaves))]
    return names


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int,
    dynamic_batch: bool,
    input_names: list[str],
    output_names: list[str],
    verbose: bool,
) -> onnx.ModelProto:
    """Trace and convert; quantizers become ``qat::FakeQuantize`` nodes, numbered in the order of their calls."""
    dynamic = _Dynamic(args, kwargs, dynamic_batch)
    shapes = dynamic.shapes and _by_parameter(model, dynamic)
    try:
        program = torch.export.export(model, dynamic.args, dynamic.kwargs, dynamic_shapes=shapes, strict=False)
    except RuntimeError as error:
        hint = " If it fixes the batch size, export with dynamic_batch=False." if dynamic_batch else ""
        raise QATError(f"model: torch.export cannot trace it.{hint}\n{error}") from error
    rewrite(program, opset)
    calls = itertools.count()

    def translate(x: Any, scale: Any, axis: int | None = None, fmt: str = INT8.name) -> Any:
        return graph.PLACEHOLDER(x, scale, call=next(calls), **({} if axis is None else {"axis": axis}))

    try:
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table={torch.ops.qat.fake_quantize.default: translate},
            optimize=False,
            verbose=verbose,
        )
    except torch.onnx.OnnxExporterError as error:
        raise QATError(f"model: torch cannot express it in ONNX opset {opset}:\n{error}") from error
    assert converted is not None
    canonical = {id(site): path for path, site in quantizers(model)}
    # Before anything merges equal scales: afterwards a scale no longer tells its site.
    for node in converted.model.graph:
        scale = node.inputs[1] if node.domain == graph.DOMAIN else None
        if scale is not None and scale.name is not None:
            owner = model.get_submodule(scale.name.removesuffix("." + SCALE))
            node.attributes.add(onnxscript.ir.AttrString("site", canonical[id(owner)]))
    converted.optimize()
    proto = converted.model_proto
    _name_batch(proto)
    return proto


class _Dynamic:
    """Choose the dimensions that stay open, and inputs that do not tempt the tracer to bake them in."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> None:
        first = tensors((args, kwargs))[0]
        self.size = first.shape[0] if dynamic_batch and first.ndim else None
        if self.size == 0:
            raise QATError("example_inputs: a batch without samples, from which no open batch can be told. Pass one sample")
        self.args, self.kwargs = pytree.tree_map(self._at_least_two, (args, kwargs))
        self.shapes = None if self.size is None else pytree.tree_map(self._shape, (args, kwargs))

    def _is_batched(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.size

    def _at_least_two(self, leaf: Any) -> Any:
        # A dimension of size 1 is always taken for a constant.
        return torch.cat([leaf, leaf]) if self._is_batched(leaf) and self.size == 1 else leaf

    def _shape(self, leaf: Any) -> Any:
        # Not a named Dim: that demands every size up to infinity, and CUDA kernels have limits such as 65535.
        return {0: torch.export.Dim.DYNAMIC} if self._is_batched(leaf) else None


def _by_parameter(model: nn.Module, dynamic: _Dynamic) -> dict[str, Any]:
    args, kwargs = dynamic.shapes  # type: ignore[misc]
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _name_batch(proto: onnx.ModelProto) -> None:
    """Call the open dimension ``batch`` where the exporter gave it a symbol of its own."""
    values = (*proto.graph.input, *proto.graph.output)
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    symbols = {dim.dim_param for dim in dims if dim.dim_param.isidentifier()}
    for dim in dims:
        for symbol in symbols:
            dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)
