"""The Triton kernels against the composite: the same bits. Without a GPU, in Triton's interpreter.

Triton decides when it is imported whether to interpret, so that happens in a process of its own.
"""

import math

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, crossed, run_interpreted

import qat
import qat.core.kernels
import qat.core.numerics
import qat.core.quantizer
from qat.core.numerics import INT4, INT8
from qat.errors import QATError
from qat.nn import recompute

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language


def on(*dtypes):
    """Runs of a test with tensors of these types, on a GPU and in the interpreter."""
    # The interpreter cuts bfloat16 off instead of rounding it.
    runs = [("cpu", dtype) for dtype in dtypes if INTERPRETED and dtype != torch.bfloat16]
    runs += [pytest.param(("cuda", dtype), marks=pytest.mark.gpu) for dtype in dtypes]
    return pytest.mark.parametrize("device", runs, indirect=True, ids=lambda run: f"{run[0]}-{run[1]}")


on_all = on(torch.float32, torch.float16, torch.bfloat16)
# Other types have no values so close to ties; layers have weights of this one, and autocast is tested by itself.
on_float32 = on(torch.float32)


@pytest.fixture
def device(request, monkeypatch):
    name, dtype = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return name, dtype
    monkeypatch.setattr(qat.core.kernels, "runs_triton", lambda x, *others: x.numel() > 0)
    return name, dtype


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_tritons_interpreter():
    run_interpreted(__file__, "float32")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_in_tritons_interpreter(dtype):
    run_interpreted(__file__, dtype, every=True)


LAYOUTS = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "one element": lambda x: x.flatten()[:1],
    "vector": lambda x: x.flatten()[:37],
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 3),
    "with gaps": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "four blocks": lambda x: x.repeat(2, 1, 3, 1),
    "many blocks": lambda x: x.repeat(4, 2, 3, 3),
    "long rows": lambda x: x.repeat(1, 2, 3, 3),
}
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 6.35, 6.375, -6.4, -6.425, 1e30]


def values(device, dtype, shape=(3, 5, 17, 9)):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(device, dtype)


def both(x, scale, grad, **settings):
    """Results and gradients of the composite and of the kernels."""
    found = []
    for function in (qat.core.numerics.fake_quantize, qat.core.kernels.fake_quantize):
        inputs = [x.detach().requires_grad_(), scale.detach().requires_grad_(scale.requires_grad)]
        y = function(*inputs, **settings)
        wanted = [t for t in inputs if t.requires_grad]
        found.append((y.detach(), *torch.autograd.grad(y, wanted, grad)))
    return found


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = a.float().cpu().numpy(), b.float().cpu().numpy()
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    kept = ~np.isnan(a)
    np.testing.assert_array_equal(a[kept].view(np.int32), b[kept].view(np.int32))


@on_all
@pytest.mark.parametrize(
    ("layout", "axis", "fmt"), crossed(LAYOUTS, [None, 0, -1], [INT8, INT4], slow=["many blocks"]), ids=str
)
def test_kernels_give_the_bits_of_the_composite(device, layout, axis, fmt):
    x = LAYOUTS[layout](values(*device))
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor(0.05) if axis is None else 0.01 + 0.1 * torch.rand(x.shape[axis], generator=generator)
    scale = scale.to(x.device)
    grad = torch.randn(x.shape, generator=generator).to(x)
    expected, found = both(x, scale, grad, axis=axis, fmt=fmt)
    same_bits(found[0], expected[0])
    same_bits(found[1], expected[1])
    assert found[0].stride() == torch.empty_like(x).stride()


LEARNED = [(None, layout) for layout in ("one element", "vector", "channels-last", "with gaps", "four blocks")]
LEARNED += [(0, layout) for layout in ("contiguous", "channels-last", "four blocks", "long rows")]
LEARNED += [pytest.param(axis, "many blocks", marks=pytest.mark.slow) for axis in (None, 0)]


@on_all
@pytest.mark.parametrize(("axis", "layout"), LEARNED)
def test_gradient_of_a_learned_scale_is_that_of_the_composite(device, layout, axis):
    x = LAYOUTS[layout](values(*device)).nan_to_num(1.0, 100.0, -100.0)
    scale = torch.tensor(0.05) if axis is None else torch.linspace(0.02, 0.09, x.shape[axis])
    scale = scale.to(x.device).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    expected, found = both(x, scale, grad, axis=axis)
    same_bits(found[0], expected[0])
    same_bits(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-5)


@on_all
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_of_a_learned_range_is_that_of_the_composite(device, axis, fmt, monkeypatch):
    """Also of ranges that a step has carried beyond zero, and below the floor, where they can only grow."""
    composite = qat.core.numerics.fake_quantize
    # The kernels must not leave it to the composite.
    monkeypatch.setattr(qat.core.numerics, "fake_quantize", None)

    def by_learned_scale(x, amax, *, axis, fmt):
        return composite(x, qat.core.numerics.learned_scale(amax, fmt), axis=axis, fmt=fmt)

    x = values(*device).nan_to_num(1.0, 100.0, -100.0)
    floor = fmt.qmax * qat.core.numerics.SCALE_MIN
    for ranges in ([6.0, -6.0, 0.5], [-2.0, floor / 2, -floor / 2], [floor / 2, -3.0, floor]):
        for sign in (1, -1):
            grad = sign * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
            found = []
            for run in (qat.core.kernels.fake_quantize_range, by_learned_scale):
                amax = torch.tensor(ranges[0] if axis is None else ranges).to(x.device).requires_grad_()
                t = x.detach().requires_grad_()
                y = run(t, amax, axis=axis, fmt=fmt)
                found.append((y.detach(), *torch.autograd.grad(y, (t, amax), grad)))
            same_bits(found[0][0], found[1][0])
            same_bits(found[0][1], found[1][1])
            torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-4)


@on_all
def test_a_learned_range_needs_no_gradient_without_training(device):
    x = values(*device)
    amax = torch.tensor([1.0, 2.0, 3.0], device=x.device, requires_grad=True)
    with torch.no_grad():
        y = qat.core.kernels.fake_quantize_range(x, amax, axis=0)
    assert not y.requires_grad
    same_bits(y, qat.core.numerics.fake_quantize(x, qat.core.numerics.amax_to_scale(amax.detach()), axis=0))


@on_all
def test_a_learned_range_along_an_axis_that_is_not_there_is_refused(device):
    amax = torch.ones(1, device=device[0], requires_grad=True)
    for x in (torch.tensor(1.0), torch.ones(2, 3)):
        with pytest.raises(QATError, match="axis 4 is out of range"):
            qat.core.kernels.fake_quantize_range(x.to(*device), amax, axis=4)


def sums(function, a, b, grad):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    y = function(a, b)
    return (y.detach(), *torch.autograd.grad(y, [a, b], grad))


@on_all
@pytest.mark.parametrize(
    ("layout", "only_a", "fmt"),
    crossed(
        ["channels-last", "one element", "vector", "contiguous", "four blocks", "many blocks"],
        *([False, True], [INT8, INT4]),
        slow=["many blocks"],
    ),
    ids=str,
)
def test_sum_in_one_pass_has_the_bits_of_three(device, layout, only_a, fmt):
    a = LAYOUTS[layout](values(*device))
    b = LAYOUTS[layout](values(*device).flip(0, 2, 3).contiguous())
    grad = LAYOUTS[layout](torch.randn(values(*device).shape, generator=torch.Generator().manual_seed(1)).to(values(*device)))
    ranges = torch.tensor(6.35, device=a.device), torch.tensor(2.1, device=a.device)

    def apart(a, b):
        quantized = [
            qat.core.numerics.fake_quantize(t, qat.core.numerics.amax_to_scale(r, fmt), fmt=fmt)
            for t, r in zip((a, b), ranges, strict=True)
        ]
        return quantized[0] + (b if only_a else quantized[1])

    def at_once(a, b):
        return qat.core.kernels.fake_quantize_add(a, ranges[0], b, None if only_a else ranges[1], fmt=fmt)

    for given in (grad, grad.expand_as(grad) if grad.ndim < 4 else grad.transpose(2, 3).contiguous().transpose(2, 3)):
        for found, expected in zip(sums(at_once, a, b, given), sums(apart, a, b, given), strict=True):
            same_bits(found, expected)
    with torch.no_grad():
        same_bits(at_once(a, b), apart(a, b))


@on_all
@pytest.mark.parametrize("change", ["shape", "dtype", "layout", "gaps", "learned", "empty"])
def test_no_kernel_for_sums_of_unlike_tensors(device, change):
    a, b, amax = values(*device), values(*device), torch.tensor(3.0, device=device[0])
    if change == "shape":
        b = b[:1]
    elif change == "dtype":
        b = b.double()
    elif change == "layout":
        b = b.to(memory_format=torch.channels_last)
    elif change == "gaps":
        a, b = a[..., ::2], b[..., ::2]
    elif change == "learned":
        amax.requires_grad_()
    else:
        a, b = a[:0], b[:0]
    assert qat.core.kernels.fake_quantize_add(a, amax, b, None) is None


@on_all
@pytest.mark.parametrize("shared", [False, True])
def test_residual_block_adds_in_one_pass(device, shared, monkeypatch):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(5, 5, 1)
            self.other = None if shared else torch.nn.Conv2d(5, 5, 1)

        def forward(self, x):
            return self.conv(x) + (x * 1 if self.other is None else self.other(x))

    torch.manual_seed(0)
    name, dtype = device
    model, x = Block().to(name, dtype), values(name, dtype).nan_to_num(1.0, 2.0, -2.0)
    qat.prepare(model, qat.QuantConfig(head=()))
    with monkeypatch.context() as patch:
        patch.setattr(qat.core.kernels, "runs_triton", lambda *tensors: False)
        qat.calibrate(model, [x], method="max", progress=False)
    model.train()
    found, counted = [], []
    real = qat.core.kernels.fake_quantize_add

    def counting(*args, **kwargs):
        result = real(*args, **kwargs)
        counted.append(result is not None)
        return result

    monkeypatch.setattr("qat.nn.add.fake_quantize_add", counting)
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr("qat.nn.add.fake_quantize_add", lambda *args, **kwargs: None)
        y = model(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))])
    assert counted == [True]
    for one, three in zip(*found, strict=True):
        same_bits(one.detach(), three.detach())


@on_all
def test_gradients_of_another_layout(device):
    x = values(*device).to(memory_format=torch.channels_last)
    scale = torch.tensor(0.05, device=x.device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    for other in (grad, grad.transpose(2, 3).contiguous().transpose(2, 3), grad[:, :1].expand_as(grad)):
        expected, found = both(x, scale, other)
        same_bits(found[1], expected[1])


@on_all
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_a_range_is_the_scale_that_follows_from_it(device, axis, fmt):
    x = values(*device)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        amax = 10 * torch.rand((), generator=generator) if axis is None else 10 * torch.rand(x.shape[1], generator=generator)
        # Zero is no range, but must not divide by zero.
        amax = amax.to(x.device) if axis is None else amax.clamp(min=0.5).sub(0.5).to(x.device)
        grad = torch.randn(x.shape, generator=generator).to(x)
        found = []
        for run in (
            lambda t, a=amax: qat.core.kernels.fake_quantize_range(t, a, axis=axis, fmt=fmt),
            lambda t, a=amax: qat.core.numerics.fake_quantize(t, qat.core.numerics.amax_to_scale(a, fmt), axis=axis, fmt=fmt),
        ):
            t = x.detach().requires_grad_()
            y = run(t)
            found.append((y.detach(), *torch.autograd.grad(y, t, grad)))
        same_bits(found[0][0], found[1][0])
        same_bits(found[0][1], found[1][1])


@triton.jit
def multiply_add(x, y, z, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


def rounds_once(device):
    """Whether ``tl.fma`` is fused: the interpreter of Triton 3.8 multiplies, rounds, and adds."""
    x = torch.tensor([1 + 2.0**-12], device=device)
    out = torch.zeros_like(x)
    multiply_add[(1,)](x, x, torch.tensor([-1 - 2.0**-11], device=device), out)
    return out.item() == 2.0**-24


@on_float32
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_codes_next_to_ties(device, fmt):
    """At and beside ``(n + 0.5) * scale``, where the rounded quotient decides, for scales of all magnitudes."""
    if not rounds_once(device[0]):
        pytest.skip("needs a fused multiply-add: a GPU, or the interpreter of Triton 3.9 or newer")
    generator = np.random.default_rng(0)
    mantissas = np.concatenate([generator.integers(2**23, 2**24, 40), [2**23, 2**23 + 1, 2**24 - 1, 2**23 + 2**12 - 1]])
    for mantissa, exponent in zip(mantissas, generator.integers(-46, 40, len(mantissas)), strict=True):
        scale = np.float32(np.ldexp(float(mantissa), int(exponent)))
        nearest = (np.arange(fmt.qmin - 2, fmt.qmax + 2, dtype=np.float64) + 0.5) * np.float64(scale)
        x = nearest.astype(np.float32)
        found = [x]
        for direction in (np.float32(np.inf), np.float32(-np.inf)):
            step = x
            for _ in range(3):
                step = np.nextafter(step, direction)
                found.append(step)
        x = torch.from_numpy(np.concatenate(found)).to(device[0])
        expected, kernel = both(x, torch.tensor(scale).to(x.device), torch.ones_like(x), fmt=fmt)
        same_bits(kernel[0], expected[0])
        same_bits(kernel[1], expected[1])


@on_all
def test_the_input_is_not_saved(device):
    x = values(*device).nan_to_num(0).requires_grad_()
    y = qat.core.kernels.fake_quantize(x, torch.tensor(0.05, device=x.device))
    (mask,) = y.grad_fn.saved_tensors
    assert mask.dtype == torch.int32
    assert mask.numel() == -(-x.numel() // 32)


WEIGHTS = {
    "convolution": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "linear": lambda x: x.flatten(1),
    "one a channel": lambda x: x[:, :1, :1, 0].flatten(1).contiguous(),
    "one channel": lambda x: x[:1],
    "long channels": lambda x: x.repeat(1, 8, 4, 1),
    "channels that do not lie together": lambda x: x.transpose(0, 1),
    "gaps": lambda x: x[:, :, 1:],
}


@on_all
@pytest.mark.parametrize(("layout", "axis", "fmt"), crossed(WEIGHTS, [0, None], [INT8, INT4]), ids=str)
def test_weight_with_the_range_that_follows_it(device, layout, axis, fmt):
    x = values(*device).nan_to_num(0.5, 1.0, -1.0).clamp(-9, 9)
    x[-1] = 0  # the smallest scale
    weight = WEIGHTS[layout](x)
    site = qat.core.quantizer.WeightQuantizer(fmt, axis=axis, channels=weight.shape[0])
    scale = site.range_scale(weight)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    found = []
    for function in (
        lambda w: qat.core.numerics.fake_quantize(w, scale, axis=axis, fmt=fmt),
        lambda w: qat.core.kernels.fake_quantize_weight(w, lambda: scale, axis=axis, fmt=fmt),
    ):
        w = weight.detach().requires_grad_()
        y = function(w)
        found.append((y.detach(), *torch.autograd.grad(y, w, grad)))
    same_bits(found[1][0], found[0][0])
    same_bits(found[1][1], found[0][1])


@on_all
def test_a_damaged_weight_stays_damaged(device):
    weight = values(*device).nan_to_num(0.5, 1.0, -1.0)
    weight[0, 0, 0, 0] = math.nan
    y = qat.core.kernels.fake_quantize_weight(weight, lambda: None, axis=0)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@on_all
def test_scale_that_does_not_fit_is_refused(device):
    with pytest.raises(QATError, match="pass axis"):
        qat.core.kernels.fake_quantize(values(*device), torch.ones(2, device=device[0]))


@on_all
def test_empty_tensors(device):
    x = values(*device)[:0]
    assert qat.core.kernels.fake_quantize(x, torch.tensor(0.05, device=x.device)).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True])
def test_more_elements_than_32_bits_can_count(learned):
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs a CUDA device with 30 GB")
    size = 2**31 + 3 * 4096 + 5
    x = torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(0))
    x.requires_grad_()
    scale = torch.tensor(0.02, device="cuda", requires_grad=learned)
    y = qat.core.kernels.fake_quantize(x, scale)
    (found,) = torch.autograd.grad(y, x, x.detach())
    for start in (0, 2**31 - 3000, size - 5000):
        part = slice(start, start + 5000)
        t = x.detach()[part].clone().requires_grad_()
        expected = qat.core.numerics.fake_quantize(t, scale)
        same_bits(y.detach()[part], expected.detach())
        same_bits(found[part], torch.autograd.grad(expected, t, t.detach())[0])


LAYERS = {
    "convolution": lambda: torch.nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "depthwise": lambda: torch.nn.Conv2d(8, 8, 3, dilation=2, groups=8, bias=False),
    "linear": lambda: torch.nn.Linear(9, 4),
}


@on_float32
@pytest.mark.parametrize(
    ("layout", "kind", "frozen"),
    crossed(["channels-last", "contiguous", "with gaps"], LAYERS, [(), ("weight",), ("bias",)]),
    ids=str,
)
def test_a_layer_in_one_function_is_the_layer_in_three(device, kind, layout, frozen, monkeypatch):
    name, dtype = device
    torch.manual_seed(0)
    model = torch.nn.Sequential(LAYERS[kind]())
    x = LAYOUTS[layout](values("cpu", dtype, (3, 8, 17, 18)).nan_to_num(1.0, 3.0, -3.0))[..., :9]
    qat.prepare(model, qat.QuantConfig(head=()))
    with monkeypatch.context() as patch:
        patch.setattr(qat.core.kernels, "runs_triton", lambda *tensors: False)
        qat.calibrate(model, [x], method="percentile", progress=False)
    model, x = model.to(name), x.to(name)
    for parameter in frozen:
        if getattr(model[0], parameter) is not None:
            getattr(model[0], parameter).requires_grad_(False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = []
    for whole, kept in ((False, 0), (True, 0), (True, x.nbytes)):
        monkeypatch.setattr(recompute, "pays", lambda x, whole=whole: whole)
        monkeypatch.setattr(recompute, "_KEPT", kept)
        t = x.detach().requires_grad_()
        y = model(t * 1)
        assert y.grad_fn.name().startswith("_Layer") is whole
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        found.append((y.detach(), *torch.autograd.grad(y, [t, *wanted], grad)))
    for one in found[1:]:
        for a, b in zip(found[0], one, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_in_one_function_under_autocast(kind, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(LAYERS[kind]()).cuda()
    x = values("cuda", torch.float32, (3, 8, 17, 9)).nan_to_num(1.0, 3.0, -3.0)
    qat.prepare(model, qat.QuantConfig(head=()))
    qat.calibrate(model, [x], method="percentile", progress=False)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for whole, kept in ((False, 0), (True, 0), (True, x.nbytes)):
            monkeypatch.setattr(recompute, "pays", lambda x, whole=whole: whole)
            monkeypatch.setattr(recompute, "_KEPT", kept)
            t = x.detach().to(dtype).requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = model(t * 1)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            found.append((y.detach(), *torch.autograd.grad(y, [t, *model.parameters()], grad)))
        for one in found[1:]:
            for a, b in zip(found[0], one, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
