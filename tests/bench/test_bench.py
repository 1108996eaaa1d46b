"""Measuring: statistics, the loop on a simulated GPU, targets on the CPU, NVML against recorded behaviour."""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qat.bench import GpuMonitor, Summary, Target, demonstrate_no_sync, latency, percentile, sweep
from qat.bench.batches import repeat
from qat.bench.cuda import CudaEvents, CudaRuntime
from qat.bench.targets import open_engine, random_array
from qat.errors import QATError

QUICK = {"warm_up": 0.0, "duration": 0.0}


# Statistics


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [
        # By hand from trtexec's formula in float32: 1 - 0.99f is 0.00999999, times 100 is below 1, nothing is excluded.
        (100, 99, 100),
        (100, 95, 95),
        (100, 90, 90),
        (10, 90, 9),
        (10, 99, 10),
        (1, 50, 1),
        (4, 0, 1),
        (4, 100, 4),
        (1000, 99, 991),
    ],
)
def test_percentile_is_the_element_that_trtexec_takes(count, percent, rank):
    times = np.random.default_rng(0).permutation(np.arange(1, count + 1)).tolist()
    assert percentile(times, percent) == rank


def test_summary_agrees_with_the_standard_library():
    times = np.random.default_rng(1).gamma(2.0, 1.5, 1001).tolist()
    summary = Summary.of(times)
    assert summary.mean == pytest.approx(statistics.fmean(times))
    assert summary.median == statistics.median(times)
    assert (summary.minimum, summary.maximum) == (min(times), max(times))
    assert summary.variation == pytest.approx(statistics.pstdev(times) / statistics.fmean(times) * 100)


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert Summary.of([4.0, 1.0, 2.0, 100.0]).median == 3.0


def test_no_measurements_are_refused():
    with pytest.raises(QATError, match="nothing was measured"):
        Summary.of([])


# The loop, on a simulated machine


class Machine:
    """A host and a GPU that work in parallel; time is simulated, in ns."""

    device = "00000000:01:00.0"

    def __init__(self, launch=0, compute=0, h2d=0, d2h=0):
        self.launch, self.durations = launch, {"compute": compute, "h2d": h2d, "d2h": d2h}
        self.host = self.gpu = 0
        self.in_flight, self.most_in_flight, self.runs, self.synchronisations = 0, 0, 0, 0

    def clock(self):
        return self.host

    def work(self, kind):
        def start():
            self.host += self.launch if kind == "compute" else 0
            self.gpu = max(self.gpu, self.host) + self.durations[kind]
            if kind == "compute":
                self.runs += 1
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)

        return start

    def event(self):
        return SimulatedEvent(self)

    def synchronize(self):
        self.host = max(self.host, self.gpu)
        self.in_flight = 0
        self.synchronisations += 1

    def close(self):
        pass

    def target(self, **changes):
        return Target(
            "simulated", self.work("compute"), stream=self, copy_in=self.work("h2d"), copy_out=self.work("d2h"), **changes
        )


class SimulatedEvent:
    def __init__(self, machine):
        self.machine = machine
        self.at = math.nan
        self.run = 0

    def record(self):
        self.at = max(self.machine.gpu, self.machine.host)
        self.run = self.machine.runs

    def synchronize(self):
        self.machine.host = max(self.machine.host, self.at)
        self.machine.in_flight = self.machine.runs - self.run
        self.machine.synchronisations += 1

    def since(self, earlier):
        return (self.at - earlier.at) / 1e6


def measure(machine, **options):
    return latency(machine.target(batch=options.pop("batch", None)), clock=machine.clock, monitor=False, **options)


def test_compute_is_the_time_between_the_events():
    result = measure(Machine(launch=100_000, compute=5_000_000))
    # The first run starts on an idle GPU, so its interval includes the launch.
    assert result.compute.median == 5.0
    assert result.compute.maximum == pytest.approx(5.1)
    assert result.enqueue.median == pytest.approx(0.1)


def test_gpu_is_not_idle_between_runs():
    machine = Machine(launch=1_000_000, compute=5_000_000)
    assert measure(machine).throughput == pytest.approx(200, rel=0.01)
    assert measure(Machine(1_000_000, 5_000_000), in_flight=1).throughput == pytest.approx(1000 / 6, rel=0.01)


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_no_more_runs_are_in_flight_than_asked_for(in_flight):
    machine = Machine(launch=1000, compute=1_000_000)
    measure(machine, in_flight=in_flight)
    assert machine.most_in_flight == in_flight


def test_every_run_is_waited_for():
    machine = Machine(launch=1000, compute=1_000_000)
    result = measure(machine, warm_up=0.01, duration=0.05)
    warm_ups = machine.runs - result.runs
    assert warm_ups > 0
    assert machine.synchronisations == warm_ups + result.runs


def test_copies_are_timed_apart_and_latency_is_the_sum():
    result = measure(Machine(launch=1000, compute=4_000_000, h2d=2_000_000, d2h=1_000_000), copies=True)
    assert (result.h2d.median, result.compute.median, result.d2h.median) == (2.0, 4.0, 1.0)
    assert result.latency.median == 7.0


def test_without_copies_latency_is_compute():
    result = measure(Machine(compute=4_000_000, h2d=2_000_000))
    assert result.latency == result.compute
    assert result.h2d is None


def test_throughput_pass_synchronises_once():
    machine = Machine(launch=10_000, compute=1_000_000)
    result = measure(machine, throughput=True, duration=0.1, warm_up=0.0)
    # One warm-up run, the latency runs, one more for the whole pass.
    assert machine.synchronisations == 1 + result.runs + 1
    assert machine.runs > 2 * result.runs * 0.95
    assert result.throughput == pytest.approx(1000, rel=0.01)
    assert result.synchronised_once


def test_duration_and_minimum_are_both_reached():
    assert measure(Machine(compute=1_000_000), duration=0.5).walltime >= 0.5
    assert measure(Machine(compute=1_000_000_000), duration=0.5, min_runs=10).runs == 10


def test_enqueue_bound_is_said_with_the_remedy():
    result = measure(Machine(launch=2_000_000, compute=1_000_000))
    assert result.is_enqueue_bound
    assert any("bound by enqueueing" in w and "cuda_graph=True" in w for w in result.warnings)


@pytest.mark.parametrize(("enqueue", "bound"), [(0.8, False), (0.81, True)])
def test_enqueue_bound_begins_above_four_fifths(enqueue, bound):
    result = measure(Machine(compute=1_000_000))
    changed = replace(result, compute=Summary.of([1.0]), enqueue=Summary.of([enqueue]))
    assert changed.is_enqueue_bound is bound


def test_copies_that_take_as_long_as_compute_are_said():
    result = measure(Machine(compute=1_000_000, h2d=1_000_000), copies=True)
    assert any("copying inputs" in w for w in result.warnings)
    assert not any("copying outputs" in w for w in result.warnings)


@pytest.mark.parametrize(("other", "unstable"), [(1.0, False), (1.06, True)])
def test_unstable_measurement_is_said(other, unstable):
    result = replace(measure(Machine(compute=1_000_000)), compute=Summary.of([1.0, other]))
    assert any("coefficient of variation" in w for w in result.warnings) is unstable


def test_timing_without_synchronisation_shows_the_launch_only():
    machine = Machine(launch=10_000, compute=1_000_000)
    shown = demonstrate_no_sync(machine.target(), clock=machine.clock)
    assert shown.wrong == pytest.approx(0.01)
    assert shown.right == pytest.approx(1.0, rel=0.01)
    assert "times as much" in str(shown)


def test_nothing_to_synchronise_on_the_cpu():
    assert "nothing to synchronise" in str(demonstrate_no_sync(Target("nap", lambda: time.sleep(0.001)), warm_up=0))


def test_known_sleep_is_measured():
    result = latency(Target("nap", lambda: time.sleep(0.005)), warm_up=0, duration=0.1)
    # A sleep may be longer than asked for on a busy machine, never shorter.
    assert 5.0 <= result.compute.minimum < 20
    assert result.enqueue is None
    assert result.throughput <= 200


def test_garbage_collection_is_on_again_after_a_failure():
    import gc

    def fail():
        if not gc.isenabled():
            raise RuntimeError("measured")

    with pytest.raises(RuntimeError, match="measured"):
        latency(Target("failing", fail), **QUICK)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": -1}, "warm_up=-1"),
        ({"duration": math.nan}, "duration=nan"),
        ({"duration": math.inf}, "duration=inf"),
        ({"min_runs": 0}, "min_runs=0"),
        ({"in_flight": 0}, "in_flight=0"),
        ({"copies": True}, "nothing to copy"),
        ({"cuda_graph": True}, "Move it to a GPU"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(QATError, match=message):
        latency(Target("sum", lambda: sum(range(9))), **options)


# The result


def test_json_has_settings_versions_and_warnings(tmp_path):
    measure(Machine(launch=2_000_000, compute=1_000_000), batch=4, copies=True).save(tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert {"copies", "spin_wait", "cuda_graph", "profile"} <= set(content["settings"])
    assert content["settings"]["copies"] is True
    assert {"qat", "python"} <= set(content["versions"])
    # 1 ms of work, but the GPU waits 2 ms for the host to start it.
    assert content["compute"]["median"] == 2.0
    assert content["items_per_second"] == pytest.approx(4 * content["throughput"])
    assert "bound by enqueueing" in content["warnings"][0]


def test_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(QATError, match="cannot be written"):
        measure(Machine(compute=1_000_000)).save(tmp_path / "out.json")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_text_states_the_four_settings():
    text = str(measure(Machine(compute=1_000_000)))
    assert "copies off, spin wait on, CUDA graph off, profile run off" in text


# Targets


@pytest.fixture
def model_file(tmp_path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_module_is_measured_without_gradients():
    class Probe(nn.Module):
        modes: list = []  # noqa: RUF012

        def forward(self, x, *, scale):
            self.modes.append(torch.is_grad_enabled())
            return x * scale

    result = latency(Probe().eval(), {"x": torch.ones(4, 2), "scale": 3}, **QUICK)
    assert not any(Probe.modes)
    assert result.batch == 4
    assert result.versions["torch"] == torch.__version__
    assert torch.is_grad_enabled()


def test_training_mode_is_noted():
    assert "training mode" in latency(nn.Linear(2, 2), torch.ones(1, 2), **QUICK).notes[0]


def test_module_without_example_is_refused():
    with pytest.raises(QATError, match="needs an example"):
        latency(nn.Identity())


def test_module_and_inputs_on_two_devices_are_named():
    with pytest.raises(QATError, match=r"module on meta, inputs on cpu"):
        latency(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))


@pytest.mark.parametrize("as_session", [False, True])
def test_onnx_is_measured_with_random_inputs_of_the_batch(model_file, as_session):
    import onnxruntime

    target = onnxruntime.InferenceSession(str(model_file)) if as_session else model_file
    result = latency(target, batch=5, **QUICK)
    assert result.batch == 5
    assert result.versions["onnxruntime"] == onnxruntime.__version__


def test_onnx_refuses_inputs_that_do_not_fit(model_file):
    with pytest.raises(QATError, match="cannot run the model"):
        latency(model_file, np.zeros((2, 4), np.float32), **QUICK)
    with pytest.raises(QATError, match="'z'; the model's are 'x'"):
        latency(model_file, {"z": np.zeros((2, 3), np.float32)}, **QUICK)


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad.txt").write_bytes(b"")
    with pytest.raises(QATError, match=r"bad\.onnx: ONNX Runtime cannot load"):
        latency(tmp_path / "bad.onnx")
    with pytest.raises(QATError, match=r"none\.onnx: no such file"):
        latency(tmp_path / "none.onnx")
    with pytest.raises(QATError, match=r"expected an ONNX file"):
        latency(tmp_path / "bad.txt")


def test_something_else_is_refused():
    with pytest.raises(QATError, match="target is a int"):
        latency(3)


def test_random_integers_are_valid_indices():
    assert not random_array("int64", (2, 3)).any()
    assert random_array("float16", (2, 3)).dtype == np.float16


def test_importing_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rich'] = sys.modules['onnx'] = None\n"
        "from qat.bench import latency, sweep, Target, GpuMonitor, demonstrate_no_sync\n"
        "result = sweep(lambda n: Target('sum', lambda: sum(range(n))), [1, 2], warm_up=0, duration=0)\n"
        "print(result)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "runs/s" in done.stdout


# Engines: the calls that the adapter makes, on an engine and a CUDA library of the same interface


class RecordedLibrary:
    """A CUDA runtime whose functions succeed, except those in ``fails``, and are listed in ``calls``."""

    def __init__(self, **fails):
        self.fails, self.calls, self.memory = fails, [], []

    def __getitem__(self, name):
        def function(*arguments):
            self.calls.append(name)
            if name == "cudaGetErrorString":
                return b"a reason"
            if name == "cudaHostAlloc":
                self.memory.append(np.zeros(arguments[1], np.uint8))
                arguments[0]._obj.value = self.memory[-1].ctypes.data
            elif name in ("cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaGraphInstantiateWithFlags"):
                arguments[0]._obj.value = 1000 + len(self.calls)
            return self.fails.get(name, 0)

        return function


class RecordedEngine:
    """An engine that doubles on the host, in the order its stream is told to; shapes (1..8, 3), tuned for 4."""

    runtime = SimpleNamespace(name="tensorrt", module=SimpleNamespace(__version__="0"))
    inputs = (SimpleNamespace(name="x", dtype_name="float32", shape=(-1, 3), min=(1, 3), opt=(4, 3), max=(8, 3)),)

    def __init__(self):
        self.log = []
        self.outputs = {}

    def context(self):
        return self

    def set_inputs(self, arrays):
        self.arrays = dict(arrays)
        self.outputs = {"y": np.empty_like(arrays["x"])}

    def upload(self, stream):
        self.log.append(("upload", stream))
        self.device = self.arrays["x"].copy()

    def enqueue(self, stream):
        self.log.append(("enqueue", stream))
        self.result = self.device * 2

    def download(self, stream):
        self.log.append(("download", stream))
        self.outputs["y"][...] = self.result

    def close(self):
        self.log.append(("close", 0))


@pytest.fixture
def opened():
    import contextlib

    library, engine = RecordedLibrary(), RecordedEngine()
    with contextlib.ExitStack() as stack:
        events = CudaEvents(runtime=CudaRuntime(library))
        stack.callback(events.close)
        yield SimpleNamespace(library=library, engine=engine, events=events, stack=stack)


def test_engine_copies_go_through_pinned_memory(opened):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    target = open_engine(opened.engine, x, None, True, False, opened.events, opened.stack)
    target.copy_in()
    target.enqueue()
    target.copy_out()
    (given, received) = (opened.engine.arrays["x"], opened.engine.outputs["y"])
    pinned = [(m.ctypes.data, m.ctypes.data + m.nbytes) for m in opened.library.memory]
    assert all(any(low <= a.ctypes.data < high for low, high in pinned) for a in (given, received))
    np.testing.assert_array_equal(received, x * 2)
    assert {stream for _, stream in opened.engine.log} == {opened.events.stream}
    assert target.batch == 2


def test_engine_has_its_data_without_copies_too(opened):
    open_engine(opened.engine, np.ones((2, 3), np.float32), None, False, False, opened.events, opened.stack)
    assert opened.engine.log[0][0] == "upload"


def test_engine_runs_once_before_its_capture(opened):
    target = open_engine(opened.engine, None, 4, False, True, opened.events, opened.stack)
    names = [name for name in opened.library.calls if "Capture" in name]
    assert names == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]
    assert [name for name, _ in opened.engine.log].count("enqueue") == 2
    target.enqueue()
    assert [name for name, _ in opened.engine.log].count("enqueue") == 2
    assert opened.library.calls[-1] == "cudaGraphLaunch"


def test_random_engine_inputs_have_the_tuned_shape_or_the_batch(opened):
    assert open_engine(opened.engine, None, None, False, False, opened.events, opened.stack).batch == 4
    open_engine(opened.engine, None, 7, False, False, opened.events, opened.stack)
    assert opened.engine.arrays["x"].shape == (7, 3)
    with pytest.raises(QATError, match="batches from 1 to 8"):
        open_engine(opened.engine, None, 9, False, False, opened.events, opened.stack)


def test_everything_is_given_back(opened):
    open_engine(opened.engine, None, 2, True, True, opened.events, opened.stack)
    opened.events.event()
    opened.stack.close()
    calls = opened.library.calls
    for made, destroyed in (
        ("cudaStreamCreateWithFlags", "cudaStreamDestroy"),
        ("cudaEventCreateWithFlags", "cudaEventDestroy"),
        ("cudaHostAlloc", "cudaFreeHost"),
        ("cudaGraphInstantiateWithFlags", "cudaGraphExecDestroy"),
    ):
        assert calls.count(made) == calls.count(destroyed) > 0
    assert opened.engine.log[-1][0] == "close"


def test_capture_that_fails_is_ended_and_said(opened):
    opened.library.fails["cudaStreamEndCapture"] = 901
    with pytest.raises(QATError, match=r"can't be captured.*CUDA error 901 \(a reason\).*cuda_graph=False"):
        opened.events.capture(lambda: None)
    with pytest.raises(QATError, match="refused to start"):
        opened.events.capture(lambda: (_ for _ in ()).throw(QATError("refused to start")))
    assert opened.library.calls.count("cudaStreamEndCapture") == 2


def test_cuda_errors_carry_name_and_reason():
    with pytest.raises(QATError, match=r"cudaStreamCreateWithFlags: CUDA error 100 \(a reason\)"):
        CudaEvents(runtime=CudaRuntime(RecordedLibrary(cudaStreamCreateWithFlags=100)))


# NVML


class NVMLError(Exception):
    pass


class RecordedNvml:
    """``pynvml`` of a GPU that reports everything but what is in ``missing``."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, missing=(), reasons=0x1):
        self.missing, self.reasons, self.open = missing, reasons, 0
        self.power = iter(range(100_000, 10_000_000, 50_000))

    def _answer(self, name, value):
        if name in self.missing:
            raise NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        self._answer("init", None)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._answer("device", uuid)

    nvmlDeviceGetHandleByPciBusId = nvmlDeviceGetHandleByUUID

    def nvmlDeviceGetName(self, handle):
        return b"A GPU"

    def nvmlSystemGetDriverVersion(self):
        return "1.2"

    def nvmlDeviceGetUtilizationRates(self, handle):
        return self._answer("utilization", SimpleNamespace(gpu=97, memory=31))

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._answer("clock", {1: 1980, 2: 2619}[kind])

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._answer("temperature", 45)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("power", next(self.power))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._answer("reasons", self.reasons)


def test_monitor_samples_in_the_background():
    nvml = RecordedNvml()
    with GpuMonitor("GPU-1", interval=0.005, nvml=nvml) as monitor:
        time.sleep(0.1)
    load = monitor.load()
    assert load.samples > 3
    assert (load.name, load.driver, load.utilization.mean, load.sm_clock.mean) == ("A GPU", "1.2", 97, 1980)
    # The first 100 W were the question whether power is reported at all.
    assert load.power.minimum == 150
    assert load.power.maximum == 100 + 50 * load.samples
    assert nvml.open == 0


def test_short_run_is_sampled_once():
    with GpuMonitor("0000:01:00.0", interval=60, nvml=RecordedNvml()) as monitor:
        pass
    assert monitor.load().samples == 1


def test_what_a_gpu_does_not_report_is_none():
    with GpuMonitor("GPU-1", nvml=RecordedNvml(missing=("utilization", "reasons"))) as monitor:
        pass
    assert monitor.load().utilization is None
    assert monitor.load().throttle_reasons == ()
    assert monitor.load().temperature.mean == 45


@pytest.mark.parametrize(
    ("reasons", "slowdowns"), [(0x1, ()), (0x2, ()), (0x4 | 0x40, ("software power cap", "hardware thermal"))]
)
def test_idle_and_chosen_clocks_are_no_slowdown(reasons, slowdowns):
    with GpuMonitor("GPU-1", nvml=RecordedNvml(reasons=reasons)) as monitor:
        pass
    found = monitor.load().slowdowns
    assert len(found) == len(slowdowns)
    assert all(text.startswith(wanted) for text, wanted in zip(found, slowdowns, strict=True))


@pytest.mark.parametrize(("missing", "message"), [("init", "NVML does not start"), ("device", "does not know the GPU GPU-1")])
def test_nvml_that_fails_says_so_and_is_closed(missing, message):
    nvml = RecordedNvml(missing=(missing,))
    with pytest.raises(QATError, match=message):
        GpuMonitor("GPU-1", nvml=nvml)
    assert nvml.open == 0


def test_missing_nvml_is_said_in_the_result(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    result = latency(Machine(compute=1_000_000).target(), **QUICK)
    assert result.gpu is None
    assert "nvidia-ml-py" in result.gpu_missing
    assert "nvidia-ml-py" in str(result)


# Sweep


@pytest.fixture
def swept(monkeypatch):
    machines = {batch: Machine(launch=1_000_000, compute=500_000 * batch + 500_000) for batch in (1, 2, 8)}
    ticks = lambda: sum(machine.host for machine in machines.values())  # noqa: E731
    return sweep(lambda batch: machines[batch].target(), [1, 2, 8], clock=ticks, monitor=False)


def test_sweep_finds_where_the_host_is_the_limit(swept):
    assert swept.enqueue_bound == (1,)
    assert any("bound by enqueueing at batch 1: capture a CUDA graph" in line for line in swept.conclusions)


def test_sweep_finds_the_batch_of_the_highest_throughput(swept):
    assert swept.fastest == 8
    assert swept.rows[8].items_per_second == pytest.approx(8 * 1000 / 4.5, rel=0.05)


def test_sweep_prints_a_row_per_batch(swept):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(swept)
    text = console.export_text()
    assert "bound by enqueueing" in text
    assert [line.split()[0] for line in str(swept).splitlines()[1:4]] == ["1", "2", "8"]


def test_sweep_goes_on_after_a_batch_that_does_not_fit():
    def factory(batch):
        if batch > 2:
            raise QATError("GPU memory does not suffice")
        return Target("sum", lambda: sum(range(batch)))

    result = sweep(factory, [1, 4, 2], **QUICK)
    assert list(result.rows) == [1, 2]
    assert "batch 4: GPU memory does not suffice" in result.conclusions
    assert json.loads(result.to_json())["failures"] == {"4": "GPU memory does not suffice"}


def test_sweep_without_any_row_raises_the_reason():
    with pytest.raises(QATError, match="needs an example"):
        sweep(nn.Identity(), [1, 2])


@pytest.mark.parametrize("batches", [[], [0], [1, 1], [True], [1.5]])
def test_wrong_batches_are_refused(batches):
    with pytest.raises(QATError, match="positive integers, each once"):
        sweep(nn.Identity(), batches, torch.ones(1, 2))


def test_sweep_of_a_module_repeats_the_example():
    seen = set()

    class Probe(nn.Module):
        def forward(self, x):
            seen.add(tuple(x.shape))
            return x

    sweep(Probe().eval(), [1, 5], torch.ones(2, 3), **QUICK)
    assert seen == {(1, 3), (5, 3)}


def test_repeating_keeps_structure_and_order():
    out = repeat((torch.tensor([[1], [2]]), {"a": np.array([3, 4]), "b": 7}), 3)
    assert out[0].flatten().tolist() == [1, 2, 1]
    assert out[1]["a"].tolist() == [3, 4, 3]
    assert out[1]["b"] == 7


def test_sweep_of_an_onnx_file(model_file):
    result = sweep(str(model_file), [1, 3], **QUICK)
    assert [row.batch for row in result.rows.values()] == [1, 3]


# On a GPU

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network():
    blocks = [(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*[layer for block in blocks for layer in block]).eval().cuda()


def bare_loop(run, runs):
    """ms per run: two events around a loop without anything else."""
    for _ in range(20):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / runs


@gpu
@needs_cuda
def test_median_is_within_two_percent_of_a_bare_loop():
    model, x = network(), torch.randn(64, 64, 56, 56, device="cuda")
    with torch.inference_mode():
        before = bare_loop(lambda: model(x), 200)
        result = latency(model, x, duration=1.0)
        after = bare_loop(lambda: model(x), 200)
    # The clocks may change between the two: the nearer one counts.
    assert min(abs(result.compute.median / bare - 1) for bare in (before, after)) < 0.02


@gpu
@needs_cuda
def test_graph_is_not_slower_than_eager():
    model, x = network(), torch.randn(1, 64, 14, 14, device="cuda")
    eager, graph = latency(model, x, duration=1.0), latency(model, x, duration=1.0, cuda_graph=True)
    assert graph.settings.cuda_graph
    assert graph.compute.median <= eager.compute.median
    assert graph.enqueue.median < eager.enqueue.median


@gpu
@needs_cuda
def test_missing_synchronisation_shows_on_a_gpu():
    shown = demonstrate_no_sync(network(), torch.randn(64, 64, 56, 56, device="cuda"), runs=10)
    assert shown.asynchronous
    assert shown.wrong < shown.right / 2


@gpu
@needs_cuda
def test_copies_are_measured_on_a_gpu():
    result = latency(network(), torch.randn(16, 64, 56, 56), copies=True, duration=0.5)
    # 12.8 MB each way: at most 64 GB/s over PCIe 5.
    assert result.h2d.median > 0.15
    assert result.d2h.median > 0.15
    assert result.latency.mean == pytest.approx(result.h2d.mean + result.compute.mean + result.d2h.mean, rel=1e-6)


@gpu
@needs_cuda
def test_load_and_clocks_are_sampled_on_a_gpu():
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    result = latency(network(), torch.randn(64, 64, 56, 56, device="cuda"), duration=2.0)
    assert result.gpu is not None, result.gpu_missing
    assert result.gpu.samples >= 10
    assert result.gpu.sm_clock.mean > 100


@gpu
@needs_cuda
def test_memory_that_does_not_suffice_is_said_and_given_back():
    class Greedy(nn.Module):
        def forward(self, x):
            return x.expand(1 << 20, 1 << 20).contiguous()

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with pytest.raises(QATError, match="GPU memory does not suffice"):
        latency(Greedy().eval(), torch.ones(1, 1, device="cuda"))
    assert torch.cuda.memory_allocated() == before


@gpu
@needs_cuda
def test_cuda_runtime_events_agree_with_pytorch():
    """The events that measure engines, on work of PyTorch's, without their own stream's order being assumed."""
    pytest.importorskip("polygraphy", reason="needs polygraphy, which finds the CUDA runtime library")
    model, x = network(), torch.randn(64, 64, 56, 56, device="cuda")
    try:
        events = CudaEvents()
    except QATError as error:
        if "not found" in str(error):
            pytest.skip(str(error))
        raise
    torch.cuda.synchronize()
    stream = torch.cuda.ExternalStream(events.stream)
    try:
        with torch.inference_mode(), torch.cuda.stream(stream):
            target = Target("network", lambda: model(x), stream=events)
            ours = latency(target, duration=1.0).compute.median
            bare = bare_loop(lambda: model(x), 200)
        assert ours == pytest.approx(bare, rel=0.02)
        # NVML finds the GPU by the bus id that the CUDA runtime gives.
        assert GpuMonitor(events.device).load().name == torch.cuda.get_device_name()
    finally:
        events.close()
