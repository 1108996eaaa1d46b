"""Grids of NumPy against those of tensors, bit by bit, and against definitions."""

import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import qat
from qat.core import formats, numerics
from qat.core.formats import FORMATS, INT4, INT8, SCALE_MIN, Format, amax_to_scale, quantize

FLOATS = st.floats(width=32)  # denormals, infinities and NaN among them
SCALES = st.floats(SCALE_MIN, 2.0**100, width=32)


def bits(x):
    """Of float32; all NaN are one."""
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32).tolist()


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@settings(max_examples=100, deadline=None)
@given(amax=arrays(np.float32, array_shapes(min_dims=0, max_dims=2), elements=FLOATS))
def test_scales_have_the_bits_of_tensors(fmt, amax):
    assert bits(amax_to_scale(amax, fmt)) == bits(numerics.amax_to_scale(torch.from_numpy(amax), fmt).numpy())


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_codes_have_the_bits_of_tensors(fmt, data):
    shape = data.draw(array_shapes(max_dims=3, max_side=5))
    axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    scale = data.draw(arrays(np.float32, () if axis is None else shape[axis], elements=SCALES))
    # At ties and next to them, or anywhere.
    step = scale if axis is None else np.expand_dims(scale, [d for d in range(len(shape)) if d != axis % len(shape)])
    half = data.draw(arrays(np.float32, shape, elements=st.integers(-300, 300).map(lambda k: k / 2)))
    x = data.draw(
        st.one_of(
            arrays(np.float32, shape, elements=FLOATS),
            st.sampled_from([-np.inf, 0, np.inf]).map(lambda to: np.nextafter(half * step, np.float32(to), dtype=np.float32)),
            st.just((half * step).astype(np.float32)),
        )
    )
    found = quantize(x, scale, axis=axis, fmt=fmt)
    assert found.dtype == np.float32
    assert bits(found) == bits(numerics.quantize(torch.from_numpy(x), torch.from_numpy(scale), axis=axis, fmt=fmt).numpy())


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@settings(max_examples=100, deadline=None)
@given(x=st.floats(-1e6, 1e6, width=32), scale=SCALES)
def test_codes_follow_the_definition(fmt, x, scale):
    """The float32 next to the exact quotient, the even neighbour of a tie, within the range."""
    quotient = float(np.float32(np.float64(x) / np.float64(scale)))  # rounding twice, 53 bits and 24, is rounding once
    assert quantize(x, scale, fmt=fmt) == min(max(round(Fraction(quotient)), fmt.qmin), fmt.qmax)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_read_as_float32(dtype):
    x = np.array([0.3, -1.7, 1e-7], dtype)
    assert bits(quantize(x, 1e-3)) == bits(quantize(x.astype(np.float32), 1e-3))


def test_ends():
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    assert quantize(x, SCALE_MIN).tolist()[:2] == [127, -128]
    assert np.isnan(quantize(x, 1.0)[2])
    assert quantize(x, SCALE_MIN)[3] == 127  # a quotient beyond float32
    assert quantize(np.zeros((0, 3), np.float32), np.ones(3), axis=1).shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "scale", "axis", "message"),
    [
        ((2, 3), np.ones(3), None, "scale has 3 elements; pass axis"),
        ((2, 3), np.ones(3), 2, r"axis 2 is out of range for x of shape \(2, 3\)"),
        ((2, 3), np.ones(3), 0, r"scale has shape \(3,\), but axis 0 of x has size 2"),
    ],
)
def test_scales_that_do_not_fit(shape, scale, axis, message):
    with pytest.raises(qat.QATError, match=message):
        quantize(np.zeros(shape), scale, axis=axis)
    with pytest.raises(qat.QATError, match=message):
        numerics.fake_quantize(torch.zeros(shape), torch.from_numpy(scale), axis=axis)


def test_names_of_before():
    assert qat.Format is qat.numerics.Format is formats.Format
    assert qat.numerics.INT8 is qat.INT8 is INT8
    assert qat.numerics.FORMATS is FORMATS
    for place in (b"cqat.numerics\n", b"cqat.core.numerics\n"):
        pickled = pickle.dumps(INT4, protocol=0)
        assert b"cqat.core.formats\n" in pickled
        assert pickle.loads(pickled.replace(b"cqat.core.formats\n", place)) == INT4
    assert str(Format("int2", -2, 1)) == "int2"


@pytest.mark.parametrize("name", ["formats", "amax", "bins"])
def test_no_torch_is_needed(name):
    code = f"import sys; sys.modules['torch'] = None; import qat.core.{name}, qat; print(qat.INT8)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "int8\n", done.stderr
