"""Counts of arrays are those of tensors, whatever the order in which they are merged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qat.calibration import Histogram
from qat.core.bins import BINS, Bins
from qat.errors import QATError

ARRAYS = arrays(np.float32, array_shapes(max_dims=2), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def same(bins, other):
    return np.array_equal(bins.counts, other.counts) and (bins.exponent, bins.amax) == (other.exponent, other.amax)


@settings(max_examples=100, deadline=None)
@given(ARRAYS, ARRAYS)
def test_counts_are_those_of_tensors(x, y):
    histogram = Histogram()
    histogram.add(torch.from_numpy(x))
    assert same(Bins.count(x), histogram.bins())
    histogram.add(torch.from_numpy(y))
    both = Bins.count(np.concatenate([x.ravel(), y.ravel()]))
    assert same(both, histogram.bins())
    assert same(both, Bins.count(x).merged(Bins.count(y)))
    assert same(both, Bins.count(y).merged(Bins.count(x)))
    assert both.total == x.size + y.size


def test_counts_follow_the_definition():
    x = np.random.default_rng(0).standard_t(2, 3000).astype(np.float32)
    bins = Bins.count(x)
    expected, _ = np.histogram(np.abs(x).astype(np.float64), BINS, (0, BINS * bins.width))
    assert np.array_equal(bins.counts, expected)
    assert BINS / 2 * bins.width <= bins.amax < BINS * bins.width
    assert len(bins.used) == np.flatnonzero(bins.counts)[-1] + 1


def test_nothing_and_zeros():
    assert Bins.count([]).total == 0
    assert same(Bins.count([0.0, 1.0]), Bins.count([0.0]).merged(Bins.count([1.0])))


def test_a_histogram_gives_a_copy():
    histogram = Histogram()
    histogram.add(torch.ones(3))
    bins = histogram.bins()
    histogram.add(torch.ones(3))
    assert (bins.total, histogram.total) == (3, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(QATError, match="NaN or Inf seen"):
        Bins.count([1.0, bad])
