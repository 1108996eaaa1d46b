"""``export_onnx``: a model to an ONNX file, with QuantizeLinear/DequantizeLinear pairs where it quantizes."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from ..core.quantizer import is_prepared
from ..errors import QATError
from ..graph import halves, retype
from ..graph import opset as opsets
from ..graph import precision as precisions
from ..graph.check import check_onnx
from ..graph.writing import check_model_target, model_draft
from . import pairs as graph
from .convert import parameter_names, to_onnx
from .inputs import call_arguments, graph_feeds
from .state import exporting

OPSETS = range(17, 25)
DEFAULT_OPSET = 19


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

    The file passes the full ONNX check and :func:`qat.export.check_onnx`, or nothing is written. A float model gives a float
    file, and a warning says so: its metadata entry ``qat.sites`` is empty, and :func:`qat.parity` and ``qat check`` tell that
    nothing is quantized. :func:`qat.export.export_float` is for those who mean it.

    Args:
        model: Prepared and calibrated, or a float model; in float32.
        path: The file to write; an existing one is replaced as a whole, see :mod:`qat.support.files`.
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
        external_data: Store the weights beside the file, in ``<name>.data``; see :mod:`qat.graph.writing`.
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
        QATError: If the model is prepared and not calibrated, does not run on ``example_inputs``, holds a number format or
            an operator that the file cannot express, if an argument about quantization is given for a float model, if a
            value overflows float16 on ``example_inputs``, or if ``path`` cannot be written.
    """
    if not is_prepared(model):
        given = {"int8_weights": int8_weights, "fuse_adds": fuse_adds, "half_scales": half_scales}
        for name in (name for name, value in given.items() if value):
            raise QATError(f"{name}=True: is about quantized layers, and the model has none. Run qat.prepare(model) first")
        warnings.warn(
            "model: not prepared, so this is a float file and nothing in it runs in INT8. Run qat.prepare(model) and "
            "qat.calibrate first, or qat.export.export_float if a float file is what you want",
            stacklevel=2,
        )
    return _export(
        model,
        path,
        example_inputs,
        opset=opset,
        precision=precision,
        dynamic_batch=dynamic_batch,
        external_data=external_data,
        int8_weights=int8_weights,
        fuse_adds=fuse_adds,
        half_io=half_io,
        half_scales=half_scales,
        fp32_nodes=fp32_nodes,
        input_names=input_names,
        output_names=output_names,
        verbose=verbose,
    )


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

    :func:`export_onnx` without its warning about float models; a prepared one is refused.

    Args:
        model: Without quantizers, float32. It is exported in eval mode and left as it was.
        path: As in :func:`export_onnx`.
        example_inputs: As in :func:`export_onnx`.
        opset: As in :func:`export_onnx`.
        precision: As in :func:`export_onnx`: what the whole graph computes in.
        dynamic_batch: As in :func:`export_onnx`.

    Returns:
        The path of the ONNX file.

    Raises:
        QATError: If the model is prepared, and as :func:`export_onnx`.
    """
    if is_prepared(model):
        raise QATError("model: prepared; write it with qat.export_onnx, or take the quantizers out with qat.restore(model)")
    return _export(model, path, example_inputs, opset=opset, precision=precision, dynamic_batch=dynamic_batch)


def _export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    opset: int | None,
    precision: str,
    dynamic_batch: bool,
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
    opset = _checked_opset(opset, precision, half_io=half_io, half_scales=half_scales, fp32_nodes=fp32_nodes)
    if int8_weights and opset <= opsets.TENSORRT_8:
        raise QATError("int8_weights=True needs opset >= 18: TensorRT 8 reads float weights with Q and DQ only")
    _refuse_other_dtypes(model)
    args, kwargs = call_arguments(example_inputs, "example_inputs")
    check_model_target(path, external_data=external_data)
    with torch.no_grad(), exporting(model, args, kwargs, fuse_adds) as traced:
        input_list = _names(input_names, parameter_names(model, args, kwargs), "input_names")
        output_list = _names(output_names, traced.output_names, "output_names")
        _refuse_shared_names(input_list, output_list)
        raw = to_onnx(model, args, kwargs, max(opset, 18), dynamic_batch, input_list, output_list, verbose)
    proto = graph.finish(raw, traced.weight_sites, int8_weights=int8_weights)
    if opset <= opsets.TENSORRT_8:
        opsets.downgrade(proto)
        # Axes that became attributes.
        graph.drop_unused(proto.graph)
    is_quantized = is_prepared(model)
    if is_quantized:
        graph.set_metadata(proto, {"qat.fuse_adds": str(fuse_adds).lower()})
    graph.set_metadata(proto, {"qat.precision": precision})
    if precision != "fp32":
        _to_half(proto, graph_feeds(proto, args, kwargs, "example_inputs"), precision, half_io, half_scales, fp32_nodes)
    if is_quantized:
        # A float file is for other readers than TensorRT, too.
        _raise_on_findings(check_onnx(proto))
    with model_draft(proto, path, external_data=external_data) as draft:
        onnx.checker.check_model(str(draft), full_check=True)
    return Path(path)


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
    precision: str,
    half_io: bool,
    half_scales: bool,
    fp32_nodes: Sequence[str],
) -> None:
    """Rewrite the graph in place; nothing may overflow, and codes change on request only."""
    plan = precisions.decide(proto, precision, half_io=half_io, half_scales=half_scales, fp32_nodes=fp32_nodes)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if precision == "fp16":
                halves.refuse_overflow(proto, plan, fed, Path(scratch))
            changed = halves.count_changed_codes(proto, fed, Path(scratch), plan.element_type) if half_scales else None
    except OSError as error:
        raise QATError(
            f"{tempfile.gettempdir()}: a temporary file cannot be written: {error.strerror or error}. Free space, or let the "
            "environment variable TMPDIR name another folder"
        ) from error
    if changed is not None:
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


def _raise_on_findings(findings: list[Any]) -> None:
    errors = [str(finding) for finding in findings if finding.level != "note"]
    if errors:
        raise QATError("TensorRT would refuse this graph or not run it in INT8:\n" + "\n".join(errors))
