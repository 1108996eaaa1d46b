"""Running, saving and loading: TensorRT-RTX as far as it goes without a GPU, 8.6, 10 and 11 on recorded bindings.

In the recorded ones (``fake_tensorrt``), "GPU" memory is the host's and ONNX's reference evaluator is the engine: what is
tested is that the right bytes lie at the right addresses. Real runs are marked ``gpu``.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict

import export_nets
import numpy as np
import onnxruntime
import pytest
import torch
from fake_tensorrt import VERSIONS, FakeCudaLibrary, FakeTensorRT, graph
from rtx import needs_rtx

import qat
from qat.errors import QATError
from qat.tensorrt import Engine, Runtime, build, inspect, layer_times, load
from qat.tensorrt.cuda import Cuda, has_gpu, local_target
from qat.tensorrt.runtime import MODULES

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="running an engine needs a CUDA device"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(module) for module in MODULES),
        reason="running an engine needs TensorRT (pip install -e '.[tensorrt]') or TensorRT-RTX (pip install -e '.[rtx]')",
    ),
]


@pytest.fixture(params=VERSIONS)
def recorded(request):
    return FakeTensorRT(request.param)


@pytest.fixture
def library():
    return FakeCudaLibrary()


def on(library, engine: Engine) -> Engine:
    """The engine on a recorded CUDA library."""
    engine.cuda = Cuda(library)
    return engine


def doubling(trt, library, folder, **settings) -> Engine:
    """An engine of y = -2x."""
    names = {name: settings.pop(name) for name in ("shape", "dtype") if name in settings}
    return on(library, build(graph(folder, **names), runtime=Runtime(trt), **settings))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- running on recorded bindings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["array", "list", "dict"])
def test_recorded_run_computes_the_graph(recorded, library, tmp_path, form):
    x = numbers(3, 4)
    inputs = {"array": x, "list": [x], "dict": {"x": x}}[form]
    outputs = doubling(recorded, library, tmp_path).run(inputs)
    assert set(outputs) == {"y"}
    np.testing.assert_array_equal(outputs["y"], -2 * x)


def test_recorded_runs_return_new_arrays(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    first, second = engine.run(numbers(3, 4, seed=1))["y"], engine.run(numbers(3, 4, seed=2))["y"]
    np.testing.assert_array_equal(first, -2 * numbers(3, 4, seed=1))
    np.testing.assert_array_equal(second, -2 * numbers(3, 4, seed=2))


@pytest.mark.parametrize("sizes", [(1, 32, 8), (32, 1)])
def test_recorded_batch_may_change_between_runs(recorded, library, tmp_path, sizes):
    engine = doubling(recorded, library, tmp_path)
    for size in sizes:
        x = numbers(size, 4, seed=size)
        np.testing.assert_array_equal(engine.run(x)["y"], -2 * x)


def test_recorded_buffers_are_used_again(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    engine.run(numbers(8, 4))
    before = set(library.memory)
    engine.run(numbers(8, 4))
    engine.run(numbers(2, 4))
    assert set(library.memory) == before


def test_recorded_extra_outputs_come_back(recorded, library, tmp_path):
    x = numbers(3, 4)
    outputs = doubling(recorded, library, tmp_path, outputs=["middle"]).run(x)
    np.testing.assert_array_equal(outputs["middle"], -x)


def test_recorded_numpy_run_waits_for_its_stream(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    engine.run(numbers(1, 4))
    stream = next(event[1] for event in library.events if event[0] == "create stream")
    assert library.events[-1] == ("synchronize", stream)


def test_recorded_context_enqueues_on_the_stream_given(recorded, library, tmp_path):
    x = numbers(3, 4)
    context = doubling(recorded, library, tmp_path).context()
    context.set_inputs(x)
    assert (context.bytes_in, context.bytes_out) == (48, 48)
    context.upload(7)
    context.enqueue(7)
    context.download(7)
    np.testing.assert_array_equal(context.outputs["y"], -2 * x)
    assert context._context.streams == [7]


def test_recorded_runs_on_another_stream_wait_for_the_last(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    context = engine.context()
    context.set_inputs(numbers(1, 4))
    engine._enqueue(context, 7)
    engine._enqueue(context, 7)
    engine._enqueue(context, 9)
    event = next(e[1] for e in library.events if e[0] == "create event")
    assert library.events[1:] == [("record", event, 7), ("record", event, 7), ("wait", 9, event), ("record", event, 9)]


def test_recorded_engine_serves_several_contexts(recorded, library, tmp_path):
    engine, x = doubling(recorded, library, tmp_path), numbers(3, 4)
    np.testing.assert_array_equal(engine.run(x)["y"], -2 * x)
    contexts = [engine.context(), engine.context()]
    for context in contexts:
        context.set_inputs(x)
        context.upload(7)
        context.enqueue(7)
        context.download(7)
        np.testing.assert_array_equal(context.outputs["y"], -2 * x)


@pytest.fixture
def built_elsewhere(monkeypatch, library, tmp_path):
    """An engine of 8.6 for a range of batch sizes, built without what lets contexts share their profile."""
    trt = FakeTensorRT("8.6.1")
    monkeypatch.setattr(trt.IBuilderConfig, "set_preview_feature", lambda config, feature, on: None)
    return doubling(trt, library, tmp_path)


def test_recorded_fixed_shapes_serve_several_contexts_without_a_profile(monkeypatch, library, tmp_path):
    trt, x = FakeTensorRT("8.6.1"), numbers(3, 4)
    monkeypatch.setattr(trt.IBuilderConfig, "set_preview_feature", lambda config, feature, on: None)
    engine = doubling(trt, library, tmp_path, batch=3)
    engine.run(x)
    kept = engine._context
    context = engine.context()
    context.set_inputs(x)
    context.upload(7)
    context.enqueue(7)
    context.download(7)
    np.testing.assert_array_equal(context.outputs["y"], -2 * x)
    assert context._context.active_optimization_profile == -1
    assert engine._context is kept


def test_recorded_run_makes_way_for_another_context(built_elsewhere):
    x = numbers(3, 4)
    built_elsewhere.run(x)
    context = built_elsewhere.context()
    context.set_inputs(x)
    context.upload(7)
    context.enqueue(7)
    context.download(7)
    np.testing.assert_array_equal(context.outputs["y"], -2 * x)
    context.close()
    np.testing.assert_array_equal(built_elsewhere.run(x)["y"], -2 * x)


def test_recorded_engine_that_serves_one_context_says_so(built_elsewhere):
    context = built_elsewhere.context()
    with pytest.raises(QATError, match=r"8\.6\.1: .*one context at a time.*Close that one.*qat\.tensorrt\.build"):
        built_elsewhere.run(numbers(3, 4))
    context.close()
    built_elsewhere.run(numbers(3, 4))


# --- inputs that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": numbers(1, 4)}, "input 'x' is missing"),
        ({"x": numbers(1, 4), "z": numbers(1, 4)}, "no input 'z'. Its inputs are x"),
        ([numbers(1, 4), numbers(1, 4)], "2 inputs given, the engine has 1: x"),
        (numbers(1, 4).astype(np.float64), r"input 'x' is float64, the engine takes float32. Use .astype\('float32'\)"),
        (numbers(1, 4).astype(">f4"), "input 'x' is >f4, the engine takes float32"),
        (numbers(4, 8)[:, ::2], "not contiguous.*ascontiguousarray"),
        (np.asfortranarray(numbers(4, 4)), "not contiguous.*ascontiguousarray"),
        (numbers(33, 4), r"shape \[33, 4\], the engine takes \[1, 4\] to \[32, 4\]"),
        (numbers(0, 4), r"shape \[0, 4\], the engine takes \[1, 4\] to \[32, 4\]"),
        (numbers(1, 5), r"shape \[1, 5\]"),
        (numbers(4), r"shape \[4\]"),
        ({"x": [1.0, 2.0]}, "input 'x' is a list. Pass a NumPy array or a PyTorch CUDA tensor"),
        (torch.zeros(1, 4), "input 'x' is on the cpu. Pass a CUDA tensor, or a NumPy array"),
        (torch.zeros(1, 4, dtype=torch.float64), r"input 'x' is float64.*\.to\(torch\.float32\)"),
        (torch.zeros(4, 4).t(), r"not contiguous.*\.contiguous\(\)"),
    ],
)
def test_recorded_inputs_that_do_not_fit(library, tmp_path, inputs, message):
    engine = doubling(FakeTensorRT("10.7.0"), library, tmp_path)
    with pytest.raises(QATError, match=message):
        engine.run(inputs)


def test_recorded_engine_runs_after_a_refused_input(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    with pytest.raises(QATError):
        engine.run(numbers(33, 4))
    np.testing.assert_array_equal(engine.run(numbers(2, 4))["y"], -2 * numbers(2, 4))


def test_recorded_other_gpu_is_refused(library, tmp_path):
    engine = doubling(FakeTensorRT("10.7.0"), library, tmp_path)
    engine.run(numbers(1, 4))
    library.device = 1
    with pytest.raises(QATError, match="GPU 1 is current, the engine is on GPU 0"):
        engine.run(numbers(1, 4))


def test_recorded_bfloat16_outputs_need_torch(library, tmp_path):
    trt = FakeTensorRT("10.7.0")
    engine = doubling(trt, library, tmp_path, dtype="BFLOAT16")
    assert engine.outputs[0].dtype == "bfloat16"
    with pytest.raises(QATError, match=r"the engine takes bfloat16. Use PyTorch CUDA tensors"):
        engine.run(numbers(1, 4))


# --- GPU memory ------------------------------------------------------------------------------------------------------


def test_recorded_close_gives_everything_back(recorded, library, tmp_path):
    with doubling(recorded, library, tmp_path) as engine:
        engine.run(numbers(8, 4))
        assert library.allocated > 0
    assert library.memory == {}
    made = [event for event in library.events if event[0].startswith("create")]
    assert len(made) == len([event for event in library.events if event[0].startswith("destroy")]) == 2


def test_recorded_forgotten_engine_gives_memory_back(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    engine.run(numbers(8, 4))
    del engine
    assert library.memory == {}
    assert sorted(event[0] for event in library.events[-2:]) == ["destroy event", "destroy stream"]


def test_recorded_out_of_memory_gives_everything_back(recorded, tmp_path):
    library = FakeCudaLibrary(limit=600)
    engine = doubling(recorded, library, tmp_path)
    engine.run(numbers(4, 4))
    with pytest.raises(QATError, match=r"512 bytes of GPU memory: CUDA error 2 \(out of memory\). Use a smaller batch"):
        engine.run(numbers(32, 4))
    assert library.memory == {}


def test_recorded_engine_runs_after_out_of_memory(recorded, tmp_path):
    engine = doubling(recorded, FakeCudaLibrary(limit=600), tmp_path)
    with pytest.raises(QATError):
        engine.run(numbers(32, 4))
    np.testing.assert_array_equal(engine.run(numbers(2, 4))["y"], -2 * numbers(2, 4))


def test_recorded_no_memory_for_activations(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    recorded.fail_context = True
    with pytest.raises(QATError, match=r"no memory for the engine's activations(.|\n)*OutOfMemory"):
        engine.run(numbers(1, 4))
    assert library.memory == {}


def test_recorded_closed_engine_can_run_again(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    engine.run(numbers(1, 4))
    engine.close()
    np.testing.assert_array_equal(engine.run(numbers(2, 4))["y"], -2 * numbers(2, 4))


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_recorded_loaded_engine_computes_the_same(recorded, library, tmp_path):
    doubling(recorded, library, tmp_path).save(tmp_path / "engine.plan")
    loaded = on(library, load(tmp_path / "engine.plan", Runtime(recorded)))
    assert loaded.log == []
    np.testing.assert_array_equal(loaded.run(numbers(3, 4))["y"], -2 * numbers(3, 4))


def test_recorded_loaded_engine_knows_its_profile(recorded, library, tmp_path):
    built = doubling(recorded, library, tmp_path, batch=(2, 3, 4))
    built.save(tmp_path / "engine.plan")
    loaded = on(library, load(tmp_path / "engine.plan", Runtime(recorded)))
    assert (loaded.inputs, loaded.outputs) == (built.inputs, built.outputs)


def test_recorded_plan_of_another_version(library, tmp_path):
    doubling(FakeTensorRT("8.6.1"), library, tmp_path).save(tmp_path / "engine.plan")
    loaded = on(library, load(tmp_path / "engine.plan", Runtime(FakeTensorRT("10.7.0"))))
    with pytest.raises(QATError, match=r"TensorRT 10.7.0 cannot load .*engine.plan: (.|\n)*version 10.7.0 got 8.6.1"):
        loaded.run(numbers(1, 4))


def test_recorded_corrupt_plan(recorded, library, tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"\x00\xff")
    loaded = on(library, load(tmp_path / "engine.plan", Runtime(recorded)))
    with pytest.raises(QATError, match=r"corrupt, or was built by another version(.|\n)*magicTag"):
        _ = loaded.inputs
    assert library.memory == {}


@pytest.mark.parametrize("host_code", [False, True])
def test_recorded_plans_bring_host_code_only_if_allowed(recorded, library, tmp_path, monkeypatch, host_code):
    allowed = []
    real = recorded.Runtime
    setting = property(None, lambda self, value: allowed.append(value))

    def watched(logger):
        runtime = real(logger)
        monkeypatch.setattr(type(runtime), "engine_host_code_allowed", setting, raising=False)
        return runtime

    recorded.Runtime = watched
    doubling(recorded, library, tmp_path).save(tmp_path / "engine.plan")
    on(library, load(tmp_path / "engine.plan", Runtime(recorded), host_code=host_code)).run(numbers(1, 4))
    assert allowed == ([True] if host_code else [])


def test_recorded_layer_information_is_the_inspectors(recorded, library, tmp_path):
    assert '"Layers"' in doubling(recorded, library, tmp_path).layer_information


def test_recorded_layers_of_open_dimensions_have_types(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    assert -1 in engine.inputs[0].shape
    layers = qat.tensorrt.inspect(engine).layers
    assert layers
    assert {layer.output_precision for layer in layers} == {"FP32"}


def test_recorded_inspection_without_memory_for_a_context(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    recorded.fail_context = True
    with pytest.raises(QATError, match=r"no memory for the engine's activations"):
        _ = engine.layer_information


def test_empty_plan_file(recorded, tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"")
    with pytest.raises(QATError, match=r"engine\.plan: the file is empty"):
        load(tmp_path / "engine.plan", Runtime(recorded))


def test_missing_plan_file(recorded, tmp_path):
    with pytest.raises(QATError, match=r"none\.plan: cannot be read: No such file"):
        load(tmp_path / "none.plan", Runtime(recorded))


def test_failed_save_leaves_the_old_file(recorded, library, tmp_path, monkeypatch):
    engine = doubling(recorded, library, tmp_path)
    (tmp_path / "engine.plan").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(QATError, match=r"engine\.plan: cannot be written: No space left"):
        engine.save(tmp_path / "engine.plan")
    assert (tmp_path / "engine.plan").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"engine.plan", "graph.onnx"}


def test_load_log_is_bounded(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    logger = engine.handle.logger
    for i in range(1000):
        logger.log(recorded.ILogger.WARNING, f"warning {i}")
    assert [record.message for record in engine.load_log][-1] == "warning 999"
    assert len(engine.load_log) <= 100


# --- TensorRT-RTX ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx_engine(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path_factory.mktemp("rtx") / "tiny.onnx"
    qat.export_onnx(export_nets.tiny(), path, export_nets.images())
    return build(path, runtime="tensorrt_rtx")


@needs_rtx
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_rtx_without_a_gpu_cannot_run(rtx_engine):
    with pytest.raises(QATError, match="no CUDA device: the engine can be saved here"):
        rtx_engine.run(export_nets.images().numpy())


@needs_rtx
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_rtx_without_a_gpu_has_no_layer_information(rtx_engine):
    assert rtx_engine.layer_information is None


@needs_rtx
def test_rtx_plan_is_saved_as_it_is(rtx_engine, tmp_path):
    rtx_engine.save(tmp_path / "tiny.plan")
    assert (tmp_path / "tiny.plan").read_bytes() == rtx_engine.plan
    assert load(tmp_path / "tiny.plan", "tensorrt_rtx").plan == rtx_engine.plan


@needs_rtx
def test_rtx_itself_reports_why_it_cannot_deserialize(rtx_engine):
    """With a device count that lies, TensorRT's own message comes through."""
    if has_gpu():
        pytest.skip("needs a machine without a GPU")
    engine = on(FakeCudaLibrary(), Engine(rtx_engine.plan, rtx_engine.runtime))
    with pytest.raises(QATError, match="cudaError 35"):
        _ = engine.handle


# --- really, on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An exported network, and its engine for this GPU."""
    path = tmp_path_factory.mktemp("gpu") / "tiny.onnx"
    qat.export_onnx(export_nets.tiny(), path, export_nets.images())
    major, minor = torch.cuda.get_device_capability()
    runtime = qat.tensorrt.find_runtime()
    targets = {"targets": [f"SM{major}{minor}"]} if runtime.is_rtx else {}
    return path, build(path, runtime=runtime, **targets)


class TestOnGpu:
    """Against ONNX Runtime on the CPU, on the runtime that is installed."""

    pytestmark = needs_gpu

    @staticmethod
    def reference(path, x):
        return onnxruntime.InferenceSession(path).run(None, {"images": x})[0]

    @pytest.mark.parametrize("batch", [1, 5, 32])
    def test_numpy(self, built, batch):
        path, engine = built
        x = export_nets.images(batch).numpy()
        expected = self.reference(path, x)
        assert np.abs(engine.run(x)["output"] - expected).max() <= 0.02 * np.abs(expected).max()

    def test_torch_tensors_on_the_callers_stream(self, built):
        path, engine = built
        x = export_nets.images(8)
        with torch.cuda.stream(torch.cuda.Stream()):
            output = engine.run(x.cuda())["output"]
            assert output.is_cuda
            result = output.cpu().numpy()
        expected = self.reference(path, x.numpy())
        assert np.abs(result - expected).max() <= 0.02 * np.abs(expected).max()

    def test_torch_and_numpy_agree_to_the_bit(self, built):
        _, engine = built
        x = export_nets.images(8)
        np.testing.assert_array_equal(engine.run(x.cuda())["output"].cpu().numpy(), engine.run(x.numpy())["output"])

    def test_saved_engine_computes_the_same(self, built, tmp_path):
        _, engine = built
        engine.save(tmp_path / "tiny.plan")
        x = export_nets.images(8).numpy()
        with load(tmp_path / "tiny.plan", engine.runtime) as loaded:
            np.testing.assert_array_equal(loaded.run(x)["output"], engine.run(x)["output"])

    def test_close_gives_memory_back(self, built):
        _, engine = built
        engine.run(export_nets.images(32).numpy())
        before = engine.cuda.free_memory()
        engine.close()
        assert engine.cuda.free_memory() >= before


# --- targets ---------------------------------------------------------------------------------------------------------


def test_recorded_compute_capability(library):
    assert Cuda(library).capability() == (8, 9)


@needs_rtx
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_rtx_builds_for_the_oldest_that_users_have(tmp_path):
    path = qat.export_onnx(export_nets.tiny(), tmp_path / "m.onnx", export_nets.images(1))
    assert local_target() is None
    engine = build(path, runtime="tensorrt_rtx")
    assert engine.targets == ("SM86",)
    assert inspect(engine).target == "SM86"


@needs_rtx
def test_engine_knows_its_targets(tmp_path):
    path = qat.export_onnx(export_nets.tiny(), tmp_path / "m.onnx", export_nets.images(1))
    assert build(path, runtime="tensorrt_rtx", targets=["SM89", "SM86"]).targets == ("SM89", "SM86")


def test_recorded_engine_of_the_local_gpu_has_no_targets(recorded, library, tmp_path):
    assert doubling(recorded, library, tmp_path).targets == ()


# --- times of layers -------------------------------------------------------------------------------------------------


def test_recorded_layer_times_are_medians_after_the_warm_up(recorded, library, tmp_path):
    times = defaultdict(lambda: iter([9.0, 1.0, 4.0]))
    recorded.layer_time = lambda name: next(times[name])
    engine = doubling(recorded, library, tmp_path)
    found = layer_times(engine, numbers(*engine.inputs[0].opt), runs=3, warm_up=5)
    assert set(found.values()) == {4.0}
    assert set(found) == set(times)


def test_recorded_layer_times_give_streams_and_memory_back(recorded, library, tmp_path):
    engine = doubling(recorded, library, tmp_path)
    inputs = numbers(*engine.inputs[0].opt)
    engine.run(inputs)
    engine.close()
    before = len(library.memory)
    del library.events[:]
    layer_times(engine, inputs, runs=1)
    engine.close()
    assert len(library.memory) == before
    assert [e[0] for e in library.events].count("create stream") == [e[0] for e in library.events].count("destroy stream") == 1


def test_layer_times_of_no_run(recorded, library, tmp_path):
    with pytest.raises(QATError, match="runs=0: measure at least one"):
        layer_times(doubling(recorded, library, tmp_path), numbers(2, 3), runs=0)
