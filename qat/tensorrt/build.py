"""From an ONNX graph to an engine, with one signature on TensorRT 8.6, 10, 11 and TensorRT-RTX."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QATError
from ..support.files import check_target, read_whole, write_whole
from .calibrators import Calibrator
from .context import TensorInfo, dtype_of
from .cuda import local_target
from .engine import Engine
from .log import BuildLog, Record, messages_of
from .precision import BF16, HALF, Types, attention_in_half, keep_float, layers_of, set_flag, set_precisions
from .progress import Display, Interruption, make_monitor
from .runtime import Runtime, as_runtime
from .shapes import Shape, add_profile, profiles_of

# What TensorRT-RTX compiles for on a machine without a GPU.
DEFAULT_TARGET = "SM86"


def build(
    onnx: str | os.PathLike[str] | bytes,
    *,
    fp16: bool | None = None,
    bf16: bool | None = None,
    int8: bool | None = None,
    tf32: bool = True,
    strongly_typed: bool | None = None,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] | None = None,
    batch: int | tuple[int, int, int] = (1, 8, 32),
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    timing_iterations: int | None = None,
    optimization_level: int | None = None,
    hardware_compatibility: str | None = None,
    version_compatible: bool = False,
    targets: Sequence[str] | None = None,
    tactic_sources: Sequence[str] | None = None,
    calibrator: Calibrator | None = None,
    outputs: Sequence[str] = (),
    fp32_layers: Sequence[str] = (),
    progress: bool = False,
    check: bool = True,
    runtime: Runtime | str | None = None,
    verbose_log: bool = True,
) -> Engine:
    """Build an engine with the TensorRT that is installed.

    Precision: where typing is weak (8.6, and 10 with a float32 graph) ``fp16``, ``bf16`` and ``int8`` are builder flags.
    Where it is strong (11, TensorRT-RTX, 10 with a graph that holds FP16 or BF16) the engine computes in the graph's types,
    and a flag that asks for another type than those is an error.

    Args:
        onnx: File (external data beside it is found), or the graph's bytes.
        fp16: FP16 kernels where they are faster; beside Q/DQ, also for attention, which TensorRT would leave in float32.
            Default: yes where typing is weak.
        bf16: BF16 kernels where they are faster. Default: no.
        int8: INT8 kernels. Default: if the graph holds Q/DQ or a calibrator is given.
        tf32: Whether float32 convolutions and products may round their inputs to TF32.
        strongly_typed: Whether types are the graph's. Default: where the runtime knows no other way, or the graph holds
            FP16 or BF16 and the runtime can.
        shapes: Smallest, most frequent and largest shape by input name. Default: everything fixed but an open first
            dimension, see ``batch``.
        batch: Smallest, most frequent and largest size of an open first dimension; one number for all three.
        workspace: Largest scratch memory of a kernel, bytes. Default: all of the GPU's.
        timing_cache: File of measured tactics, read if it is there and written after the build. TensorRT-RTX measures
            nothing and has none: a warning says so.
        timing_iterations: Runs of a tactic to average; more choose better among kernels of some microseconds (trtexec takes
            8). Default: the library's (1). Without effect where there is no timing cache.
        optimization_level: 0 (fast build) to 5 (fast engine). Default: the library's (3).
        hardware_compatibility: Level such as ``"ampere_plus"``: the engine runs on other GPUs too. Not for TensorRT-RTX.
        version_compatible: The engine loads in later minor versions too.
        targets: TensorRT-RTX: compute capabilities to compile for, such as ``("SM86", "SM89")``; its log describes one of
            them. Default: the GPU that is there, without one ``SM86``. The other runtimes build for the GPU that is there.
        tactic_sources: Names of the libraries that tactics may come from, such as ``("JIT_CONVOLUTIONS",)``. Default: the
            library's choice.
        calibrator: For a graph without Q/DQ, up to TensorRT 10: see :mod:`qat.tensorrt.calibrators`.
        outputs: Names of ONNX tensors to return besides the graph's outputs.
        fp32_layers: Names of ONNX nodes to keep in float32; weak typing only.
        progress: Show the build's progress, where the version reports it.
        check: First look for what TensorRT would refuse (needs onnx; see :func:`qat.export.check_onnx`).
        runtime: ``"tensorrt"`` or ``"tensorrt_rtx"``. Default: the one installed, TensorRT first.
        verbose_log: Keep VERBOSE records, which :func:`qat.tensorrt.inspect` needs.

    Returns:
        The engine, not yet deserialized.

    Raises:
        QATError: If an argument does not fit the graph or the version, or TensorRT refuses the graph or fails; the message
            quotes TensorRT.
        KeyboardInterrupt: After Ctrl-C, once TensorRT has stopped: at once where it reports progress (10 and later), at the
            end of the build before. Nothing is written then.
    """
    runtime = as_runtime(runtime)
    trt: Any = runtime.module
    if calibrator is not None:
        if not isinstance(calibrator, Calibrator):
            raise QATError(f"calibrator is a {type(calibrator).__name__}: use one of qat.tensorrt.calibrators")
        calibrator.check(runtime)
    if timing_cache is not None and runtime.timing_cache:
        check_target(timing_cache)
    source = _source(onnx)
    if check:
        _check_graph(runtime, source)
    log = BuildLog()
    with messages_of(trt).recorded(log, verbose=verbose_log) as logger:
        interruption = Interruption(cancels=runtime.progress_monitor)
        with interruption.noted():
            parsed = _parse(runtime, source, log, logger, strongly_typed)
        network = parsed.network
        if not network.num_outputs:
            raise QATError(f"{_title(source)}: the graph has no outputs. Is it an ONNX file?")
        types = Types.of(trt, network)
        profiles = profiles_of(network, shapes or {}, batch)
        for name in _listed(outputs):
            _mark(trt, network, name)
        config = parsed.builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it, neither log nor inspector name tensors
        if runtime.has("PreviewFeature", "PROFILE_SHARING_0806"):
            # 8.6 lets one context alone use a profile otherwise; since 10 all may.
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        profile = add_profile(trt, parsed.builder, config, network, profiles, log)
        set_flag(config, trt.BuilderFlag.TF32, tf32)
        set_precisions(runtime, config, parsed.strong, types, fp16=fp16, bf16=bf16, int8=int8, calibrator=calibrator)
        if fp32_layers:
            keep_float(runtime, config, network, parsed.strong, _listed(fp32_layers))
        if types.quantized and not parsed.strong and fp16 is not False:
            attention_in_half(trt, config, network, _listed(fp32_layers))
        if workspace is not None:
            if workspace <= 0:
                raise QATError(f"workspace={workspace}: give a number of bytes above 0")
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if optimization_level is not None:
            if not 0 <= optimization_level <= 5:
                raise QATError(f"optimization_level={optimization_level}: choose 0 (fast build) to 5 (fast engine)")
            config.builder_optimization_level = optimization_level
        if timing_iterations is not None:
            if timing_iterations < 1:
                raise QATError(f"timing_iterations={timing_iterations}: measure each tactic at least once")
            config.avg_timing_iterations = timing_iterations
        if hardware_compatibility is not None:
            config.hardware_compatibility_level = _member(
                runtime,
                "HardwareCompatibilityLevel",
                hardware_compatibility,
                "hardware_compatibility",
                runtime.hardware_compatibility,
            )
        if version_compatible:
            set_flag(config, trt.BuilderFlag.VERSION_COMPATIBLE, True)
        built_for = _set_targets(runtime, config, None if targets is None else _listed(targets))
        if tactic_sources is not None:
            names = runtime.tactic_sources
            members = [_member(runtime, "TacticSource", name, "tactic_sources", names) for name in _listed(tactic_sources)]
            config.set_tactic_sources(sum(1 << int(member) for member in dict.fromkeys(members)))
        cache = _timing_cache(runtime, config, timing_cache, log)
        tensors = _signature(network, profiles)
        calibration = None if calibrator is None else calibrator.attach(runtime, config, profile, tensors[0])
        try:
            plan = _run_builder(runtime, parsed.builder, network, config, interruption, progress=progress)
        finally:
            if calibration is not None:
                calibration.close()
        if calibration is not None:
            calibration.finish(log, built=plan is not None)
        if plan is None:
            raise QATError(f"{runtime.title} could not build the engine{_remedy(log)}{log.quote()}")
        if cache is not None:
            assert timing_cache is not None
            write_whole(timing_cache, bytes(memoryview(cache.serialize())))
        return Engine(
            bytes(memoryview(plan)),
            runtime,
            log=log,
            onnx_path=None if isinstance(source, bytes) else str(source),
            tensors=tensors,
            host_code=version_compatible,
            targets=built_for,
        )


@dataclass
class _Parsed:
    """A parsed network with the objects it lives on, in the order they must outlive each other."""

    logger: Any
    builder: Any
    network: Any
    parser: Any
    strong: bool


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    """The names; one given bare would otherwise be taken for a sequence of letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def _source(onnx: str | os.PathLike[str] | bytes) -> Path | bytes:
    if isinstance(onnx, bytes):
        if not onnx:
            raise QATError("onnx: the graph is empty")
        return onnx
    path = Path(onnx)
    if not path.is_file():
        raise QATError(f"{path}: no such ONNX file")
    return path


def _check_graph(runtime: Runtime, source: Path | bytes) -> None:
    """Refuse what :func:`qat.export.check_onnx` calls an error, where onnx is installed."""
    if importlib.util.find_spec("onnx") is None:
        return
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from ..graph.check import check_onnx

    try:
        model = onnx.load_from_string(source) if isinstance(source, bytes) else source
    except DecodeError as error:
        raise QATError(f"{_title(source)}: not readable as ONNX: {error}") from error
    target = "rtx" if runtime.is_rtx else "8.6" if not runtime.strong_typing else "10" if runtime.weak_typing else "11"
    errors = [finding for finding in check_onnx(model, target=target) if finding.level == "error"]
    if errors:
        listed = "".join(f"\n  {finding}" for finding in errors[:10])
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise QATError(f"{_title(source)}: {runtime.title} would refuse it (check=False builds anyway):{listed}{more}")


def _title(source: Path | bytes) -> str:
    return "the ONNX graph" if isinstance(source, bytes) else str(source)


def _parse(runtime: Runtime, source: Path | bytes, log: BuildLog, logger: Any, strongly_typed: bool | None) -> _Parsed:
    if strongly_typed and not runtime.strong_typing:
        raise QATError(f"strongly_typed=True: {runtime.title} has only precision flags. Leave it out")
    if strongly_typed is False and not runtime.weak_typing:
        raise QATError(
            f"strongly_typed=False: {runtime.title} computes in the graph's types. Leave it out, and choose the types with "
            'qat.export_onnx(..., precision="fp16")'
        )
    if not runtime.weak_typing:
        return _parse_as(runtime, source, log, logger, strong=True)
    parsed = _parse_as(runtime, source, log, logger, strong=bool(strongly_typed))
    if strongly_typed is None and runtime.strong_typing and Types.of(runtime.module, parsed.network).dtypes & {HALF, BF16}:
        return _parse_as(runtime, source, log, logger, strong=True)
    return parsed


def _parse_as(runtime: Runtime, source: Path | bytes, log: BuildLog, logger: Any, *, strong: bool) -> _Parsed:
    trt: Any = runtime.module
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind11's words for a constructor that returned nothing
        raise QATError(f"{runtime.title} does not start: it needs a GPU and its driver{log.quote()}") from error
    flags = 0
    if strong and runtime.weak_typing:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    # Networks without batch dimension went with version 10, and the flag with 11.
    if not runtime.strong_typing:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(source) if isinstance(source, bytes) else parser.parse_from_file(str(source))
    if not parsed:
        errors = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
        listed = "".join(f"\n  {error}" for error in errors) or log.quote()
        raise QATError(f"{_title(source)}: {runtime.title} cannot read the graph:{listed}")
    return _Parsed(logger, builder, network, parser, strong)


def _describe(error: Any) -> str:
    # 8.6 gives the node's index alone.
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    node = f"{name} ({operator})" if name and operator else name or f"node {error.node()}"
    return f"{node}: {error.desc()}"


def _mark(trt: Any, network: Any, name: str) -> None:
    """Make the tensor ``name`` an output of the network.

    TensorRT 8.6 fails with an internal assertion where the result of a Q/DQ pair is an output itself; a copy of it may be one.
    """
    if any(network.get_output(i).name == name for i in range(network.num_outputs)):
        return
    names = []
    for layer in layers_of(network):
        for tensor in (layer.get_output(i) for i in range(layer.num_outputs)):
            if tensor.name == name:
                if layer.type == trt.LayerType.DEQUANTIZE:
                    tensor.name = f"{name} (not copied)"
                    tensor = network.add_identity(tensor).get_output(0)
                    tensor.name = name
                network.mark_output(tensor)
                return
            names.append(tensor.name)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"the nearest names are {', '.join(near)}" if near else "names are those of ONNX tensors, not nodes"
    raise QATError(f"outputs: the network has no tensor {name!r}; {hint}")


def _member(runtime: Runtime, enumeration: str, name: str, argument: str, choices: tuple[str, ...]) -> Any:
    if name.upper() not in choices:
        listed = f"Choose from {', '.join(choices)}" if choices else "Leave it out"
        raise QATError(f"{argument}: {runtime.title} has no {name!r}. {listed}")
    return getattr(getattr(runtime.module, enumeration), name.upper())


def _set_targets(runtime: Runtime, config: Any, targets: Sequence[str] | None) -> tuple[str, ...]:
    """What the engine is compiled ahead for; empty where it is built for the GPU that is there."""
    if not runtime.is_rtx:
        if targets:
            raise QATError(f"targets={tuple(targets)}: {runtime.title} builds for the GPU that is there. Leave it out")
        return ()
    names = tuple(targets) if targets else (local_target() or DEFAULT_TARGET,)
    members = [_member(runtime, "ComputeCapability", name, "targets", runtime.targets) for name in names]
    config.num_compute_capabilities = len(members)
    for i, member in enumerate(members):
        config.set_compute_capability(member, i)
    return names


def _timing_cache(runtime: Runtime, config: Any, path: str | os.PathLike[str] | None, log: BuildLog) -> Any:
    """Give the builder the file's tactics; None if there is no file to keep."""
    if path is None:
        return None
    if not runtime.timing_cache:
        warnings.warn(f"timing_cache: {runtime.title} measures no tactics while building; the file is left alone", stacklevel=3)
        return None
    file = Path(path)
    cache = config.create_timing_cache(read_whole(file) if file.is_file() else b"")
    # A cache of another version or GPU, or a damaged one, costs build time, nothing else.
    if cache is None or not config.set_timing_cache(cache, False):
        log.append(Record("WARNING", f"{file} is no timing cache of this version and GPU and is written anew"))
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _run_builder(
    runtime: Runtime, builder: Any, network: Any, config: Any, interruption: Interruption, *, progress: bool
) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruption.noted())
        if runtime.progress_monitor:
            display = stack.enter_context(Display()) if progress else None
            config.progress_monitor = make_monitor(runtime.module, interruption, display)
        return builder.build_serialized_network(network, config)


def _remedy(log: BuildLog) -> str:
    text = " ".join(log.errors()).lower()
    if any(words in text for words in ("outofmemory", "out of memory", "insufficient memory", "insufficient workspace")):
        return ". GPU memory did not suffice: lower batch=, shapes= or workspace=, or free memory"
    if "cuda initialization" in text or "cudaerror 35" in text:
        return ". It needs a GPU and its driver"
    if "could not find any implementation" in text:
        return ". No kernel fits a node: raise workspace=, or leave that node in float"
    return ""


def _signature(network: Any, profiles: Mapping[str, Any]) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return (
        tuple(TensorInfo(t.name, dtype_of(t.dtype), tuple(t.shape), *profiles[t.name]) for t in inputs),
        tuple(TensorInfo(t.name, dtype_of(t.dtype), tuple(t.shape)) for t in outputs),
    )
