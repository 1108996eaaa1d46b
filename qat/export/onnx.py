"""``export_onnx``: a calibrated model to an ONNX file with QuantizeLinear/DequantizeLinear pairs.

While exporting, every site calls one opaque operator. torch's exporter carries it through as a placeholder node, which
:mod:`.pairs` then replaces: names, scales, axes and zero-points are under our control, whatever the exporter's habits.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.numerics import INT8
from ..core.quantizer import is_prepared, quantizers
from ..errors import QATError
from ..graph import halves, retype
from ..graph import opset as opsets
from ..graph import precision as precisions
from ..graph.check import check_onnx
from ..support.inputs import tensors
from . import pairs as graph
from .inputs import call_arguments, graph_feeds, output_names, run
from .program import rewrite
from .state import SCALE, exporting

OPSETS = range(17, 25)
DEFAULT_OPSET = 19
_PROTOBUF_LIMIT = 2**31


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    opset: int | None = None,
    precision: str = "fp32",
    dynamic_batch: bool = True,
    external_data: bool = False,
    int8_weights: bool = False,
    fuse_adds: bool = False,
    half_io: bool = False,
    half_scales: bool = False,
    fp32_nodes: Sequence[str] = (),
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verbose: bool = False,
) -> Path:
    """Write ``model`` as ONNX with Q/DQ pairs that TensorRT runs in INT8. The model is left as it was.

    The file passes the full ONNX check and :func:`qat.export.check_onnx`, or nothing is written.

    Args:
        model: Prepared and calibrated, float32.
        path: The file to write; an existing one is replaced.
        example_inputs: What the model runs on: a tuple holds positional arguments, a dict keyword arguments, anything
            else is the one argument.
        opset: 17 to 24; 19 by default, 22 for bfloat16. TensorRT 8.6 reads up to 17, 10.0 up to 20.
        precision: What everything that is not quantized computes in: ``"fp32"``, ``"fp16"`` or ``"bf16"``. TensorRT 11 and
            TensorRT-RTX compute what the file says. For TensorRT 8.6 leave it at ``"fp32"`` and build with the FP16 and
            INT8 flags. The scales stay in float32, so that codes do not change; what else does is told in
            :mod:`qat.graph.precision`. From opset 23 there are no Casts around Q/DQ pairs, which needs a recent parser, and
            ONNX Runtime without graph optimizations. ``"bf16"`` needs opset 22, and ONNX Runtime's CPU kernels do not run it.
        dynamic_batch: Leave the first dimension of the inputs open. Inputs whose first dimension differs from that of
            the first input keep their shape.
        external_data: Store the weights beside the file, in ``<name>.data``.
        int8_weights: Store weights as int8 codes and a DequantizeLinear: a quarter of the size. Not for opset 17, since
            TensorRT 8 wants float weights. TensorRT-RTX 1.7 then runs the packed projection of attention in half.
        fuse_adds: Leave out the Q/DQ on the convolution-fed input of residual additions, which TensorRT then fuses with
            the convolution. It only raises precision.
        half_io: With a half ``precision``: also the inputs and outputs of the graph, which stay float32 otherwise.
        half_scales: With a half ``precision``: also the scales. It saves Casts and changes codes; how many is warned of,
            counted exactly for weights and on ``example_inputs`` for activations, and noted in the file's metadata.
        fp32_nodes: With a half ``precision``: names of ONNX nodes that stay in float32, as patterns with ``*`` and ``?``.
        input_names: Names of the graph inputs; by default those of ``forward``'s parameters.
        output_names: Names of the graph outputs; by default the keys of a dict, or ``output``.
        verbose: Let torch's exporter tell its progress.

    Returns:
        The path of the ONNX file.

    Raises:
        QATError: If the model is not prepared or not calibrated, does not run on ``example_inputs``, holds a number
            format or an operator that the file cannot express, if a value overflows float16 on ``example_inputs``, or
            if ``path`` cannot be written.
    """
    target = Path(path)
    opset = _checked_opset(opset, precision, half_io=half_io, half_scales=half_scales, fp32_nodes=fp32_nodes)
    if int8_weights and opset <= opsets.TENSORRT_8:
        raise QATError("int8_weights=True needs opset >= 18: TensorRT 8 reads float weights with Q and DQ only")
    if not is_prepared(model):
        raise QATError("model: not prepared, there is nothing to export in INT8. Run qat.prepare(model) first")
    _refuse_other_dtypes(model)
    args, kwargs = call_arguments(example_inputs, "example_inputs")
    with _scratch_folder(target) as scratch, torch.no_grad(), exporting(model, args, kwargs, fuse_adds) as traced:
        input_list = _names(input_names, _parameter_names(model, args, kwargs), "input_names")
        output_list = _names(output_names, traced.output_names, "output_names")
        _refuse_shared_names(input_list, output_list)
        raw = _to_onnx(model, args, kwargs, max(opset, 18), dynamic_batch, input_list, output_list, verbose)
        proto = graph.finish(raw, traced.weight_sites, int8_weights=int8_weights)
        if opset <= opsets.TENSORRT_8:
            opsets.downgrade(proto)
            # Axes that became attributes.
            graph.drop_unused(proto.graph)
        graph.set_metadata(proto, {"qat.fuse_adds": str(fuse_adds).lower(), "qat.precision": precision})
        if precision != "fp32":
            _to_half(
                proto, graph_feeds(proto, args, kwargs, "example_inputs"), scratch, precision, half_io, half_scales, fp32_nodes
            )
        _raise_on_findings(check_onnx(proto))
        try:
            _save(proto, scratch / target.name, external_data)
        except OSError as error:
            raise QATError(f"{target}: cannot be written: {error.strerror or error}") from error
        onnx.checker.check_model(str(scratch / target.name), full_check=True)
        # The weights first: the file that refers to them must never be there without them.
        for name in (f"{target.name}.data", target.name):
            if (scratch / name).exists():
                (scratch / name).replace(target.parent / name)
    return target


def export_float(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    opset: int | None = None,
    precision: str = "fp32",
    dynamic_batch: bool = True,
) -> Path:
    """Write a float model as ONNX: the file whose engine an INT8 engine is to be compared with.

    Args:
        model: Without quantizers, float32. It is exported in eval mode and left as it was.
        path: The file to write; an existing one is replaced.
        example_inputs: As in :func:`export_onnx`.
        opset: As in :func:`export_onnx`.
        precision: As in :func:`export_onnx`: what the whole graph computes in.
        dynamic_batch: As in :func:`export_onnx`.

    Returns:
        The path of the ONNX file.

    Raises:
        QATError: If the model is prepared, does not run on ``example_inputs``, holds an operator that the file cannot
            express, if a value overflows float16 on ``example_inputs``, or if ``path`` cannot be written.
    """
    target = Path(path)
    opset = _checked_opset(opset, precision, half_io=False, half_scales=False, fp32_nodes=())
    if is_prepared(model):
        raise QATError("model: prepared; write it with qat.export_onnx, or take the quantizers out with qat.restore(model)")
    _refuse_other_dtypes(model)
    args, kwargs = call_arguments(example_inputs, "example_inputs")
    training = {module: module.training for module in model.modules()}
    with _scratch_folder(target) as scratch, torch.no_grad():
        try:
            model.eval()
            names = output_names(run(model, args, kwargs, "example_inputs"))
            inputs = _parameter_names(model, args, kwargs)
            raw = _to_onnx(model, args, kwargs, max(opset, 18), dynamic_batch, inputs, names, verbose=False)
        finally:
            for module, mode in training.items():
                module.training = mode
        proto = graph.finish(raw, set(), int8_weights=False)
        if opset <= opsets.TENSORRT_8:
            opsets.downgrade(proto)
            graph.drop_unused(proto.graph)
        graph.set_metadata(proto, {"qat.precision": precision})
        if precision != "fp32":
            _to_half(proto, graph_feeds(proto, args, kwargs, "example_inputs"), scratch, precision, False, False, ())
        _save(proto, scratch / target.name, external_data=False)
        onnx.checker.check_model(str(scratch / target.name), full_check=True)
        (scratch / target.name).replace(target)
    return target


def _checked_opset(opset: int | None, precision: str, *, half_io: bool, half_scales: bool, fp32_nodes: Sequence[str]) -> int:
    _refuse_precision(precision, opset, half_io, half_scales, fp32_nodes)
    if opset is None:
        opset = precisions.BF16_OPSET if precision == "bf16" else DEFAULT_OPSET
    if not isinstance(opset, int) or opset not in OPSETS:
        raise QATError(f"opset={opset!r}: choose one from {OPSETS.start} to {OPSETS.stop - 1}")
    return opset


def _refuse_precision(precision: str, opset: int | None, half_io: bool, half_scales: bool, fp32_nodes: Sequence[str]) -> None:
    if isinstance(fp32_nodes, str):
        raise QATError(f"fp32_nodes={fp32_nodes!r}: pass a list of names or patterns")
    if precision == "fp32":
        for name, value in (("half_io", half_io), ("half_scales", half_scales), ("fp32_nodes", fp32_nodes)):
            if value:
                raise QATError(f"{name}={value!r} needs precision='fp16' or 'bf16', it is 'fp32'")
        return
    if precision not in precisions.ELEMENT_TYPES:
        raise QATError(f"precision={precision!r}: choose 'fp32', 'fp16' or 'bf16'")
    if opset is not None and opset < DEFAULT_OPSET:
        raise QATError(
            f"precision={precision!r} needs opset >= {DEFAULT_OPSET}, got {opset}. For TensorRT 8.6 export with "
            "precision='fp32' and build with its FP16 and INT8 flags, for later versions raise the opset"
        )
    if precision == "bf16" and opset is not None and opset < precisions.BF16_OPSET:
        raise QATError(
            f"precision='bf16' needs opset >= {precisions.BF16_OPSET}, from where Conv takes bfloat16; got {opset}. Leave "
            "opset out, or choose precision='fp16'"
        )


def _to_half(
    proto: onnx.ModelProto,
    fed: dict[str, Any],
    scratch: Path,
    precision: str,
    half_io: bool,
    half_scales: bool,
    fp32_nodes: Sequence[str],
) -> None:
    """Rewrite the graph in place; nothing may overflow, and codes change on request only."""
    plan = precisions.decide(proto, precision, half_io=half_io, half_scales=half_scales, fp32_nodes=fp32_nodes)
    if precision == "fp16":
        halves.refuse_overflow(proto, plan, fed, scratch)
    if half_scales:
        changed = halves.count_changed_codes(proto, fed, scratch, plan.element_type)
        halves.round_scales(proto, plan.element_type)
        graph.set_metadata(proto, {"qat.changed_codes": json.dumps({"changed": changed.changed, "total": changed.total})})
        warnings.warn(f"half_scales=True: {changed}", stacklevel=4)
    retype.apply(proto, plan)
    graph.drop_unused(proto.graph)


def _refuse_other_dtypes(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise QATError(f"{name}: on the meta device, it has no values to export")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise QATError(f"{name}: {tensor.dtype}; export works on float32 models. Call model.float() first")


def _parameter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
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


def _names(given: Sequence[str] | None, found: list[str], argument: str) -> list[str]:
    if given is None:
        return found
    if isinstance(given, str) or len(given) != len(found) or len(set(given)) != len(given):
        raise QATError(f"{argument}={given!r}: pass {len(found)} different names, by default they are {found}")
    return list(given)


def _refuse_shared_names(inputs: list[str], outputs: list[str]) -> None:
    shared = sorted({name for name in inputs + outputs if (inputs + outputs).count(name) > 1})
    if shared:
        raise QATError(f"input and output names must differ, {shared[0]!r} occurs twice; pass input_names or output_names")


class _Dynamic:
    """Which dimensions stay open, and inputs that do not tempt the tracer to bake them in."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> None:
        first = tensors((args, kwargs))[0]
        self.size = first.shape[0] if dynamic_batch and first.ndim else None
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


def _to_onnx(
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


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, so that finished files can be moved into place at once. Opening it tests ``path``."""
    if target.is_dir() or not target.name:
        raise QATError(f"path={str(target)!r} is a folder; name the file to write")
    try:
        folder = tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent)
    except OSError as error:
        raise QATError(f"path={str(target)!r} cannot be written: {error.strerror}. Choose a writable folder") from error
    with folder as name:
        yield Path(name)


def _save(proto: onnx.ModelProto, path: Path, external_data: bool) -> None:
    if external_data:
        onnx.save_model(
            proto, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
        )
        return
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) >= _PROTOBUF_LIMIT:
        raise QATError("the model exceeds 2 GiB, the limit of one ONNX file. Export with external_data=True")
    onnx.save_model(proto, str(path))


def _raise_on_findings(findings: list[Any]) -> None:
    errors = [str(finding) for finding in findings if finding.level != "note"]
    if errors:
        raise QATError("TensorRT would refuse this graph or not run it in INT8:\n" + "\n".join(errors))
