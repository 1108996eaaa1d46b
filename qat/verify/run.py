"""``verify``: PyTorch's fake quantization, ONNX Runtime and an engine, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QATError
from .compare import SLACK, budget, difference, non_finite, within, worst
from .diagnose import Diagnosis
from .feeds import check_engine, graph_feeds, leaves, run_engine
from .outcome import Agreement, Departure, OutputCheck, VerifyReport
from .reference import Reference

if TYPE_CHECKING:
    from torch import nn

    from .pytorch import Model


def verify(
    model: nn.Module | None,
    onnx_path: str | os.PathLike[str],
    engine: Any,
    inputs: Any,
    *,
    tolerance: float = 0.01,
    data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    min_top1: float | None = None,
    fp16: bool = True,
    fp32_onnx: str | os.PathLike[str] | None = None,
    build: Callable[..., Any] | None = None,
    locate: bool = True,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare PyTorch, ONNX Runtime and an engine on the same inputs; where they differ, say from which layer on.

    An output agrees if its ``max_rel`` is at most ``tolerance``, or if rounding explains it: its SQNR is at most 6 dB below
    that of the drift (the same sums in another order) or of the graph with every result rounded, to 14 bits for the kernels of
    any runtime and to FP16. The latter counts only as far as it is harmless: no worse than what INT8 itself costs, or than
    noise as large as ``tolerance``.

    Otherwise engines are built with tensors marked as outputs, about log2(n) for n tensors, and compared with what ONNX
    Runtime computes there. One of them is built in FP32, which tells a loss of FP16's from one of the export or the runtime.

    Args:
        model: The fake-quantizing model; ``None`` compares ONNX Runtime and the engine only, and needs no torch.
        onnx_path: The file that was exported from the model and that the engine was built from.
        engine: A ``qat.tensorrt.Engine``, or whatever has ``inputs``, ``outputs`` and ``run(inputs)``; ``None`` compares
            PyTorch and ONNX Runtime only.
        inputs: As ``example_inputs`` of ``qat.export_onnx``, arrays or tensors; any batch size that the engine takes.
        tolerance: The difference, relative to an output's largest magnitude, that is accepted whatever its cause.
        data: Batches for the top-1 agreement: inputs as above, or tuples and lists ``(inputs, target, ...)``.
        max_batches: Use so many batches of ``data``.
        min_top1: The agreement that each pair must reach for the report to be ``ok``.
        fp16: Whether the engine may compute in FP16; False does not count rounding to FP16 as an explanation.
        fp32_onnx: Where ``onnx_path`` was exported in FP16 or BF16: the same model exported in FP32. ONNX Runtime then runs
            this one, and the FP32 engine is built of it.
        build: Builds engines to search with: ``build(path, outputs=[...], fp16=False, bf16=False, tf32=False)``, the last
            three only for FP32. By default ``qat.tensorrt.build`` with the engine's runtime and profile; for other settings
            ``functools.partial(qat.tensorrt.build, ...)``.
        locate: Look for the layer if something differs.
        progress: Called with a line before each step that takes long.

    Returns:
        The report; ``print`` it, ask for ``ok``, or take ``to_json()``.

    Raises:
        QATError: If the file, the model, the engine or the inputs do not fit each other, if PyTorch or ONNX Runtime gives
            NaN, or if ``data`` is empty or has nothing to compare.

    Example:
        >>> import tempfile, qat, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
        >>> images = torch.ones(2, 3, 8, 8)
        >>> _ = qat.prepare(model), qat.calibrate(model, [images], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     verify(model, qat.export_onnx(model, f"{folder}/model.onnx", images), None, images).ok
        True
    """
    if model is None and engine is None:
        raise QATError("model=None and engine=None: nothing to compare with ONNX Runtime; pass one of them")
    if not tolerance >= 0:
        raise QATError(f"tolerance={tolerance!r}: a share of the largest magnitude, 0 or more")
    tell = progress or _silent
    graph = Reference(onnx_path)
    reference = graph if fp32_onnx is None else Reference(fp32_onnx)
    if reference.outputs != graph.outputs:
        raise QATError(f"fp32_onnx={reference.path!r}: outputs {reference.outputs}, onnx_path has {graph.outputs}")
    feeds = graph_feeds(reference, inputs, "inputs")
    if engine is not None:
        check_engine(engine, graph)
    torch_side = _torch_side(model, reference)
    outputs = _compare(torch_side, reference, graph, engine, inputs, feeds, tolerance, fp16)
    agreement: list[Agreement] = []
    if data is not None:
        tell("top-1 agreement over the data set")
        agreement = _agreement(torch_side, reference, graph, engine, data, max_batches)
    departure = None
    if locate and not all(o.onnx_ok for o in outputs):
        assert torch_side is not None
        departure = _in_export(torch_side, inputs)
    elif locate and not all(o.engine_ok for o in outputs):
        builder = build or _default_build(engine)
        departure = Diagnosis(reference, graph, feeds, outputs, builder, tolerance, tell)()
    return VerifyReport(outputs, agreement, departure, tolerance, min_top1)


def _silent(message: str) -> None:
    """Tell nobody."""


def _torch_side(model: nn.Module | None, graph: Reference) -> Model | None:
    if model is None:
        return None
    from .pytorch import Model

    return Model(model, graph)


def _compare(
    model: Model | None,
    reference: Reference,
    graph: Reference,
    engine: Any,
    inputs: Any,
    feeds: Mapping[str, np.ndarray],
    tolerance: float,
    counts_fp16: bool,
) -> list[OutputCheck]:
    onnx = reference.run(feeds)
    _refuse_nan(onnx, "ONNX Runtime")
    pytorch, parity = None, {}
    if model is not None:
        pytorch = model.outputs(inputs, "inputs")
        _refuse_nan(pytorch, "PyTorch")
        parity = {output.name: output for output in model.parity(inputs).outputs}
    reversed_sums = reference.run_reversed(feeds)
    found = half = fewer = float_graph = None
    if engine is not None:
        found = run_engine(engine, graph, feeds)
        half, fewer = reference.run_rounded(feeds, half=True), reference.run_rounded(feeds, half=False)
        float_graph = reference.run_unquantized(feeds) if reference.is_quantized else None
    checks = []
    for name in reference.outputs:
        own_drift = difference(name, onnx[name], reversed_sums[name], "ONNX Runtime")
        drift = parity[name].drift if name in parity else own_drift
        to_torch = difference(name, pytorch[name], onnx[name], "ONNX Runtime") if pytorch is not None else None
        onnx_ok = to_torch is None or within(to_torch, worst(drift) - SLACK, tolerance)
        to_onnx = end_to_end = fp16 = int8 = limit = limit_fp32 = None
        engine_ok, bad = True, 0
        if found is not None and half is not None and fewer is not None:
            to_onnx = difference(name, onnx[name], found[name], "the engine")
            end_to_end = difference(name, pytorch[name], found[name], "the engine") if pytorch is not None else None
            fp16 = difference(name, onnx[name], half[name], "ONNX Runtime")
            int8 = difference(name, onnx[name], float_graph[name], "ONNX Runtime") if float_graph is not None else None
            rounded = difference(name, onnx[name], fewer[name], "ONNX Runtime")
            limit_fp32 = limit = worst(own_drift, drift, rounded) - SLACK
            if counts_fp16:
                limit = min(limit, max(worst(fp16), budget(int8, tolerance)) - SLACK)
            bad = non_finite(onnx[name], found[name])
            engine_ok = bad == 0 and within(to_onnx, limit, tolerance)
        differences = (to_torch, to_onnx, end_to_end, drift, fp16, int8)
        checks.append(OutputCheck(name, *differences, limit, limit_fp32, onnx_ok, engine_ok, bad))
    return checks


def _refuse_nan(outputs: Mapping[str, np.ndarray], whose: str) -> None:
    for name, array in outputs.items():
        if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            count = int(np.isnan(array).sum())
            raise QATError(f"{name}: {count} NaN from {whose} on these inputs, so there is nothing to compare with")


def _agreement(
    model: Model | None, reference: Reference, graph: Reference, engine: Any, data: Iterable[Any], max_batches: int | None
) -> list[Agreement]:
    equal: dict[tuple[str, str], int] = {}
    samples: dict[tuple[str, str], int] = {}
    count = 0
    for count, batch in enumerate(data, 1):
        inputs = _inputs_of(batch, len(reference.inputs))
        feeds = graph_feeds(reference, inputs, f"data: batch {count - 1}")
        sides = {"ONNX Runtime": reference.run(feeds)}
        if model is not None:
            sides["PyTorch"] = model.outputs(inputs, f"data: batch {count - 1}")
        if engine is not None:
            sides["engine"] = run_engine(engine, graph, feeds)
        for first, second in (("ONNX Runtime", "PyTorch"), ("engine", "ONNX Runtime"), ("engine", "PyTorch")):
            for name, scores in sides[first].items() if first in sides and second in sides else ():
                other = sides[second][name]
                if _is_classes(scores) and other.shape == scores.shape:
                    key = (name, f"{first} - {second}")
                    # NaN agrees with nothing.
                    same = (scores.argmax(1) == other.argmax(1)) & ~np.isnan(scores).any(1) & ~np.isnan(other).any(1)
                    equal[key] = equal.get(key, 0) + int(same.sum())
                    samples[key] = samples.get(key, 0) + len(scores)
        if count == max_batches:
            break
    if count == 0:
        raise QATError("data: no batch in it; pass a list or a loader, not an iterator that is used up")
    if not samples:
        raise QATError(f"data: no output of shape (N, classes) among {reference.outputs}; leave data out")
    return [Agreement(name, pair, n, equal[name, pair] / n) for (name, pair), n in samples.items()]


def _inputs_of(batch: Any, wanted: int) -> Any:
    """The inputs of a batch: all of it, or its first element where there is a target, too."""
    if isinstance(batch, tuple | list) and batch and len(leaves(batch)) != wanted:
        return batch[0]
    # A list of one tensor is a batch, as TensorDataset gives it, no argument of the model.
    return tuple(batch) if isinstance(batch, list) else batch


def _is_classes(scores: np.ndarray) -> bool:
    return scores.ndim == 2 and scores.shape[1] > 1 and np.issubdtype(scores.dtype, np.floating)


def _in_export(model: Model, inputs: Any) -> Departure:
    site = model.first_site(inputs)
    detail = "ONNX Runtime computes something else than PyTorch, so the file is at fault, before any engine."
    if site is None:
        detail += " All quantization sites agree: look behind the last one, at the head."
    remedies = ("export the model anew", "print qat.parity(model, path, inputs, codes=True, segments=True)")
    return Departure("export", site, detail, remedies)


def _default_build(engine: Any) -> Callable[..., Any]:
    """``qat.tensorrt.build`` with the runtime and the profile of an engine."""
    from ..tensorrt import build

    options: dict[str, Any] = {}
    if hasattr(engine, "runtime"):
        options["runtime"] = engine.runtime
    profiles = {info.name: (info.min, info.opt, info.max) for info in engine.inputs if getattr(info, "min", None) is not None}
    if profiles:
        options["shapes"] = profiles
    return partial(build, **options)
