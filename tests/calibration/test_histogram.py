"""Histograms against NumPy, which counts in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.calibration.histogram import BINS, MIN_EXPONENT, Histogram, coarsen, largest_magnitude, width_exponent
from qat.errors import QATError


def reference(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Counts and width by the definition: the smallest power of two with ``max < BINS * width``."""
    magnitude = np.abs(values.astype(np.float64)).ravel()
    width = 2.0**MIN_EXPONENT
    while magnitude.max() >= BINS * width:
        width *= 2
    counts = np.zeros(BINS, dtype=np.int64)
    np.add.at(counts, np.floor(magnitude / width).astype(np.int64), 1)
    return counts, width


def filled(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(floats, min_size=1, max_size=20), min_size=1, max_size=5))
def test_counts_equal_numpy_on_any_batches(batches: list[list[float]]) -> None:
    histogram = filled(*(torch.tensor(batch) for batch in batches))
    counts, width = reference(np.concatenate([np.array(batch, dtype=np.float32) for batch in batches]))
    assert histogram.width == width
    np.testing.assert_array_equal(histogram.counts.numpy(), counts)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_counts_equal_numpy_on_many_values(scale: float) -> None:
    x = torch.randn(3, 5, 50_000, generator=torch.Generator().manual_seed(0)) * scale
    counts, _ = reference(x.numpy())
    np.testing.assert_array_equal(filled(x).counts.numpy(), counts)


@pytest.mark.parametrize("towards", [0.0, math.inf])
@pytest.mark.parametrize("exponent", [-20, -12, 0, 7, 100])
def test_bins_begin_exactly_at_multiples_of_the_width(towards: float, exponent: int) -> None:
    edges = torch.arange(BINS, dtype=torch.float32) * 2.0**exponent
    x = torch.nextafter(edges, torch.tensor(towards))
    counts, width = reference(x.numpy())
    histogram = filled(x)
    assert histogram.width == width
    np.testing.assert_array_equal(histogram.counts.numpy(), counts)


def test_order_of_batches_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1000, generator=generator) * 10.0**k for k in range(-3, 4)]
    forward, backward = filled(*batches), filled(*reversed(batches))
    assert forward.exponent == backward.exponent
    assert torch.equal(forward.counts, backward.counts)


def test_merging_equals_counting_everything() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(1000, generator=generator), 300 * torch.randn(1000, generator=generator)
    merged, other = filled(a), filled(b)
    merged.merge(other)
    whole = filled(a, b)
    assert (merged.exponent, merged.amax) == (whole.exponent, whole.amax)
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(other.counts, filled(b).counts)


def test_merging_an_empty_histogram_changes_nothing() -> None:
    merged = filled(torch.tensor([1.0, 2.0]))
    before = merged.counts.clone()
    merged.merge(Histogram())
    assert torch.equal(merged.counts, before)


@pytest.mark.parametrize("amax", [1.0, 1.5, 1.9999, 2.0, 3e-5, 6.5e4, 3.4e38])
def test_more_than_half_of_the_bins_are_in_use(amax: float) -> None:
    assert BINS // 2 < len(filled(torch.tensor([amax])).used) <= BINS


def test_bins_stay_bounded_while_the_range_grows() -> None:
    histogram = filled(*(torch.tensor([2.0**k]) for k in range(-60, 120)))
    assert histogram.counts.shape == (BINS,)
    assert histogram.total == 180


def test_growth_keeps_every_value() -> None:
    histogram = filled(torch.ones(7), torch.tensor([5000.0]))
    assert histogram.counts[0] == 7  # bins are now 2 wide
    assert histogram.counts[2500] == 1


def test_counts_go_beyond_32_bits() -> None:
    histogram = filled(torch.tensor([1.0, 3.0]))
    histogram.counts = histogram.counts * 2**40
    histogram.add(torch.tensor([1.0]))
    assert histogram.counts.dtype == torch.int64
    assert histogram.total == 2 * 2**40 + 1
    assert int(coarsen(histogram.counts, 12)[0]) == 2 * 2**40 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    histogram, wide = filled(x), filled(x.to(torch.float32))
    assert histogram.amax == wide.amax
    assert torch.equal(histogram.counts, wide.counts)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    x = torch.randn(2, 6, 8, 10, generator=torch.Generator().manual_seed(4))
    views = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "strided": x[:, ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }
    view = views[layout]
    assert torch.equal(filled(view).counts, filled(view.contiguous()).counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_by_name(bad: float) -> None:
    histogram = Histogram("layer1.conv")
    with pytest.raises(QATError, match=r"layer1\.conv: NaN or Inf seen"):
        histogram.add(torch.tensor([1.0, bad, 2.0]))
    assert histogram.total == 0


def test_empty_tensor_changes_nothing() -> None:
    histogram = filled(torch.empty(0, 3))
    assert histogram.total == 0
    assert histogram.amax == 0


def test_zeros_and_scalars_are_counted() -> None:
    histogram = filled(torch.zeros(5), torch.tensor(-0.0), torch.tensor(2.5))
    assert histogram.counts[0] == 6
    assert histogram.total == 7


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 2.0**-100])
def test_denormals_are_counted(tiny: float) -> None:
    assert filled(torch.tensor([tiny, -tiny, 0.0])).total == 3


def test_largest_float32_is_counted() -> None:
    largest = torch.finfo(torch.float32).max
    assert filled(torch.tensor([largest, 1.0])).counts[BINS - 1] == 1


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-80, 2.0**127, width=32))
def test_width_is_the_smallest_that_fits(amax: float) -> None:
    width = 2.0 ** width_exponent(amax)
    assert BINS / 2 * width <= amax < BINS * width


def test_largest_magnitude_sees_negative_values() -> None:
    assert largest_magnitude(torch.tensor([1.0, -3.0])) == 3.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_counts_equal_cpu_counts(dtype: torch.dtype) -> None:
    x = torch.randn(20_000_000, generator=torch.Generator().manual_seed(5)).to(dtype)
    histogram = Histogram(device=torch.device("cuda"))
    histogram.add(x.cuda())
    assert torch.equal(histogram.counts.cpu(), filled(x).counts)
