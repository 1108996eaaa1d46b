"""Do PyTorch and the exported graph compute the same? Compared through ONNX Runtime, without its graph optimizations.

Two implementations of a float convolution round differently, a value that lies at a tie between two codes then falls to
either side, and the difference travels on. That drift is no fault of the export, so PyTorch's own is measured beside it:
the same model on the same inputs, with the sums of its convolutions and linear layers added up in another order, without
oneDNN and cuDNN kernels, and in the other memory format. Other kernels alone are a smaller drift: PyTorch then still runs more
than half of ResNet-50's convolutions to the same bits (benchmarks/RESULTS.md has both).
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..core.numerics import quantize
from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers
from ..errors import QATError
from ..export.inputs import call_arguments, graph_feeds, output_names, run
from ..export.pairs import SITES_KEY
from ..graph.graph import Graph, Q
from ..graph.reading import load_model
from ..graph.run import marked, run_model
from ..nn.add import fusing_adds
from ..support.inputs import tensors
from ..support.modes import hooked, looking_at
from .differences import Difference, OutputParity, ParityReport, SegmentParity, SiteParity

# Their weight holds the input channels of a group in its second dimension.
REVERSIBLE = frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear})


def parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any,
    *,
    codes: bool = False,
    segments: bool = False,
) -> ParityReport:
    """Compare ``model`` with the ONNX file that ``qat.export_onnx`` wrote for it. The model is left as it was.

    The model runs in float32 and in eval mode; where the file was exported with ``fuse_adds``, the same sites of the model
    are switched off for the comparison. A file that computes in float16 is compared with that float32 model; the drift
    beside it is then that of the model when every module's result is rounded to float16.

    Args:
        model: The model that was exported, quantizing.
        path: The ONNX file.
        inputs: As ``example_inputs`` of ``export_onnx``; any batch size if the file's is open.
        codes: Also compare the INT8 codes of every activation site, end to end. Holds one byte an activation.
        segments: Also cut the graph at every activation site, feed each part what PyTorch computed there, and compare
            the codes it arrives at. Holds every site's input: keep the batch small.

    Returns:
        The report; ``print`` it, or read its attributes.

    Raises:
        QATError: If the file does not fit the model or the inputs, or computes in bfloat16, which ONNX Runtime's CPU
            kernels do not, or if ``segments`` are asked of one in float16.

    Example:
        >>> import tempfile, qat
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> images = torch.ones(2, 3, 8, 8)
        >>> _ = qat.prepare(model), qat.calibrate(model, [images], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = parity(model, qat.export_onnx(model, f"{folder}/model.onnx", images), images)
        >>> report.top1
        1.0
    """
    file = os.fspath(path)
    if not Path(file).is_file():
        raise QATError(f"path={file!r}: no such file. Run qat.export_onnx(model, path, example_inputs) first")
    args, kwargs = call_arguments(inputs, "inputs")
    graph = Graph(load_model(file))
    metadata = graph.metadata
    if SITES_KEY not in metadata:
        raise QATError(f"path={file!r}: not a file of qat.export_onnx, it does not say which node belongs to which site")
    nodes: dict[str, list[str]] = json.loads(metadata[SITES_KEY])
    precision = metadata.get("qat.precision", "fp32")
    _refuse_precision(file, precision, segments)
    _refuse_foreign(model, nodes)
    with looking_at(model), fusing_adds(model, metadata.get("qat.fuse_adds") == "true"):
        with _recorded(model, keep_inputs=segments, enabled=codes or segments) as calls, _float32():
            output = run(model, args, kwargs, "inputs")
        with (
            _recorded(model, keep_inputs=False, enabled=codes) as other_calls,
            _float32(vendor_kernels=False),
            _ReversedSums() if precision == "fp32" else _half_results(model),
        ):
            other_args, other_kwargs = pytree.tree_map(_other_layout, (args, kwargs))
            other = run(model, other_args, other_kwargs, "inputs")
    feeds = graph_feeds(graph.model, args, kwargs, "inputs")
    names = graph.outputs
    pairs = _match(calls, nodes)
    exposed: dict[str, _Call] = {}
    for name, call in pairs if codes else ():
        if not call.is_weight:
            exposed.setdefault(_codes_of(graph, name), call)
    results = run_model(
        marked(graph.model, exposed) if exposed else file, feeds, blame=f"path={file!r}: ONNX Runtime does not run it"
    )
    references = [_array(t) for t in tensors(output)]
    if len(references) != len(names):
        raise QATError(f"path={file!r} has {len(names)} outputs, the model {len(references)}: {output_names(output)}")
    drifts = [_array(t) for t in tensors(other)]
    report_outputs = [
        OutputParity(name, _difference(name, reference, results[name]), Difference.between(reference, drift))
        for name, reference, drift in zip(names, references, drifts, strict=True)
    ]
    drift_codes = {(call.site, call.index): call.codes for site_calls in other_calls.values() for call in site_calls}
    return ParityReport(
        report_outputs,
        [_site(call, results[name], drift_codes[call.site, call.index]) for name, call in exposed.items()],
        _segments(graph, pairs, feeds) if segments else [],
        sorted(site for site in calls if len(calls[site]) != len(nodes.get(site, [])) and site in nodes),
        precision,
        bool(nodes),
    )


@dataclass(frozen=True)
class _Call:
    """What a site did in one call."""

    site: str
    index: int
    is_weight: bool
    codes: np.ndarray
    ratio: np.ndarray | None


@contextlib.contextmanager
def _recorded(model: nn.Module, *, keep_inputs: bool, enabled: bool) -> Iterator[dict[str, list[_Call]]]:
    """Record the codes of every site that quantizes, call by call."""
    calls: dict[str, list[_Call]] = {}

    def recorder(path: str) -> Any:
        def record(site: Quantizer, args: tuple[Tensor, ...]) -> None:
            if site.state is State.QUANTIZING:
                x = args[0]
                scale = site.range_scale(x)
                code = quantize(x, scale, axis=site.axis, fmt=site.fmt)
                ratio = None
                if keep_inputs:
                    shape = [-1 if d == site.axis else 1 for d in range(x.ndim)] if site.axis is not None else []
                    ratio = _array(x / scale.reshape(shape))
                seen = calls.setdefault(path, [])
                seen.append(_Call(path, len(seen), isinstance(site, WeightQuantizer), _array(code).astype(np.int8), ratio))

        return record

    sites = list(quantizers(model)) if enabled else []
    with hooked(site.register_forward_pre_hook(recorder(path)) for path, site in sites):
        yield calls


@contextlib.contextmanager
def _float32(*, vendor_kernels: bool = True) -> Iterator[None]:
    """Full float32, not TF32, as ONNX Runtime computes; without the oneDNN and cuDNN kernels if asked."""
    precision = torch.get_float32_matmul_precision()
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    with warnings.catch_warnings():
        # The switch also sets a TF32 flag, and warns where that flag means nothing.
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with (
            mkldnn.flags(enabled=vendor_kernels and mkldnn.is_available()),
            cudnn.flags(enabled=vendor_kernels and cudnn.is_available(), allow_tf32=False),
        ):
            try:
                if precision != "highest":
                    torch.set_float32_matmul_precision("highest")
                yield
            finally:
                if precision != "highest":
                    torch.set_float32_matmul_precision(precision)


class _ReversedSums(TorchFunctionMode):
    """Convolutions and linear layers add up their input channels from last to first."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in REVERSIBLE:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("input", "weight"), args, strict=False)), **(kwargs or {})}
        x, weight = given.pop("input"), given.pop("weight")
        # Channels precede the spatial dimensions, of which a linear layer has none. Each group is reversed by itself.
        axis = x.ndim - (weight.ndim - 1)
        x = x.unflatten(axis, (-1, weight.shape[1])).flip(axis + 1).flatten(axis, axis + 1)
        return func(x, weight.flip(1), *args[2:], **given)


@contextlib.contextmanager
def _half_results(model: nn.Module) -> Iterator[None]:
    """Round what every module returns to float16: what storing it there would do. Quantizers are left exact."""

    def rounded(leaf: Any) -> Any:
        return leaf.half().to(leaf.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map(rounded, output)

    modules = [module for module in model.modules() if not isinstance(module, Quantizer)]
    with hooked(module.register_forward_hook(hook) for module in modules):
        yield


def _refuse_precision(file: str, precision: str, segments: bool) -> None:
    if precision == "bf16":
        raise QATError(
            f"path={file!r} computes in bfloat16, which ONNX Runtime's CPU kernels do not. Compare the file of "
            "precision='fp32', and the bfloat16 one as an engine"
        )
    if segments and precision != "fp32":
        raise QATError(
            f"segments=True compares codes bit by bit, path={file!r} rounds between the sites to float16. Compare the file of "
            "precision='fp32' segment by segment, this one without segments"
        )


def _other_layout(leaf: Any) -> Any:
    """An image in the other memory format, for what has no sum over channels: depthwise convolutions, say."""
    if not isinstance(leaf, Tensor) or leaf.ndim != 4:
        return leaf
    channels_last = leaf.is_contiguous(memory_format=torch.channels_last) and not leaf.is_contiguous()
    return leaf.contiguous(memory_format=torch.contiguous_format if channels_last else torch.channels_last)


def _refuse_foreign(model: nn.Module, nodes: Mapping[str, list[str]]) -> None:
    sites = dict(quantizers(model))
    missing = [site for site in nodes if site not in sites]
    if missing:
        raise QATError(f"{missing[0]}: in the ONNX file but not in the model; compare a file with the model it was made of")
    off = [site for site in nodes if sites[site].state is not State.QUANTIZING]
    if off:
        raise QATError(f"{off[0]}: quantized in the ONNX file, {sites[off[0]].state.value} in the model. Calibrate it first")


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _difference(name: str, reference: np.ndarray, result: np.ndarray) -> Difference:
    if reference.shape != result.shape:
        raise QATError(f"{name}: shape {list(reference.shape)} in PyTorch, {list(result.shape)} in the ONNX file")
    return Difference.between(reference, result)


def _match(calls: Mapping[str, list[_Call]], nodes: Mapping[str, list[str]]) -> list[tuple[str, _Call]]:
    """The node of each call: the file lists one a call, in their order."""
    return [
        (name, call)
        for site, names in nodes.items()
        if len(names) == len(calls.get(site, []))
        for name, call in zip(names, calls[site], strict=True)
    ]


def _codes_of(graph: Graph, name: str) -> str:
    """The tensor that holds the codes: a Q node's output, or the input of a DQ node without Q."""
    node = graph.nodes[graph.positions[name]]
    return node.output[0] if node.op_type == Q else node.input[0]


def _site(call: _Call, found: np.ndarray, drift: np.ndarray) -> SiteParity:
    difference = np.abs(call.codes.astype(np.int16) - found)
    return SiteParity(
        call.site,
        call.index,
        call.codes.size,
        float((difference == 0).mean()),
        int(difference.max(initial=0)),
        float((call.codes == drift).mean()),
    )


def _segments(graph: Graph, pairs: list[tuple[str, _Call]], feeds: Mapping[str, np.ndarray]) -> list[SegmentParity]:
    """Run all parts between activation sites at once: what a DQ node computed becomes an input of the graph."""
    cut = onnx.ModelProto()
    cut.CopyFrom(graph.model)
    fed = dict(feeds)
    for name, call in pairs:
        if call.is_weight:
            continue
        for reader in graph.readers.get(graph.nodes[graph.positions[name]].output[0], []):
            if reader.output[0] not in fed and reader.output[0] not in graph.outputs:
                scale = numpy_helper.to_array(graph.constants[reader.input[1]])
                fed[reader.output[0]] = call.codes.astype(np.float32) * scale
    kept = [node for node in cut.graph.node if node.output[0] not in fed]
    del cut.graph.node[:]
    cut.graph.node.extend(kept)
    given = {value.name for value in cut.graph.input}
    new_inputs = [name for name in fed if name not in given]
    cut.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in new_inputs)
    wanted = list(dict.fromkeys(_codes_of(graph, name) for name, _ in pairs))
    stored = {name: numpy_helper.to_array(graph.constants[name]) for name in wanted if name in graph.constants}
    parts = marked(cut, [name for name in wanted if name not in stored])
    found = run_model(parts, fed, blame="the graph, cut at its sites: ONNX Runtime does not run it")
    return [_segment(call, {**found, **stored}[_codes_of(graph, name)]) for name, call in pairs]


def _segment(call: _Call, found: np.ndarray) -> SegmentParity:
    difference = np.abs(call.codes.astype(np.int16) - found)
    differs = difference > 0
    assert call.ratio is not None
    ratio = call.ratio[differs]
    distance = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
    return SegmentParity(
        call.site,
        call.index,
        call.is_weight,
        call.codes.size,
        int(differs.sum()),
        int(difference.max(initial=0)),
        float(distance.max(initial=0.0)),
    )
