"""Ranges by NumPy: those of tensors, bit by bit. tests/calibration/test_calibration_methods.py has the loops over bins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import INT4, INT8
from qat.calibration import Histogram
from qat.core.amax import METHODS, divergences, find_amax, mse_errors, quality, search
from qat.core.bins import Bins
from qat.errors import QATError


def values(kind, seed):
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 20_000))
    made = {
        "normal": lambda: draw.normal(size=n),
        "relu": lambda: draw.normal(size=n).clip(0),
        "heavy": lambda: draw.standard_t(2, n),
        "lognormal": lambda: draw.lognormal(0, 2, n),
        "background": lambda: np.r_[np.full(n, 0.1), draw.random(n // 10 + 1)],
        "steps": lambda: draw.integers(0, 40, n) / 8,
        "few": lambda: draw.normal(size=7),
        "sparse": lambda: draw.normal(size=n) * (draw.random(n) < 0.05),
        "constant": lambda: np.full(n, 0.7),
        "zeros": lambda: np.zeros(n),
    }[kind]()
    return (made * 10.0 ** draw.uniform(-6, 6)).astype(np.float32)


KINDS = ("normal", "relu", "heavy", "lognormal", "background", "steps", "few", "sparse", "constant", "zeros")


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_and_tensors_have_the_same_ranges(kind, fmt):
    """Without a warning of NumPy's, which would be an error here."""
    for seed in range(2):
        x = values(kind, seed)
        bins, histogram = Bins.count(x), Histogram()
        histogram.add(torch.from_numpy(x))
        for method in METHODS:
            with np.errstate(all="raise", under="ignore"):
                found = find_amax(bins, method, fmt=fmt)
            expected = find_amax(histogram, method, fmt=fmt)
            assert found.dtype == np.float32
            assert found.tobytes() == expected.numpy().tobytes(), (seed, method)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=140, max_size=200), st.floats(0.1, 100))
def test_any_counts(counts, percentile):
    counts = np.array(counts)
    for method in METHODS:
        found = search(counts, 0.5, len(counts) / 2 - 0.25, method, percentile=percentile)
        expected = search(torch.from_numpy(counts), 0.5, len(counts) / 2 - 0.25, method, percentile=percentile)
        assert float(found) == float(expected), method


@pytest.mark.parametrize("kind", ["normal", "steps", "background"])
def test_errors_are_the_same_bits_and_divergences_up_to_rounding(kind):
    counts = Bins.count(values(kind, 1)).used
    tensor = torch.from_numpy(counts)
    assert mse_errors(counts, 129).tobytes() == mse_errors(tensor, 129).numpy().tobytes()
    np.testing.assert_allclose(divergences(counts), divergences(tensor).numpy(), rtol=0, atol=1e-13)


def test_several_histograms_in_one_array():
    alone = [Bins.count(values(kind, 0)) for kind in KINDS]
    longest = max(len(bins.used) for bins in alone)
    counts = np.stack([bins.counts[:longest] for bins in alone])
    width, amax = np.array([bins.width for bins in alone]), np.array([bins.amax for bins in alone])
    for method in METHODS:
        together = search(counts, width, amax, method)
        assert together.tolist() == [float(find_amax(bins, method)) for bins in alone], method


def test_quality_is_that_of_tensors():
    x = values("heavy", 0)
    histogram = Histogram()
    histogram.add(torch.from_numpy(x))
    found, expected = (quality(counted, 0.5 * histogram.amax) for counted in (Bins.count(x), histogram))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "percentile", "message"), [("kl", 99, "method='kl': choose one of max"), ("percentile", 0, "percentile=0")]
)
def test_impossible_methods(method, percentile, message):
    with pytest.raises(QATError, match=message):
        find_amax(Bins.count([1.0]), method, percentile=percentile)
