"""Building: TensorRT-RTX for real; 8.6, 10 and 11 against what their bindings were recorded to have (``fake_tensorrt``)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import export_nets
import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import VERSIONS, FakeTensorRT, graph
from rtx import needs_rtx
from torch import nn

import qat
from qat.errors import QATError
from qat.tensorrt import EntropyCalibrator2, Runtime, build, find_runtime


@pytest.fixture(params=VERSIONS)
def recorded(request):
    """A version's recorded bindings."""
    return FakeTensorRT(request.param)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    qat.export_onnx(export_nets.tiny(), path, export_nets.images())
    return path


def build_with(trt, path, **settings):
    engine = build(path, runtime=Runtime(trt), **settings)
    return engine, trt.configs[-1]


# --- which runtime ---------------------------------------------------------------------------------------------------


def test_import_takes_neither_torch_nor_onnx_nor_polygraphy_nor_rich():
    names = "torch", "onnx", "polygraphy", "rich", "tensorrt_rtx"
    code = f"import sys, qat.tensorrt; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorrt_comes_before_rtx(monkeypatch, recorded):
    monkeypatch.setitem(sys.modules, "tensorrt", recorded)
    assert find_runtime().title == f"TensorRT {recorded.__version__}"


@pytest.mark.parametrize(
    ("name", "extras"), [(None, ["tensorrt", "rtx"]), ("tensorrt", ["tensorrt"]), ("tensorrt_rtx", ["rtx"])]
)
def test_missing_runtime_names_the_extra(monkeypatch, name, extras):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    wanted = " or ".join(f"`pip install -e '.[{extra}]'`" for extra in extras)
    with pytest.raises(QATError, match=re.escape(wanted)):
        find_runtime(name)


def test_runtime_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(QATError, match=r"tensorrt is installed but does not load: libnvinfer\.so\.10"):
        find_runtime("tensorrt")


def test_a_folder_of_that_name_is_no_runtime(monkeypatch, tmp_path):
    """Python imports any folder on its path, such as a checkout of TensorRT beside the user's script."""
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(QATError, match="tensorrt is not installed"):
        find_runtime("tensorrt")


def test_capabilities_of_recorded_versions():
    eight, ten, eleven = (Runtime(FakeTensorRT(version)) for version in VERSIONS)
    assert [runtime.weak_typing for runtime in (eight, ten, eleven)] == [True, True, False]
    assert [runtime.strong_typing for runtime in (eight, ten, eleven)] == [False, True, True]
    assert [runtime.calibrators for runtime in (eight, ten, eleven)] == [True, True, False]
    assert [runtime.progress_monitor for runtime in (eight, ten, eleven)] == [False, True, True]
    assert all(runtime.timing_cache for runtime in (eight, ten, eleven))


@needs_rtx
def test_capabilities_of_rtx():
    runtime = find_runtime("tensorrt_rtx")
    assert (runtime.weak_typing, runtime.strong_typing, runtime.calibrators, runtime.timing_cache) == (
        False,
        True,
        False,
        False,
    )
    assert runtime.progress_monitor
    assert {"SM86", "SM89"} <= set(runtime.targets)


@needs_rtx
@pytest.mark.parametrize("missing", [["torch"], ["torch", "onnx"], ["torch", "onnx", "polygraphy", "rich"]])
def test_rtx_builds_without_what_a_deployment_machine_lacks(tiny_file, missing):
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({missing}))", "from qat.tensorrt import build"]
    lines.append(f"print(build({str(tiny_file)!r}, runtime='tensorrt_rtx', progress=True).inputs[0].name)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("images", 0), done.stderr


# --- precision, recorded bindings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_recorded_weak_typing_sets_fp16_and_int8_for_a_quantized_graph(version, tmp_path):
    _, config = build_with(FakeTensorRT(version), graph(tmp_path, quantized=True))
    assert config.flags == {"TF32", "FP16", "INT8"}


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_recorded_weak_typing_can_be_without_fp16(version, tmp_path):
    _, config = build_with(FakeTensorRT(version), graph(tmp_path), fp16=False, tf32=False)
    assert config.flags == set()


def test_recorded_11_sets_no_precision_flag(tmp_path):
    _, config = build_with(FakeTensorRT("11.1.0"), graph(tmp_path, quantized=True))
    assert config.flags == {"TF32"}


@pytest.mark.parametrize(
    ("version", "dtype", "flags"),
    [
        ("8.6.1", "FLOAT", [1]),
        ("8.6.1", "FLOAT16", [1]),
        ("10.7.0", "FLOAT", [0]),
        # Parsed once to see its types, and once more with them.
        ("10.7.0", "FLOAT16", [0, 2]),
        ("11.1.0", "FLOAT16", [0]),
    ],
)
def test_recorded_network_flags(version, dtype, flags, tmp_path):
    trt = FakeTensorRT(version)
    build_with(trt, graph(tmp_path, dtype=dtype))
    assert trt.network_flags == flags


def test_recorded_strongly_typed_10_sets_no_precision_flag(tmp_path):
    _, config = build_with(FakeTensorRT("10.7.0"), graph(tmp_path, quantized=True), strongly_typed=True)
    assert config.flags == {"TF32"}


def test_recorded_8_has_no_strong_typing(tmp_path):
    with pytest.raises(QATError, match=r"strongly_typed=True: TensorRT 8\.6\.1 has only precision flags"):
        build_with(FakeTensorRT("8.6.1"), graph(tmp_path), strongly_typed=True)


def test_recorded_11_has_no_weak_typing(tmp_path):
    with pytest.raises(QATError, match=r"export_onnx\(\.\.\., precision="):
        build_with(FakeTensorRT("11.1.0"), graph(tmp_path), strongly_typed=False)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_recorded_11_points_to_the_export_for_precisions(name, tmp_path):
    with pytest.raises(QATError, match=rf'{name}=True: TensorRT 11.*precision="{name}"'):
        build_with(FakeTensorRT("11.1.0"), graph(tmp_path), **{name: True})


def test_recorded_11_takes_fp16_that_the_graph_has(tmp_path):
    engine, _ = build_with(FakeTensorRT("11.1.0"), graph(tmp_path, dtype="FLOAT16"), fp16=True)
    assert engine.inputs[0].dtype == np.float16


def test_recorded_8_has_no_bf16(tmp_path):
    with pytest.raises(QATError, match="has no BF16"):
        build_with(FakeTensorRT("8.6.1"), graph(tmp_path), bf16=True)


def test_recorded_10_sets_bf16(tmp_path):
    _, config = build_with(FakeTensorRT("10.7.0"), graph(tmp_path), bf16=True, fp16=False)
    assert config.flags == {"TF32", "BF16"}


def test_int8_needs_a_quantized_graph(recorded, tmp_path):
    with pytest.raises(QATError, match=r"int8=True: the graph holds no Q/DQ.*qat\.calibrate"):
        build_with(recorded, graph(tmp_path), int8=True)


def test_quantized_graph_needs_int8(recorded, tmp_path):
    with pytest.raises(QATError, match="int8=False: the graph holds Q/DQ"):
        build_with(recorded, graph(tmp_path, quantized=True), int8=False)


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_recorded_fp32_layers_are_constrained(version, tmp_path):
    trt = FakeTensorRT(version)
    seen = {}
    trt.on_build = lambda builder, network, config: seen.update({layer.name: layer for layer in network.layers}) or True
    _, config = build_with(trt, graph(tmp_path), fp32_layers=["sum"])
    assert "OBEY_PRECISION_CONSTRAINTS" in config.flags
    assert seen["sum"].precision == trt.DataType.FLOAT
    assert seen["sum"]._types == {0: trt.DataType.FLOAT}
    assert not hasattr(seen["negate"], "precision")


def test_recorded_fp32_layers_name_what_is_missing(tmp_path):
    with pytest.raises(QATError, match="no node 'summ'; the nearest are sum"):
        build_with(FakeTensorRT("8.6.1"), graph(tmp_path), fp32_layers=["summ"])


def test_recorded_11_has_no_fp32_layers(tmp_path):
    with pytest.raises(QATError, match=r"fp32_layers: TensorRT 11.*precision="):
        build_with(FakeTensorRT("11.1.0"), graph(tmp_path), fp32_layers=["sum"])


@pytest.fixture(scope="module")
def attention_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "attention.onnx"
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    qat.prepare(model, qat.QuantConfig(placement="fast", head=()))
    qat.calibrate(model, [tokens], progress=False)
    qat.export_onnx(model, path, tokens, opset=17)
    return path


def precisions(version, path, **settings):
    """Operator and precision of the layers that got one, and the build's flags."""
    trt, seen = FakeTensorRT(version), []
    trt.on_build = lambda builder, network, config: seen.extend(network.layers) or True
    _, config = build_with(trt, path, check=False, **settings)
    asked = [(layer.name, layer._node.op_type, layer.precision.name) for layer in seen if hasattr(layer, "precision")]
    return asked, config.flags


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_recorded_attention_beside_qdq_is_asked_for_in_half(version, attention_file):
    asked, flags = precisions(version, attention_file)
    kinds = [(op, precision) for _, op, precision in asked]
    # Neither the four linear layers, which are quantized, nor their biases, nor the layer norms.
    assert sorted(kinds) == [("MatMul", "HALF"), ("MatMul", "HALF"), ("Mul", "HALF"), ("Softmax", "HALF")]
    assert "PREFER_PRECISION_CONSTRAINTS" in flags


def test_recorded_attention_stays_float_without_fp16(attention_file):
    asked, flags = precisions("8.6.1", attention_file, fp16=False)
    assert asked == []
    assert "PREFER_PRECISION_CONSTRAINTS" not in flags


def test_recorded_attention_kept_in_float_by_name_stays_float(attention_file):
    (softmax,) = (name for name, op, _ in precisions("8.6.1", attention_file)[0] if op == "Softmax")
    asked, flags = precisions("8.6.1", attention_file, fp32_layers=[softmax])
    assert sorted((op, precision) for _, op, precision in asked) == [
        ("MatMul", "HALF"),
        ("MatMul", "HALF"),
        ("Mul", "HALF"),
        ("Softmax", "FLOAT"),
    ]
    assert {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"} & flags == {"OBEY_PRECISION_CONSTRAINTS"}


@pytest.mark.parametrize("quantized", [False, True])
def test_recorded_graphs_without_attention_get_no_constraints(quantized, tmp_path):
    asked, flags = precisions("8.6.1", graph(tmp_path, quantized=quantized))
    assert asked == []
    assert "PREFER_PRECISION_CONSTRAINTS" not in flags


def test_recorded_11_leaves_attention_to_the_graphs_types(attention_file):
    assert precisions("11.1.0", attention_file) == ([], {"TF32"})


# --- other settings, recorded bindings -------------------------------------------------------------------------------


def test_recorded_builds_are_detailed(recorded, tmp_path):
    _, config = build_with(recorded, graph(tmp_path))
    assert config.profiling_verbosity.name == "DETAILED"


def test_recorded_settings_reach_the_builder(recorded, tmp_path):
    settings = {"workspace": 1 << 28, "optimization_level": 5, "hardware_compatibility": "ampere_plus", "timing_iterations": 8}
    _, config = build_with(recorded, graph(tmp_path), version_compatible=True, **settings)
    assert config.called("memory") == [("WORKSPACE", 1 << 28)]
    assert config.builder_optimization_level == 5
    assert config.avg_timing_iterations == 8
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert "VERSION_COMPATIBLE" in config.flags


@pytest.mark.parametrize(("version", "mask"), [("8.6.1", 0b11000), ("10.7.0", 0b11000), ("11.1.0", 0b11)])
def test_recorded_tactic_sources_are_chosen_by_name(version, mask, tmp_path):
    _, config = build_with(
        FakeTensorRT(version), graph(tmp_path), tactic_sources=["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    )
    assert config.called("tactic_sources") == [mask]


def test_recorded_tactic_sources_stay_the_librarys_by_default(recorded, tmp_path):
    _, config = build_with(recorded, graph(tmp_path))
    assert config.called("tactic_sources") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tactic_sources": ["CUDNN"]}, r"tactic_sources: TensorRT 11\.1\.0 has no 'CUDNN'. Choose from EDGE_MASK"),
        ({"hardware_compatibility": "turing_plus"}, "hardware_compatibility: .*Choose from NONE, AMPERE_PLUS"),
        ({"targets": ["SM89"]}, "builds for the GPU that is there"),
        ({"workspace": 0}, "workspace=0"),
        ({"optimization_level": 6}, "optimization_level=6: choose 0"),
        ({"timing_iterations": 0}, "timing_iterations=0: measure each tactic at least once"),
        ({"batch": (4, 2, 8)}, "1 <= min <= opt <= max"),
        ({"batch": (0, 1, 2)}, "1 <= min <= opt <= max"),
        ({"shapes": {"image": ((1, 4),) * 3}}, "no input 'image'. Its inputs are x"),
        ({"shapes": {"x": (1, 4)}}, "three shapes"),
        ({"shapes": {"x": ((1,), (1,), (1,))}}, "has 2 dimensions"),
        ({"shapes": {"x": ((1, 5), (2, 5), (3, 5))}}, "dimension 1 is fixed to 4"),
        ({"shapes": {"x": ((2, 4), (1, 4), (3, 4))}}, "dimension 0 needs 0 <= min <= opt <= max"),
        ({"outputs": ["midle"]}, "no tensor 'midle'; the nearest names are middle"),
        ({"calibrator": object()}, "calibrator is a object"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    with pytest.raises(QATError, match=message):
        build_with(FakeTensorRT("11.1.0"), graph(tmp_path), **settings)


@pytest.mark.parametrize(("batch", "expected"), [((1, 8, 32), ((1, 4), (8, 4), (32, 4))), (16, ((16, 4), (16, 4), (16, 4)))])
def test_recorded_open_batch_gets_a_profile(recorded, batch, expected, tmp_path):
    engine, config = build_with(recorded, graph(tmp_path), batch=batch)
    assert [profile.shapes for profile in config._profiles] == [{"x": expected}]
    assert (engine.inputs[0].min, engine.inputs[0].opt, engine.inputs[0].max) == expected


def test_recorded_static_graph_gets_no_profile(recorded, tmp_path):
    engine, config = build_with(recorded, graph(tmp_path, shape=(3, 4)))
    assert config._profiles == []
    assert engine.inputs[0].min == engine.inputs[0].max == (3, 4)


def test_other_open_dimension_needs_shapes(recorded, tmp_path):
    with pytest.raises(
        QATError, match=r"input 'x' of shape \[-1, -1\] is open in dimension 1.*shapes=\{'x': \(min, opt, max\)\}"
    ):
        build_with(recorded, graph(tmp_path, shape=("n", "width")))


def test_shapes_open_other_dimensions(recorded, tmp_path):
    three = ((1, 2), (4, 8), (8, 16))
    _, config = build_with(recorded, graph(tmp_path, shape=("n", "width")), shapes={"x": three})
    assert config._profiles[0].shapes == {"x": three}


def test_one_name_may_come_bare(recorded, tmp_path):
    engine, _ = build_with(recorded, graph(tmp_path), outputs="middle")
    assert [info.name for info in engine.outputs] == ["y", "middle"]


def test_extra_outputs_are_marked_once(recorded, tmp_path):
    engine, _ = build_with(recorded, graph(tmp_path), outputs=["middle", "y"])
    assert [info.name for info in engine.outputs] == ["y", "middle"]


def test_result_of_a_qdq_pair_is_returned_as_a_copy(recorded, tmp_path):
    """TensorRT 8.6 fails to build where the result itself is an output."""
    engine, _ = build_with(recorded, graph(tmp_path, quantized=True), int8=True, outputs=["middle"])
    assert [info.name for info in engine.outputs] == ["y", "middle"]


def test_recorded_timing_cache_is_written_and_read_again(recorded, tmp_path):
    cache = tmp_path / "tactics"
    build_with(recorded, graph(tmp_path), timing_cache=cache)
    written = cache.read_bytes()
    given = []
    recorded.on_build = lambda builder, network, config: given.append(config.get_timing_cache().content) or True
    build_with(recorded, graph(tmp_path), timing_cache=cache)
    assert given == [written] != [b""]
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "tactics"}


def test_recorded_timing_cache_of_another_version_is_written_anew(recorded, tmp_path):
    cache = tmp_path / "tactics"
    cache.write_bytes(b"7.0.0 tactics")
    engine, _ = build_with(recorded, graph(tmp_path), timing_cache=cache)
    assert cache.read_bytes().startswith(recorded.__version__.encode())
    assert any("no timing cache of this version" in message for message in engine.log.warnings())


def test_failed_build_quotes_tensorrt_and_writes_nothing(recorded, tmp_path):
    def fail(builder, network, config):
        builder.logger.log(recorded.ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 999 bytes.)")
        return False

    recorded.on_build = fail
    with pytest.raises(QATError, match=r"GPU memory did not suffice(.|\n)*Requested size was 999 bytes"):
        build_with(recorded, graph(tmp_path), timing_cache=tmp_path / "tactics")
    assert not (tmp_path / "tactics").exists()


def test_unwritable_timing_cache_is_named(tmp_path):
    with pytest.raises(QATError, match="missing/tactics: cannot be written"):
        build_with(FakeTensorRT("10.7.0"), graph(tmp_path), timing_cache=tmp_path / "missing" / "tactics")


def test_parser_errors_name_the_node(recorded, tmp_path):
    node = "node 1" if recorded.major == 8 else r"odd \(Odd\)"
    with pytest.raises(QATError, match=f"cannot read the graph:\n  {node}: Plugin not found"):
        build_with(recorded, graph(tmp_path, ops="Odd"), check=False)


def test_recorded_builder_without_gpu_is_an_error(recorded, tmp_path):
    def none(logger):
        logger.log(recorded.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    recorded.Builder = none
    with pytest.raises(QATError, match=r"needs a GPU and its driver(.|\n)*CUDA initialization failure"):
        build_with(recorded, graph(tmp_path))


def test_recorded_quiet_log_has_no_verbose_records(recorded, tmp_path):
    loud, _ = build_with(recorded, graph(tmp_path))
    quiet, _ = build_with(recorded, graph(tmp_path), verbose_log=False)
    assert "VERBOSE" in {record.severity for record in loud.log}
    assert "VERBOSE" not in {record.severity for record in quiet.log}


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_recorded_interrupt_cancels_through_the_monitor(tmp_path):
    trt = FakeTensorRT("10.7.0")
    answers = []

    def interrupted(builder, network, config):
        config.progress_monitor.phase_start("Building", None, 3)
        answers.append(config.progress_monitor.step_complete("Building", 0))
        os.kill(os.getpid(), signal.SIGINT)
        answers.append(config.progress_monitor.step_complete("Building", 1))
        return answers[-1]

    trt.on_build = interrupted
    with pytest.raises(KeyboardInterrupt):
        build_with(trt, graph(tmp_path), timing_cache=tmp_path / "tactics")
    assert answers == [True, False]
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}


def test_recorded_8_is_interrupted_at_the_end_of_the_build(tmp_path, capsys):
    trt = FakeTensorRT("8.6.1")
    trt.on_build = lambda builder, network, config: os.kill(os.getpid(), signal.SIGINT) is None
    with pytest.raises(KeyboardInterrupt):
        build_with(trt, graph(tmp_path), timing_cache=tmp_path / "tactics")
    assert "finishes the step it is in first" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}


def test_interrupt_handler_is_put_back(recorded, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    build_with(recorded, graph(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_builds_off_the_main_thread(recorded, tmp_path):
    path, built = graph(tmp_path), []
    thread = threading.Thread(target=lambda: built.append(build_with(recorded, path)))
    thread.start()
    thread.join()
    assert len(built) == 1


# --- TensorRT-RTX, really --------------------------------------------------------------------------------------------


@needs_rtx
def test_rtx_builds_a_quantized_net_in_int8(tiny_file):
    engine = build(tiny_file, runtime="tensorrt_rtx")
    listing = next(message for _, message in engine.log if message.startswith("Layers:\n"))
    convolutions = [line for line in listing.splitlines() if "LayerType: correlation" in line]
    assert len(convolutions) == 6
    assert all(line.count("Datatype: Int8") >= 2 for line in convolutions)
    assert engine.onnx_path == str(tiny_file)


@needs_rtx
def test_rtx_signature_is_known_without_a_gpu(tiny_file):
    engine = build(tiny_file, runtime="tensorrt_rtx", batch=(2, 4, 6))
    (images,), (logits,) = engine.inputs, engine.outputs
    assert (images.name, images.dtype, images.shape) == ("images", np.float32, (-1, 3, 16, 16))
    assert (images.min, images.opt, images.max) == ((2, 3, 16, 16), (4, 3, 16, 16), (6, 3, 16, 16))
    assert (logits.dtype, logits.shape) == (np.float32, (-1, 10))


@needs_rtx
def test_rtx_builds_bytes_like_the_file(tiny_file):
    engine = build(tiny_file.read_bytes(), runtime="tensorrt_rtx")
    assert engine.onnx_path is None
    assert [info.name for info in engine.inputs] == ["images"]


@needs_rtx
def test_rtx_finds_external_data(tiny_file, tmp_path):
    moved = tmp_path / "external.onnx"
    onnx.save(onnx.load(tiny_file), moved, save_as_external_data=True, size_threshold=64, location="weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size > 1000
    assert build(moved, runtime="tensorrt_rtx").plan


@needs_rtx
def test_rtx_builds_for_several_targets(tiny_file):
    sizes = [len(build(tiny_file, runtime="tensorrt_rtx", targets=targets).plan) for targets in (["SM86"], ["SM86", "SM89"])]
    assert sizes[1] > sizes[0]


@needs_rtx
def test_rtx_unknown_target_lists_the_known(tiny_file):
    with pytest.raises(QATError, match=r"targets: TensorRT-RTX .* has no 'SM90'. Choose from .*SM86"):
        build(tiny_file, runtime="tensorrt_rtx", targets=["SM90"])


@needs_rtx
def test_rtx_marks_extra_outputs(tiny_file):
    inner = next(node for node in onnx.load(tiny_file).graph.node if node.op_type == "Relu").output[0]
    engine = build(tiny_file, runtime="tensorrt_rtx", outputs=[inner])
    assert [info.name for info in engine.outputs] == ["output", inner]


@needs_rtx
def test_rtx_marks_results_of_qdq_pairs(tmp_path):
    engine = build(graph(tmp_path, quantized=True), runtime="tensorrt_rtx", outputs=["middle"])
    assert [info.name for info in engine.outputs] == ["y", "middle"]


@needs_rtx
def test_rtx_ignores_a_timing_cache_loudly(tiny_file, tmp_path):
    with pytest.warns(UserWarning, match="timing_cache: TensorRT-RTX"):
        build(tiny_file, runtime="tensorrt_rtx", timing_cache=tmp_path / "tactics")
    assert not (tmp_path / "tactics").exists()


@needs_rtx
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, r'fp16=True: .*precision="fp16"'),
        ({"bf16": True}, r'bf16=True: .*precision="bf16"'),
        ({"fp32_layers": ["x"]}, r"fp32_layers: .*precision="),
        ({"strongly_typed": False}, r"strongly_typed=False: .*precision="),
        ({"hardware_compatibility": "ampere_plus"}, r"hardware_compatibility: .*Leave it out"),
        ({"calibrator": EntropyCalibrator2([])}, r"qat\.calibrate"),
    ],
)
def test_rtx_refuses_what_it_does_not_have(tiny_file, settings, message):
    with pytest.raises(QATError, match=message):
        build(tiny_file, runtime="tensorrt_rtx", **settings)


@needs_rtx
def test_rtx_refuses_what_the_check_finds(tiny_file, tmp_path):
    model = onnx.load(tiny_file)
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == quantize.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(np.zeros(scale.dims, np.float32), scale.name))
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    with pytest.raises(QATError, match=re.escape(quantize.name)):
        build(broken, runtime="tensorrt_rtx")


@needs_rtx
def test_rtx_quotes_its_own_error_when_unchecked(tiny_file, tmp_path):
    model = onnx.load(tiny_file)
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == quantize.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(np.full(scale.dims, -1, np.float32), scale.name))
    with pytest.raises(QATError, match="Scale coefficients must all be positive"):
        build(model.SerializeToString(), runtime="tensorrt_rtx", check=False)


@needs_rtx
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("content", [b"", b"no protobuf", b"\x08\x07"], ids=["empty", "text", "no graph"])
def test_rtx_file_that_is_no_onnx(content, check, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(QATError):
        build(path, runtime="tensorrt_rtx", check=check)


@needs_rtx
def test_rtx_missing_file(tmp_path):
    with pytest.raises(QATError, match="no such ONNX file"):
        build(tmp_path / "none.onnx", runtime="tensorrt_rtx")


@needs_rtx
def test_rtx_interrupted_build_stops(tmp_path):
    """Ctrl-C arrives while TensorRT is at work: the handler is ours only then."""
    nodes, weights, name = [], [], "x"
    for i in range(60):
        weights.append(onnx.numpy_helper.from_array(np.full((32, 32, 3, 3), i + 1, np.float32), f"w{i}"))
        nodes.append(onnx.helper.make_node("Conv", [name, f"w{i}"], [f"y{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(onnx.helper.make_node("Relu", [f"y{i}"], [f"r{i}"], f"relu{i}"))
        name = f"r{i}"
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 32, 16, 16]) for n in ("x", name)]
    proto = onnx.helper.make_graph(nodes, "deep", values[:1], values[1:], weights)
    onnx.save(
        onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "deep.onnx"
    )
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while signal.getsignal(signal.SIGINT) is before:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "deep.onnx", runtime="tensorrt_rtx", check=False)
    finally:
        thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in Path(tmp_path).iterdir()] == ["deep.onnx"]


def test_recorded_progress_without_rich_is_a_line_a_phase(monkeypatch, tmp_path, capsys):
    trt = FakeTensorRT("10.7.0")

    def report(builder, network, config):
        config.progress_monitor.phase_start("Building", None, 2)
        config.progress_monitor.phase_start("Timing", "Building", 5)
        config.progress_monitor.step_complete("Timing", 0)
        config.progress_monitor.phase_finish("Timing")
        return True

    trt.on_build = report
    monkeypatch.setitem(sys.modules, "rich", None)
    build_with(trt, graph(tmp_path), progress=True)
    assert capsys.readouterr().err == "Building\n  Timing\n"


@needs_rtx
def test_rtx_shows_its_progress_on_stderr_alone(tiny_file, capfd):
    build(tiny_file, runtime="tensorrt_rtx", progress=True)
    assert capfd.readouterr().out == ""
