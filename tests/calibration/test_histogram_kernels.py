"""Histograms counted by the Triton kernels against those of the CPU path: the same state. Without a GPU, in the interpreter.

Triton decides when it is imported whether to interpret, so that happens in a process of its own.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from calibrated_nets import images, quantized, ranges_of, same, small_model, states_of
from interpreter import INTERPRETED, crossed, run_interpreted
from torch import nn

import qat.core.kernels
from qat.calibration import METHODS, calibrate
from qat.calibration.histogram import BINS, MIN_EXPONENT, Histogram
from qat.calibration.observers import HistogramObserver, WeightObserver, settle
from qat.core.quantizer import State, WeightQuantizer, quantizers
from qat.errors import QATError

triton_kernels = pytest.importorskip("qat.core.triton_kernels", reason="needs triton", exc_type=ImportError)
# The interpreter cuts bfloat16 off instead of rounding it.
DEVICES = ["cpu"] if INTERPRETED else []
DEVICES += [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_tritons_interpreter():
    """Both ways to count; the atomic one in two layouts only."""
    run_interpreted(__file__, "histograms or (atomics and test_layouts and (channels or many))")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.parametrize("way", ["histograms", "atomics"])
def test_all_in_tritons_interpreter(way):
    run_interpreted(__file__, way, every=True)


@pytest.fixture(params=[True, False], ids=["histograms of blocks", "atomics"])
def way(request, monkeypatch):
    """The kernels' way to count: that of new versions of Triton, and that of old ones."""
    monkeypatch.setattr(triton_kernels, "FAST_HISTOGRAM", request.param)


@pytest.fixture(params=DEVICES)
def device(way, request, monkeypatch):
    """Where histograms are counted by kernels: in the interpreter on the CPU too."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    else:
        monkeypatch.setattr(qat.core.kernels, "runs_triton", lambda x, *others: x.numel() > 0)
    return torch.device(request.param)


def state(device, *batches, by_kernels=True):
    histogram = Histogram("site", device=device)
    for batch in batches:
        histogram.add(batch)
        assert (histogram._pending is not None) == by_kernels
    return histogram.counts.cpu(), histogram.exponent, histogram.amax


def same_as_on_the_cpu(device, *batches):
    found = state(device, *(batch.to(device) for batch in batches))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat.core.kernels, "runs_triton", lambda *tensors: False)
        counts, *rest = state(torch.device("cpu"), *(batch.cpu() for batch in batches), by_kernels=False)
    torch.testing.assert_close(found[0], counts, rtol=0, atol=0)
    assert list(found[1:]) == rest
    assert counts.sum() == sum(batch.numel() for batch in batches)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "scalar": lambda x: x[0, 0, 0, 0],
    "one element": lambda x: x.flatten()[:1],
    "vector": lambda x: x.flatten()[:37],
    "unaligned": lambda x: x.flatten()[3:],
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 3),
    "with gaps": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "many blocks": lambda x: x.repeat(4, 2, 2, 3),
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    # What the kernels read lies in memory without gaps, whatever the layout was.
    crossed(LAYOUTS, DTYPES, slow=["one element", "vector", "contiguous", "transposed"]),
    ids=str,
)
def test_layouts(device, layout, dtype):
    # A copy to another device has neither gaps nor an offset: first the copy, then the layout.
    same_as_on_the_cpu(device, LAYOUTS[layout](normal(3, 5, 17, 9).to(device, dtype)))


@pytest.mark.parametrize(
    ("scales", "dtype"), crossed([(1e-4, 1, 60000, 1e-7, 0), (1, 1), (1, 3000), (3000, 1)], DTYPES), ids=str
)
def test_batches_of_changing_magnitude(device, scales, dtype):
    batches = [(normal(1000, seed=seed).clamp(-1, 1) * scale).to(dtype) for seed, scale in enumerate(scales)]
    same_as_on_the_cpu(device, *batches)


def test_growth_beyond_all_bins(device):
    """The first batches end in the first bin, whatever their number of bins was."""
    same_as_on_the_cpu(device, normal(500) * 1e-30, normal(500), normal(500) * 1e30)


@pytest.mark.parametrize("shift", [1, 5, 11, 12, 13])
def test_growth_by_any_number_of_octaves(device, shift):
    same_as_on_the_cpu(device, torch.arange(BINS, dtype=torch.float32), torch.tensor([(BINS - 1) * 2.0**shift]))


@pytest.mark.parametrize("towards", [0.0, math.inf])
@pytest.mark.parametrize("exponent", [MIN_EXPONENT, -12, 0, 100])
def test_edges_of_bins(device, exponent, towards):
    edges = torch.arange(1, BINS, dtype=torch.float32) * 2.0**exponent
    same_as_on_the_cpu(device, torch.nextafter(edges, torch.tensor(towards)), -edges)


@pytest.mark.parametrize("step", [69, pytest.param(23, marks=pytest.mark.slow)])
def test_powers_of_two(device, step):
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    for power in powers[::step].to(torch.float32):
        same_as_on_the_cpu(device, power)
    same_as_on_the_cpu(device, powers.to(torch.float32), -powers.to(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_subnormal_numbers(device, dtype):
    info = torch.finfo(dtype)
    zeros = torch.tensor([0.0, -0.0] * 40, dtype=dtype)
    subnormal = torch.tensor([info.smallest_normal, -info.smallest_normal / 2, info.smallest_normal / 64], dtype=dtype)
    same_as_on_the_cpu(device, zeros)
    same_as_on_the_cpu(device, subnormal, zeros)
    same_as_on_the_cpu(device, zeros, torch.tensor([info.max, -info.max, 1.0], dtype=dtype), subnormal)


def test_a_single_value_everywhere(device):
    same_as_on_the_cpu(device, torch.full((30_000,), 6.0), torch.full((30_000,), 0.0))


def test_counts_go_beyond_32_bits(device):
    histogram = Histogram(device=device)
    histogram.add(torch.tensor([1.0, 3.0], device=device))
    histogram._pending.fold()
    histogram._pending.counts *= 2**40
    histogram.add(torch.tensor([1.0, 100.0], device=device))
    assert histogram.total == 2 * 2**40 + 2
    assert int(histogram.counts.max()) >= 2**40 + 1


@pytest.mark.parametrize("way", [True], indirect=True)
def test_rows_are_emptied_before_they_are_full(device, monkeypatch):
    monkeypatch.setattr(qat.calibration.histogram, "_MOST", 1000)
    batches = [normal(size, seed=size) * scale for size, scale in ((999, 1), (1, 300), (4321, 1e-3), (999, 1), (2, 9e9))]
    same_as_on_the_cpu(device, *batches)
    histogram = Histogram(device=device)
    for _ in range(3):
        histogram.add(torch.ones(4321, device=device))
        assert int(histogram._pending._rows.sum()) <= 1000


def test_looking_between_batches_changes_nothing(device):
    batches = [normal(500, seed=seed).to(device) * 10.0**seed for seed in range(3)]
    histogram = Histogram(device=device)
    for batch in batches:
        histogram.add(batch)
        assert histogram.total % 500 == 0
    counts, exponent, amax = state(device, *batches)
    assert torch.equal(histogram.counts.cpu(), counts)
    assert (histogram.exponent, histogram.amax) == (exponent, amax)


def test_merging(device):
    a, b = normal(1000).to(device), 300 * normal(1000, seed=1).to(device)
    merged, other = Histogram(device=device), Histogram(device=device)
    merged.add(a)
    other.add(b)
    merged.merge(other)
    counts, exponent, amax = state(device, a, b)
    assert torch.equal(merged.counts.cpu(), counts)
    assert (merged.exponent, merged.amax) == (exponent, amax)


def test_inference_mode_may_end_in_between(device):
    with torch.inference_mode():
        histogram = Histogram(device=device)
        histogram.add(normal(100).to(device))
    histogram.add(normal(100, seed=1).to(device))
    assert histogram.total == 200
    histogram.add(normal(100).to(device))
    assert histogram.total == 300


@pytest.mark.parametrize(("bad", "dtype"), crossed([math.nan, -math.nan, math.inf, -math.inf], DTYPES), ids=str)
def test_non_finite_values_are_refused_when_the_host_looks(device, dtype, bad):
    histogram = Histogram("layer1.conv", device=device)
    histogram.add(torch.tensor([1.0, 2.0], dtype=dtype, device=device))
    histogram.add(torch.tensor([1.0, bad, 2.0], dtype=dtype, device=device))
    histogram.add(torch.tensor([1.0, 2.0], dtype=dtype, device=device))
    for look in (histogram.settle, lambda: histogram.amax, lambda: histogram.used, lambda: Histogram().merge(histogram)):
        with pytest.raises(QATError, match=r"layer1\.conv: NaN or Inf seen"):
            look()


def test_nothing_is_written_out_of_bounds(device):
    """NaN and infinity have no bin; what lies beside the counts in memory stays."""
    histogram = Histogram(device=device)
    histogram.add(torch.ones(1, device=device))
    pending = histogram._pending
    guarded = torch.full((len(pending.counts) + 2, BINS), -1, device=device)
    guarded[1:-1] = pending.counts
    pending.counts = guarded[1:-1]
    histogram.add(torch.tensor([math.nan, math.inf, -math.inf, 3e38, -1e-40] * 100, device=device))
    assert bool((guarded[[0, -1]] == -1).all())


def test_the_first_site_that_saw_it_is_named(device):
    log = []
    first, second, third = (HistogramObserver(name, log, device=device) for name in ("first", "second", "third"))
    second.observe(torch.tensor([1.0], device=device))
    third.observe(torch.tensor([math.nan], device=device))
    first.observe(torch.tensor([math.inf], device=device))
    with pytest.raises(QATError, match="third: NaN or Inf seen"):
        settle(log)
    assert second.histogram.total == 1


# Calibration


def test_calibration_takes_the_ranges_of_the_cpu_path(device):
    model, reference = small_model().to(device), small_model()
    calibrate(model, images(), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat.core.kernels, "runs_triton", lambda *tensors: False)
        calibrate(reference, images(), progress=False)
    # The first site reads the images themselves; the convolutions of two devices differ.
    name = "0.input_quantizer"
    assert torch.equal(ranges_of(model)[name].cpu(), ranges_of(reference)[name])
    if device.type == "cpu":
        assert same(ranges_of(model), ranges_of(reference))


@pytest.mark.parametrize("name", ["0.input_quantizer", "6.input_quantizer", "6.weight_quantizer"])
def test_calibration_names_the_site_and_leaves_the_model_as_it_was(device, name):
    model = small_model()
    data = images()
    if name == "0.input_quantizer":
        data[2][0, 0, 0, 0] = math.nan
    elif name == "6.input_quantizer":
        model[1].bias.data[0] = math.inf
    else:
        model[6].weight.data[0, 0] = math.nan
    model.to(device)
    states = states_of(model)
    ranges = ranges_of(model)
    with pytest.raises(QATError, match=rf"^{name}: NaN or Inf seen"):
        calibrate(model, data, progress=False)
    assert states_of(model) == states
    assert same(ranges_of(model), ranges)
    assert all(site.observer is None for _, site in quantizers(model))


def test_a_function_may_run_the_model_in_inference_mode(device):
    model, reference = small_model().to(device), small_model().to(device)

    @torch.inference_mode()
    def run(model):
        for batch in images():
            model(batch.to(device))

    calibrate(model, run, progress=False)
    calibrate(reference, images(), progress=False)
    assert same(ranges_of(model), ranges_of(reference))


# On a GPU only


@pytest.fixture
def refusing_to_wait(way) -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def in_errors(batches):
    """The batches; what happens between two of them may not wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield from batches
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("refusing_to_wait")
def test_batches_do_not_wait(autocast, method):
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 5)
    model = quantized(nn.Sequential(*layers)).cuda().to(memory_format=torch.channels_last)
    batches = [batch.cuda().to(memory_format=torch.channels_last) for batch in images()]
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        result = calibrate(model, in_errors(batches), method=method, progress=False)
    assert set(states_of(model)) == {State.QUANTIZING}
    assert result.histograms["0.input_quantizer"].total == sum(batch.numel() for batch in batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("refusing_to_wait")
def test_a_nan_shows_at_the_end_of_the_batches():
    model = small_model().cuda()
    batches = [batch.cuda() for batch in images()]
    batches[1][0, 0, 0, 0] = math.nan
    served = []

    def data():
        for batch in in_errors(batches):
            served.append(batch)
            yield batch

    with pytest.raises(QATError, match=r"^0\.input_quantizer: NaN or Inf seen"):
        calibrate(model, data(), progress=False)
    assert len(served) == len(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "constant"])
def test_many_values_on_cuda(way, dtype, kind):
    x = normal(20_000_003)
    x = {"normal": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([3e4])]), "constant": torch.full_like(x, 6)}[kind]
    same_as_on_the_cpu(torch.device("cuda"), x.to(dtype), 5 * x[:1000].to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("refusing_to_wait")
def test_observers_do_not_wait():
    site = WeightQuantizer(axis=0, channels=4, device=torch.device("cuda"))
    weight, activation = WeightObserver("weight", site), HistogramObserver("input", device=torch.device("cuda"))
    tensors = [normal(4, 5).cuda() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    for x in tensors:
        weight.observe(x)
        activation.observe(x)
    torch.cuda.set_sync_debug_mode("default")
    settle([weight, activation])
    assert activation.histogram.total == 60
    assert torch.equal(weight.amax.cpu(), tensors[0].abs().amax(1).cpu())
