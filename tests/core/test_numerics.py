"""Codes, values and gradients of fake quantization, against ONNX Runtime and formulas written out in NumPy."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qat.core.numerics import (
    INT4,
    INT8,
    SCALE_MIN,
    Format,
    amax_to_scale,
    fake_quantize,
    fake_quantize_node,
    quantize,
    quotient,
)
from qat.errors import QATError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [INT8, INT4]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, math.inf, -math.inf]


@pytest.fixture
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


class Reference:
    """ONNX Runtime's QuantizeLinear and DequantizeLinear, float32, zero point 0."""

    def __init__(self, fmt: Format, axis: int) -> None:
        code = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}[fmt.name]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], axis=axis, output_dtype=code),
            helper.make_node("DequantizeLinear", ["q", "scale"], ["value"], axis=axis),
            helper.make_node("Cast", ["q"], ["code"], to=TensorProto.INT8),
        ]
        graph = helper.make_graph(
            nodes,
            "reference",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale")],
            [
                helper.make_tensor_value_info("code", TensorProto.INT8, None),
                helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Fusion may fold the pair away; the operators themselves are the reference.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        feed = {"x": x.detach().cpu().to(torch.float32).contiguous().numpy(), "scale": scale.detach().cpu().numpy()}
        return self.session.run(["code", "value"], feed)


_sessions: dict[tuple[str, int], Reference] = {}


def reference(x, scale, axis=None, fmt=INT8):
    key = (fmt.name, 1 if axis is None else axis)
    if key not in _sessions:
        _sessions[key] = Reference(fmt, key[1])
    return _sessions[key](x, scale)


def assert_equals_onnx(x, scale, axis=None, fmt=INT8):
    """Codes and values, except where ``x`` is NaN; the sign of a zero is not compared, a code has none."""
    codes, values = reference(x, scale, axis, fmt)
    real = ~x.isnan().cpu().numpy()
    ours = quantize(x, scale, axis=axis, fmt=fmt)
    np.testing.assert_array_equal(ours.cpu().numpy()[real], codes[real].astype(np.float32))
    fake = fake_quantize(x, scale, axis=axis, fmt=fmt)
    assert fake.dtype == x.dtype
    assert fake.shape == x.shape
    expected = torch.from_numpy(values).to(x.dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(fake.detach().cpu().to(torch.float32).numpy()[real], expected[real])
    assert bool(fake[x.isnan()].isnan().all())


def hard_values(scale: float, seed: int = 0) -> torch.Tensor:
    """Exact and almost exact ties of ``scale``, special values, random values inside and outside the range."""
    generator = torch.Generator().manual_seed(seed)
    half = (torch.arange(-300, 300, dtype=torch.float32) / 2) * scale
    near = [torch.nextafter(half, torch.full_like(half, side)) for side in (-math.inf, math.inf)]
    noise = torch.randn(500, generator=generator) * 100 * scale
    return torch.cat([half, *near, noise, torch.tensor(SPECIAL), torch.tensor([math.nan])])


scales = st.floats(SCALE_MIN, 2.0**100, width=32) | st.integers(-24, 60).map(lambda k: 2.0**k)
values = (
    st.floats(width=32, allow_nan=False)
    | st.sampled_from(SPECIAL)
    | st.integers(-300, 300).map(lambda k: k / 2)  # ties, if the scale is a power of two
)


@st.composite
def tensors(draw, dtype=torch.float32, max_scale=2.0**100):
    scale = torch.tensor(min(draw(scales), max_scale), dtype=torch.float32)
    in_units = draw(st.booleans())
    x = torch.tensor(draw(st.lists(values, min_size=1, max_size=20)), dtype=torch.float32)
    return (x * scale if in_units else x).to(dtype), scale


# Codes and values.


@settings(max_examples=300, deadline=None)
@given(tensors(), st.sampled_from(FORMATS))
def test_codes_equal_onnx_on_drawn_inputs(drawn, fmt):
    assert_equals_onnx(*drawn, fmt=fmt)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 1 / 3, 3e-3, SCALE_MIN, 1e-40, 7e4, 1e37])
def test_codes_equal_onnx_at_ties_and_special_values(device, dtype, fmt, scale):
    assert_equals_onnx(hard_values(scale).to(dtype).to(device), torch.tensor(scale, device=device), fmt=fmt)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_codes_equal_onnx_per_channel(device, dtype, fmt, axis):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 6, 5, generator=generator) * 50).to(dtype).to(device)
    scale = (torch.rand(x.shape[axis], generator=generator) + 0.01).to(device)
    assert_equals_onnx(x, scale, axis=axis, fmt=fmt)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_neither_codes_nor_dtype(device, dtype):
    x, scale = hard_values(0.1).to(dtype).to(device), torch.tensor(0.1, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_equals_onnx(x, scale)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2, 1:],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_memory_layout_does_not_matter(device, layout, per_channel):
    x = layout((torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2)) * 9).to(device))
    scale = torch.full((x.shape[1],) if per_channel else (), 0.05, device=device)
    assert_equals_onnx(x, scale, axis=1 if per_channel else None)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last)
    assert fake_quantize(x, torch.tensor(0.1)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
def test_small_and_empty_tensors_keep_their_shape(shape, scale_shape):
    x = torch.full(shape, 0.26, requires_grad=True)
    out = fake_quantize(x, torch.full(scale_shape, 0.5))
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad.shape == x.shape
    assert bool((out == 0.5).all())


def test_input_is_not_changed():
    x = torch.tensor([0.3, -0.7])
    fake_quantize(x, torch.tensor(0.5))
    assert x.tolist() == pytest.approx([0.3, -0.7])


@settings(deadline=None)
@given(st.floats(0, 2.0**127, width=32), st.sampled_from(FORMATS))
def test_scale_is_amax_over_qmax_with_a_floor(amax, fmt):
    expected = max(np.float32(amax) / np.float32(fmt.qmax), np.float32(2.0**-24))
    assert amax_to_scale(torch.tensor(amax), fmt).item() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_float32_whatever_holds_the_range(dtype):
    scale = amax_to_scale(torch.tensor([3.0, 5.0], dtype=dtype))
    assert scale.dtype == torch.float32
    assert scale.tolist() == [np.float32(3) / np.float32(127), np.float32(5) / np.float32(127)]


# Properties.

moderate = tensors(max_scale=2.0**66)  # code * scale stays finite


@settings(deadline=None)
@given(moderate, st.sampled_from(FORMATS))
def test_idempotent(drawn, fmt):
    x, scale = drawn
    once = fake_quantize(x, scale, fmt=fmt)
    assert torch.equal(fake_quantize(once, scale, fmt=fmt), once)


@settings(deadline=None)
@given(moderate, st.sampled_from(FORMATS))
def test_error_inside_the_range_is_at_most_half_a_step(drawn, fmt):
    x, scale = drawn
    inside = (x >= fmt.qmin * scale) & (x <= fmt.qmax * scale)
    error = (fake_quantize(x, scale, fmt=fmt).double() - x.double()).abs()[inside]
    # float32 rounds x / scale and code * scale: half a unit in the last place of each, seen from the step size.
    slack = 1 + 2 * abs(fmt.qmin) * np.finfo(np.float32).eps
    assert bool((error <= scale.double() / 2 * slack).all())


@settings(deadline=None)
@given(moderate, st.sampled_from(FORMATS))
def test_monotonic(drawn, fmt):
    x, scale = drawn
    out = fake_quantize(x.sort().values, scale, fmt=fmt)
    assert bool((out[1:] >= out[:-1]).all())


@settings(deadline=None)
@given(moderate, st.sampled_from(FORMATS))
def test_sign_symmetric_away_from_saturation(drawn, fmt):
    x, scale = drawn
    x = x[(x / scale).abs() < fmt.qmax + 0.5]
    assert torch.equal(fake_quantize(-x, scale, fmt=fmt), -fake_quantize(x, scale, fmt=fmt))


@settings(deadline=None)
@given(tensors(), st.sampled_from(FORMATS))
def test_codes_are_integers_of_the_format(drawn, fmt):
    codes = quantize(*drawn, fmt=fmt)
    assert bool((codes == codes.round()).all())
    assert bool(((codes >= fmt.qmin) & (codes <= fmt.qmax)).all())


# Arguments.


@pytest.mark.parametrize(
    ("shape", "scale_shape", "axis", "message"),
    [
        ((2, 3), (3,), None, "3 elements; pass axis"),
        ((2, 3), (2,), 1, r"shape \(2,\), but axis 1 of x has size 3"),
        ((2, 3), (), 1, r"shape \(\), but axis 1 of x has size 3"),
        ((2, 3), (3,), 2, r"axis 2 is out of range for x of shape \(2, 3\)"),
        ((2, 3), (3,), -3, "axis -3 is out of range"),
    ],
)
def test_scale_that_does_not_fit_is_refused(shape, scale_shape, axis, message):
    with pytest.raises(QATError, match=message):
        fake_quantize(torch.zeros(shape), torch.ones(scale_shape), axis=axis)


# Gradient of x.


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gradient_is_one_inside_and_zero_outside(device, fmt):
    scale = 0.5
    low, high = fmt.qmin, fmt.qmax
    # Ties go to even: qmax + 0.5 rounds to qmax + 1 (even), outside; qmin - 0.5 to qmin (even), inside.
    codes = [
        0,
        0.5,
        high,
        high + 0.49,
        high + 0.5,
        high + 1,
        1e30,
        math.inf,
        low,
        low - 0.5,
        low - 0.51,
        -1e30,
        -math.inf,
        math.nan,
    ]
    inside = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    x = (torch.tensor(codes) * scale).to(device).requires_grad_()
    fake_quantize(x, torch.tensor(scale, device=device), fmt=fmt).backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [3.0 * one for one in inside]


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30), st.sampled_from(FORMATS))
def test_largest_magnitude_keeps_its_gradient(values, fmt):
    x = torch.tensor(values, requires_grad=True)
    fake_quantize(x, amax_to_scale(x.detach().abs().max(), fmt), fmt=fmt).sum().backward()
    assert bool((x.grad == 1).all())


def test_an_infinite_gradient_outside_the_range_is_dropped():
    x = torch.tensor([100.0, math.nan], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5)).backward(torch.tensor([math.inf, math.nan]))
    assert x.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gradient_inside_is_passed_on_bit_by_bit(dtype):
    x = torch.linspace(-1, 1, 9, dtype=dtype, requires_grad=True)
    grad = torch.randn(9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    fake_quantize(x, torch.tensor(0.1)).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gradient_has_the_dtype_of_the_input(dtype):
    x = torch.randn(5, dtype=dtype, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, scale).sum().backward()
    assert x.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32


# Gradient of the scale: LSQ, Esser et al. 2020, equation 3 and section 2.2.


def lsq_gradient(x, grad, scale, axis, fmt):
    """The published formula, element by element, in float64; ``v / s`` itself in float32, as the codes are."""
    x, grad, scale = (np.asarray(t.detach().cpu().to(torch.float32)) for t in (x, grad, scale))
    total = np.zeros(scale.shape)
    for index in np.ndindex(x.shape):
        channel = () if axis is None else (index[axis],)
        ratio = float(x[index] / scale[channel])
        if ratio <= fmt.qmin:
            slope = fmt.qmin
        elif ratio >= fmt.qmax:
            slope = fmt.qmax
        else:
            slope = round(ratio) - ratio  # Python's round: ties to even
        total[channel] += slope * float(grad[index])
    sharing = x.size if axis is None else x.size // x.shape[axis]
    return total / math.sqrt(sharing * fmt.qmax)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_gradient_is_the_published_one(device, fmt, axis, dtype):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, 4, 5, generator=generator) * 100).to(dtype).to(device)
    grad = torch.randn(x.shape, generator=generator).to(dtype).to(device)
    shape = () if axis is None else (x.shape[axis],)
    scale = (torch.rand(shape, generator=generator) + 0.5).to(device).requires_grad_()
    fake_quantize(x, scale, axis=axis, fmt=fmt).backward(grad)
    assert scale.grad.shape == scale.shape
    # Sums of at most 60 float32 terms of magnitude up to 128 |grad|.
    np.testing.assert_allclose(scale.grad.cpu(), lsq_gradient(x, grad, scale, axis, fmt), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [-127.6, -128.0, -128.4, 127.4, 127.0])
def test_scale_gradient_treats_the_last_half_step_as_x_does(value):
    """A value that rounds to the last code is inside, here and for the gradient of x; the paper clips from the code on."""
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(torch.tensor([value]), scale).sum().backward()
    code = min(max(round(value), -128), 127)
    assert scale.grad.item() * math.sqrt(127) == pytest.approx(code - value, abs=1e-5)


def test_scale_gradient_of_a_vector_is_per_element():
    x = torch.tensor([0.3, 0.3, 9.0])
    scale = torch.tensor([0.5, 0.25, 0.01], requires_grad=True)
    fake_quantize(x, scale, axis=0).sum().backward()
    # round(0.6) - 0.6, round(1.2) - 1.2, clipped at 127; one element shares each scale.
    expected = torch.tensor([0.4, -0.2, 127.0]) / math.sqrt(127)
    torch.testing.assert_close(scale.grad, expected)


def test_scale_gradient_agrees_with_finite_differences_of_the_smoothed_loss():
    """Averaged over uniform noise of one step, rounding is the identity: the loss is then differentiable in the scale.

    With x = scale * (n + u) and u uniform over whole steps, d/ds mean[(x_hat - x)^2] is 2 s / 12 in the interior: the
    mean square error of rounding is s^2 / 12. The straight-through gradient of that loss has this expectation.
    """
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.uniform(-50, 50, 200_000))

    def loss(step: float) -> float:
        values = x.numpy()
        return float(np.mean((np.clip(np.rint(values / step), -128, 127) * step - values) ** 2))

    step, delta = 0.8, 0.05
    difference = (loss(step + delta) - loss(step - delta)) / (2 * delta)
    scale = torch.tensor(step, requires_grad=True)
    data = x.to(torch.float32)
    (fake_quantize(data, scale) - data).square().mean().backward()
    gradient = scale.grad.item() * math.sqrt(data.numel() * 127)
    assert difference == pytest.approx(2 * step / 12, rel=0.02)
    assert gradient == pytest.approx(difference, rel=0.02)


def test_scale_gradient_of_clipped_values_agrees_with_finite_differences():
    """Where everything saturates the output is linear in the scale: no smoothing is needed."""
    x = torch.tensor([500.0, -500.0, 300.0])
    scale, step = torch.tensor(1.0, requires_grad=True), 0.25
    (fake_quantize(x, scale) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()

    def loss(value: float) -> float:
        return (fake_quantize(x, torch.tensor(value)) * torch.tensor([1.0, 2.0, -3.0])).sum().item()

    difference = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert scale.grad.item() * math.sqrt(3 * 127) == pytest.approx(difference, rel=1e-6)


def test_range_gradient_is_zero_at_the_floor():
    amax = torch.tensor([0.0, 1.0], requires_grad=True)
    amax_to_scale(amax).sum().backward()
    assert amax.grad.tolist() == [0.0, pytest.approx(1 / 127)]


# Compilers and transforms.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_gradient_reaches_the_input(dtype):
    """Some releases of the compiler drop the gradient of a result that is an alias or was made in place."""
    x = torch.tensor([-200.0, -3.0, 0.4, 2.0, 200.0], dtype=dtype, requires_grad=True)
    compiled = torch.compile(lambda t: fake_quantize(t, torch.tensor(1.0)), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
@given(exponent=st.integers(-24, 100), mantissa=st.integers(0, 2**23 - 1), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_quotients_survive_an_approximate_reciprocal(fmt, error, exponent, mantissa, seed):
    """One ``error`` units in the last place off, as GPU compilers divide; quotients near ties and integers, and others."""
    scale = np.float32(math.ldexp(1 + mantissa / 2**23, exponent))
    random = np.random.RandomState(seed)
    x = (random.randint(2 * fmt.qmin - 20, 2 * fmt.qmax + 20, 400) / 2).astype(np.float32) * scale
    x = np.concatenate([x.view(np.int32) + random.randint(-3, 4, 400).astype(np.int32) * (x != 0), x.view(np.int32)])
    x = np.concatenate([x.view(np.float32), random.uniform(-300, 300, 400).astype(np.float32) * scale])
    x = np.append(x, np.array(SPECIAL, np.float32))
    with np.errstate(over="ignore"):
        expected = x / scale
    rough = (np.float32(1 / np.float64(scale)).view(np.int32) + np.int32(error)).view(np.float32)
    found = quotient(torch.from_numpy(x), torch.tensor(scale), torch.tensor(rough))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", [None, 1])
def test_compiled_equals_eager(device, backend, axis):
    x = hard_values(0.1)[:1800].reshape(30, 6, 10).to(device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(device)
    initial = torch.full(() if axis is None else (6,), 0.1, device=device)

    def run(function):
        a, scale = x.clone().requires_grad_(), initial.clone().requires_grad_()
        out = function(a, scale)
        out.backward(grad)
        return out.detach(), a.grad, scale.grad

    def both(a, scale):
        return fake_quantize(a, scale, axis=axis)

    eager, compiled = run(both), run(torch.compile(both, fullgraph=True, backend=backend))
    for ours, theirs in zip(eager[:2], compiled[:2], strict=True):
        assert torch.equal(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0))
    # A sum's order is the compiler's choice; it holds a NaN where x does.
    torch.testing.assert_close(eager[2], compiled[2], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_equals_a_loop():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(5))
    scale = torch.tensor([0.1, 0.2, 0.3])
    batched = torch.func.vmap(lambda t: fake_quantize(t, scale, axis=0))(x)
    assert torch.equal(batched, torch.stack([fake_quantize(t, scale, axis=0) for t in x]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_per_sample_gradients_equal_a_loop():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
    gradient = torch.func.grad(lambda t, s: fake_quantize(t, s).square().sum(), argnums=(0, 1))
    scale = torch.tensor(0.01)  # clips
    batched = torch.func.vmap(gradient, in_dims=(0, None))(x, scale)
    looped = [gradient(t, scale) for t in x]
    assert torch.equal(batched[0], torch.stack([g[0] for g in looped]))
    torch.testing.assert_close(batched[1], torch.stack([g[1] for g in looped]))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_for_export_is_well_formed_and_equal(device, axis, dtype):
    x = (torch.randn(3, 4, generator=torch.Generator().manual_seed(7)) * 9).to(dtype).to(device)
    scale = torch.full(() if axis is None else (3,), 0.1, device=device)
    torch.library.opcheck(fake_quantize_node, (x, scale, axis, "int8"))
    assert torch.equal(fake_quantize_node(x, scale, axis, "int8"), fake_quantize(x, scale, axis=axis))
