"""Calibration methods against loops over bins, written from their definitions."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.calibration.histogram import Histogram
from qat.calibration.methods import (
    METHODS,
    amax_by_entropy,
    amax_by_max,
    amax_by_mse,
    amax_by_percentile,
    divergences,
    find_amax,
    mse_errors,
    quality,
)
from qat.core.numerics import INT4
from qat.errors import QATError

# The plain loop lives with the benchmark that times it.
_spec = importlib.util.spec_from_file_location("loop", Path(__file__).parents[2] / "benchmarks" / "calibration.py")
assert _spec is not None
assert _spec.loader is not None
_benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_benchmark)
entropy_loop: Callable[[np.ndarray], list[float]] = _benchmark.entropy_loop


def draw(kind: str, seed: int, bins: int) -> np.ndarray:
    """Counts of one kind of data; the last bin holds the largest value."""
    rng = np.random.default_rng(seed)
    if kind == "few":
        counts = np.zeros(bins, dtype=np.int64)
        counts[rng.choice(bins, size=6, replace=False)] = rng.integers(1, 1000, size=6)
        counts[-1] += 1
        return counts
    if kind == "low":  # everything but one outlier lies in fewer than 128 bins
        counts = np.zeros(bins, dtype=np.int64)
        counts[:100] = rng.integers(0, 1000, size=100)
        counts[-1] = 1
        return counts
    if kind == "sparse":
        counts = rng.integers(0, 1000, size=bins) * (rng.random(bins) < 0.1)
        counts[-1] += 1
        return counts
    values = {
        "gaussian": lambda: rng.normal(size=100_000),
        "relu": lambda: rng.normal(size=100_000).clip(min=0),
        "heavy": lambda: rng.standard_t(2, size=100_000),
        "bimodal": lambda: np.concatenate([rng.normal(0, 0.1, 50_000), rng.normal(5, 0.5, 50_000)]),
        "uniform": lambda: rng.random(20_000),
        "small": lambda: rng.normal(size=300),
    }[kind]()
    return np.histogram(np.abs(values), bins=bins)[0].astype(np.int64)


KINDS = ("gaussian", "relu", "heavy", "bimodal", "uniform", "small", "sparse", "few", "low")


def last_minimum(values: np.ndarray) -> int:
    """Values closer than 1e-12 differ by rounding only (many sparse histograms have several divergences of zero)."""
    return int(np.flatnonzero(values <= np.min(values) + 1e-12)[-1])


def kept(counts: np.ndarray, divergences: np.ndarray) -> np.ndarray:
    """Divergences, infinite where over a thousandth is clipped and the squared error is over ten times the least."""
    errors = mse_loop(counts, 127, 128)
    clipped = [counts[bins:].sum() / counts.sum() for bins in range(128, len(counts) + 1)]
    return np.where((np.array(clipped) > 0.001) & (errors > 10 * errors.min() + 1e-12), np.inf, divergences)


@pytest.mark.parametrize("bins", [129, 300])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_equals_the_loop(kind: str, seed: int, bins: int) -> None:
    counts = draw(kind, seed, bins)
    expected = np.array(entropy_loop(counts))
    np.testing.assert_allclose(divergences(torch.from_numpy(counts)).numpy(), expected, rtol=0, atol=1e-11)
    amax = amax_by_entropy(torch.from_numpy(counts), 1.0, float(bins))
    assert float(amax) == 128 + last_minimum(kept(counts, expected))


@pytest.mark.parametrize("kind", ["gaussian", "relu", "heavy"])
def test_entropy_equals_the_loop_on_2048_bins(kind: str) -> None:
    counts = draw(kind, 0, 2048)
    expected = np.array(entropy_loop(counts))
    np.testing.assert_allclose(divergences(torch.from_numpy(counts)).numpy(), expected, rtol=0, atol=1e-11)
    assert float(amax_by_entropy(torch.from_numpy(counts), 1.0, 2048.0)) == 128 + last_minimum(kept(counts, expected))


@pytest.mark.parametrize("kind", ["gaussian", "relu", "heavy", "bimodal", "uniform"])
def test_entropy_of_common_values_is_that_of_the_published_loop(kind: str) -> None:
    counts = draw(kind, 1, 1000)
    published = 128 + last_minimum(np.array(entropy_loop(counts)))
    assert float(amax_by_entropy(torch.from_numpy(counts), 1.0, 1000.0)) == published


def test_entropy_does_not_end_at_a_frequent_value() -> None:
    """Half of the pixels black: the published loop clips all others to the magnitude of black."""
    counts = np.full(1000, 500, np.int64)
    counts[400] = counts.sum()
    assert 128 + last_minimum(np.array(entropy_loop(counts))) < 410
    assert float(amax_by_entropy(torch.from_numpy(counts), 1.0, 1000.0)) > 950


def test_entropy_cuts_off_rare_outliers() -> None:
    counts = np.zeros(1000, np.int64)
    counts[:200] = draw("gaussian", 0, 200)
    counts[999] = 50  # of 100,000; their square outweighs all that rounding costs
    assert float(amax_by_entropy(torch.from_numpy(counts), 1.0, 1000.0)) <= 200


@pytest.mark.parametrize("stray", [1, 3, 20])
def test_entropy_keeps_the_bulk_of_a_gate(stray: int) -> None:
    """Values around 0.5 of a sigmoid with a few near 0: the published loop clips all but the strays."""
    counts = np.zeros(1000, np.int64)
    counts[130] = stray
    counts[500:1000] = (1e4 * np.exp(-((np.arange(500) - 250) ** 2) / 5000)).astype(np.int64)
    assert 128 + last_minimum(np.array(entropy_loop(counts))) < 200
    amax = int(amax_by_entropy(torch.from_numpy(counts), 1.0, 1000.0))
    assert counts[:amax].sum() > 0.95 * counts.sum()


def test_entropy_of_equal_candidates_takes_the_last() -> None:
    counts = torch.zeros(300, dtype=torch.int64)
    counts[[10, 20]] = 7  # each in a level of its own, nothing clipped: no candidate loses anything
    assert float(amax_by_entropy(counts, 1.0, 300.0)) == 300


def test_entropy_with_fewer_bins_than_levels_is_the_maximum() -> None:
    assert float(amax_by_entropy(torch.ones(100, dtype=torch.int64), 0.5, 49.7)) == pytest.approx(49.7)


def test_entropy_ignores_the_first_bin() -> None:
    counts = torch.from_numpy(draw("gaussian", 0, 300))
    zeros = counts.clone()
    zeros[0] = 10**9  # the zeros that a ReLU makes
    assert amax_by_entropy(zeros, 1.0, 300.0) == amax_by_entropy(counts, 1.0, 300.0)


@pytest.mark.parametrize("search", [amax_by_max, amax_by_percentile, amax_by_mse, amax_by_entropy])
def test_many_histograms_at_once(search: Callable[..., torch.Tensor]) -> None:
    """Of several lengths and widths, one of zeros and one of zeros but for the first bin: each as if it were alone."""
    alone = [draw(kind, seed, bins) for kind in KINDS for seed, bins in enumerate((100, 128, 129, 300))]
    alone += [np.eye(1, 300, dtype=np.int64)[0], np.zeros(300, np.int64)]
    width = [0.5 ** (i % 7) for i in range(len(alone))]
    amax = [w * (len(counts) - 0.25) for counts, w in zip(alone, width, strict=True)]
    counts = torch.from_numpy(np.stack([np.pad(counts, (0, 400 - len(counts))) for counts in alone]))
    together = search(counts, torch.tensor(width, dtype=torch.float64), torch.tensor(amax, dtype=torch.float64))
    assert together.dtype == torch.float32
    expected = [float(search(torch.from_numpy(one), w, a)) for one, w, a in zip(alone, width, amax, strict=True)]
    assert together.tolist() == expected


def mse_loop(counts: np.ndarray, qmax: int, first: int) -> np.ndarray:
    centres = np.arange(len(counts)) + 0.5
    errors = []
    for edge in range(first, len(counts) + 1):
        scale = edge / qmax
        quantized = np.clip(np.rint(centres / scale), -qmax - 1, qmax) * scale
        errors.append(np.sum(counts * (quantized - centres) ** 2))
    return np.array(errors) / np.sum(counts * centres**2)


@pytest.mark.parametrize("bins", [140, 1000])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_mse_equals_the_loop(kind: str, seed: int, bins: int) -> None:
    counts = draw(kind, seed, bins)
    expected = mse_loop(counts, 127, 129)
    np.testing.assert_allclose(mse_errors(torch.from_numpy(counts), 129).numpy(), expected, rtol=0, atol=1e-12)
    chosen = round(float(amax_by_mse(torch.from_numpy(counts), 1.0, float(bins)))) - 129
    assert expected[chosen] <= expected.min() + 2e-12


def test_mse_of_int4_equals_the_loop() -> None:
    counts = draw("gaussian", 0, 500)
    np.testing.assert_allclose(
        mse_errors(torch.from_numpy(counts), 9, fmt=INT4).numpy(), mse_loop(counts, 7, 9), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bins", [1, 100, 128])
def test_mse_with_too_few_bins_is_the_maximum(bins: int) -> None:
    assert float(amax_by_mse(torch.ones(bins, dtype=torch.int64), 1.0, bins - 0.25)) == bins - 0.25


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 99.9), st.sampled_from(["gaussian", "relu", "sparse"]))
def test_percentile_falls_into_the_bin_that_reaches_the_share(percentile: float, kind: str) -> None:
    counts = draw(kind, 0, 300)
    amax = float(amax_by_percentile(torch.from_numpy(counts), 1.0, 300.0, percentile=percentile))
    reached = int(np.argmax(np.cumsum(counts) >= counts.sum() * (percentile / 100)))
    assert reached <= amax <= reached + 1


def test_percentile_of_many_values_is_close_to_numpys() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram()
    histogram.add(x)
    expected = np.percentile(np.abs(x.numpy().astype(np.float64)), 99.9)
    assert float(find_amax(histogram, "percentile", percentile=99.9)) == pytest.approx(expected, abs=histogram.width)


def test_percentile_100_is_the_maximum() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.1, 0.7, 0.30000001]))
    assert float(find_amax(histogram, "percentile", percentile=100)) == histogram.amax


def test_max_is_exact() -> None:
    x = torch.tensor([0.1, -0.30000001192092896])
    histogram = Histogram()
    histogram.add(x)
    assert torch.equal(find_amax(histogram, "max"), x.abs().max())
    assert float(amax_by_max(histogram.used, histogram.width, histogram.amax)) == histogram.amax


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_exceeds_the_maximum(method: str, kind: str) -> None:
    bins = 2500
    histogram = Histogram()
    values = np.repeat(np.arange(bins) + 0.25, draw(kind, 1, bins))
    histogram.add(torch.from_numpy(values.astype(np.float32)) / 777)
    assert 0 < float(find_amax(histogram, method)) <= histogram.amax


@pytest.mark.parametrize("method", METHODS)
def test_range_of_zeros_is_zero(method: str) -> None:
    histogram = Histogram()
    histogram.add(torch.zeros(10))
    assert float(find_amax(histogram, method)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_range_of_a_constant_is_that_constant(method: str) -> None:
    histogram = Histogram()
    histogram.add(torch.full((1000,), 0.7))
    assert float(find_amax(histogram, method)) == pytest.approx(0.7, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_range_does_not_depend_on_the_number_of_repeats(method: str) -> None:
    once, often = Histogram(), Histogram()
    once.add(torch.randn(10_000, generator=torch.Generator().manual_seed(1)))
    often.merge(once)
    often.counts = often.counts * 2**33
    assert find_amax(once, method) == find_amax(often, method)


def test_mse_beats_the_other_methods_in_squared_error() -> None:
    histogram = Histogram()
    histogram.add(torch.from_numpy(np.random.default_rng(0).laplace(size=200_000)))
    ratio = {method: quality(histogram, float(find_amax(histogram, method)))[1] for method in METHODS}
    assert max(ratio, key=lambda method: ratio[method]) == "mse"


def test_quality_is_close_to_what_the_values_say() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(2)).numpy().astype(np.float64)
    histogram = Histogram()
    histogram.add(torch.from_numpy(x))
    clipped, sqnr = quality(histogram, 2.0)
    scale = 2.0 / 127
    noise = np.clip(np.rint(x / scale), -127, 127) * scale - x
    assert clipped == pytest.approx(np.mean(np.abs(x) > 2.0), rel=0.01)
    assert sqnr == pytest.approx(10 * np.log10(np.sum(x**2) / np.sum(noise**2)), abs=0.05)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(QATError, match=r"method='kl': choose one of max, percentile, mse, entropy"):
        find_amax(Histogram(), "kl")


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_impossible_percentile_is_refused(percentile: float) -> None:
    with pytest.raises(QATError, match="percentile="):
        find_amax(Histogram(), "percentile", percentile=percentile)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_finds_the_range_that_the_cpu_finds(method: str) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    cpu, cuda = Histogram(), Histogram(device=torch.device("cuda"))
    cpu.add(x)
    cuda.add(x.cuda())
    # Sums in another order: a neighbouring candidate of the same error may win.
    assert float(find_amax(cuda, method)) == pytest.approx(float(find_amax(cpu, method)), abs=2 * cpu.width)
