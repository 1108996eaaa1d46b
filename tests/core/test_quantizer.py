"""One Q/DQ site: its states, its range, and how both survive saving and copying."""

import copy
import io
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from qat.core.config import QuantConfig
from qat.core.numerics import INT4, INT8, SCALE_MIN, fake_quantize
from qat.core.quantizer import Quantizer, State, WeightQuantizer, is_prepared, quantizers
from qat.errors import QATError
from qat.nn import QuantConv2d, QuantLinear
from qat.nn.layers import make_weight_quantizer, quant_class

X = torch.tensor([0.26, -0.9, 3.0])


def site(amax: float = 1.27, **kwargs) -> Quantizer:
    quantizer = Quantizer(**kwargs)
    quantizer.set_range(torch.tensor(amax))
    return quantizer


def by_hand(x, amax, qmin=-128, qmax=127):
    """Fake quantization written out in NumPy's float32, ``amax`` broadcast as given."""
    scale = np.asarray(amax, np.float32) / np.float32(qmax)
    return np.clip(np.rint(np.asarray(x.detach(), np.float32) / scale), qmin, qmax).astype(np.float32) * scale


def layer(cls=nn.Linear, *args, **config) -> nn.Module:
    """A quantized layer with weight seed 0 and no ranges."""
    torch.manual_seed(0)
    module = cls(*(args or (4, 3)))
    weight_site = make_weight_quantizer(module.weight, QuantConfig(**config).site("any"))
    module.__class__ = quant_class(cls)
    module.add_quantizers(Quantizer(learned=weight_site.learned), weight_site)
    return module


def calibrated(*args, **config) -> nn.Module:
    module = layer(*args, **config)
    module.input_quantizer.set_range(torch.tensor(1.0))
    module.weight_quantizer.set_range(module.weight_quantizer.weight_amax(module.weight))
    return module


# States.


def test_new_site_passes_the_same_tensor_on():
    new = Quantizer()
    assert (new.state, new.has_range) == (State.OFF, False)
    assert new(X) is X


def test_quantizing_site_fake_quantizes():
    np.testing.assert_array_equal(site()(X), by_hand(X, 1.27))


def test_collecting_site_shows_the_tensor_and_passes_it_on():
    seen = []

    class Observer:
        def observe(self, x):
            seen.append(x)

    new = Quantizer()
    new.observer = Observer()
    new.set_state(State.COLLECTING)
    assert new(X) is X
    assert seen[0] is X


def test_collecting_site_without_observer_passes_on():
    new = Quantizer()
    new.set_state(State.COLLECTING)
    assert new(X) is X


def test_switching_off_keeps_the_range():
    quantizer = site()
    quantizer.set_state(State.OFF)
    assert quantizer(X) is X
    quantizer.set_state(State.QUANTIZING)
    np.testing.assert_array_equal(quantizer(X), by_hand(X, 1.27))


@pytest.mark.parametrize("state", [State.QUANTIZING, State.EXPORTING])
@pytest.mark.parametrize("make", [Quantizer, lambda: WeightQuantizer(axis=0, channels=3)])
def test_site_without_range_cannot_quantize(state, make):
    quantizer = make()
    with pytest.raises(QATError, match=r"amax is unset\. Run qat\.calibrate"):
        quantizer.set_state(state)
    assert quantizer.state is State.OFF


def test_exporting_site_gives_the_quantizing_output():
    quantizer = site()
    expected = quantizer(X)
    quantizer.export_scale = quantizer.scale.detach()
    quantizer.set_state(State.EXPORTING)
    assert torch.equal(quantizer(X), expected)


# Ranges.


@pytest.mark.parametrize(
    ("amax", "message"),
    [
        (torch.tensor([1.0]), r"shape \(1,\), this site needs \(\)"),
        (torch.ones(3), r"shape \(3,\), this site needs \(\)"),
        (torch.tensor(-1.0), "finite and not negative"),
        (torch.tensor(math.inf), "finite and not negative"),
        (torch.tensor(math.nan), "finite and not negative"),
    ],
)
def test_bad_range_is_refused_and_changes_nothing(amax, message):
    quantizer = site(2.0)
    quantizer.set_state(State.OFF)
    with pytest.raises(QATError, match=message):
        quantizer.set_range(amax)
    assert (quantizer.amax.item(), quantizer.state) == (2.0, State.OFF)


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_zero_range_becomes_the_smallest_scale(fmt):
    quantizer = site(0.0, fmt=fmt)
    assert quantizer.has_range
    assert quantizer.scale.item() == SCALE_MIN
    assert bool(quantizer(torch.zeros(3)).eq(0).all())


def test_range_of_another_dtype_is_stored_in_float32():
    quantizer = Quantizer()
    quantizer.set_range(torch.tensor(3.0, dtype=torch.float64))
    assert quantizer.amax.dtype == torch.float32


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_converting_the_model_leaves_ranges_in_float32(convert, learned):
    amax = 70001.5  # float16 ends at 65504, bfloat16 has 8 bits
    model = nn.Sequential(nn.Linear(2, 2), site(amax, learned=learned))
    convert(model)
    assert model[0].weight.dtype != torch.float32
    assert model[1].amax.dtype == torch.float32
    assert model[1].amax.item() == amax


def test_range_moves_with_the_model():
    assert site().to("meta").amax.is_meta


def test_moving_and_converting_at_once_moves_only():
    moved = site().to("meta", torch.float16)
    assert moved.amax.is_meta
    assert moved.amax.dtype == torch.float32


# Learned ranges.


def test_learned_range_is_a_parameter_of_the_same_shape_and_key():
    plain, learned = Quantizer(), Quantizer(learned=True)
    assert list(plain.state_dict()) == list(learned.state_dict()) == ["amax"]
    assert [name for name, _ in learned.named_parameters()] == ["amax"]
    assert list(plain.parameters()) == []
    assert learned.amax.shape == plain.amax.shape == ()


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_sgd_moves_a_learned_range_as_it_moves_the_scale_of_lsq(fmt):
    """LSQ's parameter is the scale: ``scale -= lr * slope / sqrt(N * qmax)`` (section 2.2)."""
    scale, lr = 0.01, 1e-3
    quantizer = site(fmt.qmax * scale, fmt=fmt, learned=True)
    x = torch.tensor([0.013, 0.026, 5.0])
    quantizer(x).sum().backward()
    torch.optim.SGD([quantizer.amax], lr).step()
    slope = (1 - 1.3) + (3 - 2.6) + fmt.qmax
    assert quantizer.scale.item() == pytest.approx(scale - lr * slope / math.sqrt(3 * fmt.qmax), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_learned_range_below_the_floor_can_only_grow(sign):
    for direction, moves in ((1.0, False), (-1.0, True)):
        quantizer = site(1.0, learned=True)
        with torch.no_grad():
            quantizer.amax.fill_(sign * 1e-9)
        (direction * quantizer(torch.tensor([1.0]))).sum().backward()
        assert (quantizer.amax.grad.item() != 0) == moves
        assert sign * quantizer.amax.grad.item() <= 0


def test_a_step_beyond_zero_is_reflected():
    """Gradient descent may carry a range past zero, where there is no scale: it goes on as the same magnitude."""
    there, mirrored = site(1.27, learned=True), site(1.27, learned=True)
    with torch.no_grad():
        mirrored.amax.neg_()
    x = torch.tensor([0.013, 0.026, 5.0])
    assert torch.equal(there(x), mirrored(x))
    assert torch.equal(there.scale, mirrored.scale)
    there(x).sum().backward()
    mirrored(x).sum().backward()
    assert torch.equal(there.amax.grad, -mirrored.amax.grad)
    mirrored.amax.requires_grad_(False)
    assert torch.equal(there(x), mirrored(x))
    again = Quantizer(learned=True)
    again.load_state_dict(mirrored.state_dict())
    assert torch.equal(there(x), again(x))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_learned_ranges_follow_published_steps_when_compiled_too(mode):
    quantizer = site(1.27, learned=True)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.01, requires_grad=True)
    fake_quantize(x, scale).square().sum().backward()
    run = torch.compile(quantizer, fullgraph=True, backend="aot_eager") if mode == "compiled" else quantizer
    run(x).square().sum().backward()
    torch.testing.assert_close(quantizer.amax.grad, 127 * scale.grad, rtol=1e-5, atol=0)


def test_learned_weight_range_gets_a_gradient_per_channel():
    module = calibrated(weight_granularity="channel", learn_scales=True)
    module(torch.rand(2, 4)).square().sum().backward()
    assert module.weight_quantizer.amax.grad.shape == (3,)
    assert module.input_quantizer.amax.grad.shape == ()


def test_set_range_keeps_the_parameter_and_its_gradient_flag():
    quantizer = Quantizer(learned=True)
    before = quantizer.amax
    quantizer.set_range(torch.tensor(2.0))
    assert quantizer.amax is before
    assert before.requires_grad


# Weights.


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_weight_range_is_the_largest_magnitude_along_the_axis(axis):
    weight = torch.randn(3, 4, 5)
    quantizer = WeightQuantizer(axis=axis, channels=1 if axis is None else weight.shape[axis])
    magnitude = np.abs(weight.numpy())
    expected = magnitude.max() if axis is None else np.moveaxis(magnitude, axis, 0).reshape(weight.shape[axis], -1).max(1)
    np.testing.assert_array_equal(quantizer.weight_amax(weight), expected)
    quantizer.set_range(quantizer.weight_amax(weight))
    assert quantizer(weight).shape == weight.shape


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_following_range_uses_the_present_weight(granularity):
    module = calibrated(weight_granularity=granularity)
    with torch.no_grad():
        module.weight.mul_(torch.tensor([[3.0], [1.0], [0.5]]))
    magnitude = module.weight.abs()
    amax = magnitude.amax(1, keepdim=True) if granularity == "channel" else magnitude.max()
    np.testing.assert_array_equal(module.weight_quantizer(module.weight).detach(), by_hand(module.weight, amax.detach()))


def test_range_of_a_vector_is_per_element():
    site = WeightQuantizer(axis=0, channels=3)
    assert site.weight_amax(torch.tensor([1.0, -2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]


def test_frozen_range_stays():
    module = calibrated(weight_range="frozen")
    amax = module.weight_quantizer.amax.clone()
    with torch.no_grad():
        module.weight.mul_(3)
    np.testing.assert_array_equal(module.weight_quantizer(module.weight).detach(), by_hand(module.weight, amax[:, None]))
    assert torch.equal(module.state_dict()["weight_quantizer.amax"], amax)


@pytest.mark.parametrize("cls_args", [(nn.Linear, 4, 3), (nn.Conv2d, 2, 3, 3)], ids=["linear", "conv"])
def test_checkpoint_after_training_holds_the_present_range(cls_args):
    module = calibrated(*cls_args)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    x = torch.rand(2, 4) if cls_args[0] is nn.Linear else torch.rand(2, 2, 5, 5)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    state = nn.Sequential(module).state_dict()
    assert torch.equal(state["0.weight_quantizer.amax"], module.weight.detach().abs().flatten(1).amax(1))


def test_checkpoint_of_an_uncalibrated_layer_holds_no_range():
    assert bool(layer().state_dict()["weight_quantizer.amax"].eq(0).all())


@pytest.mark.parametrize("weight_range", ["follow", "frozen"])
def test_dead_channel_gives_zeros_and_no_nan(weight_range):
    module = layer(weight_range=weight_range)
    with torch.no_grad():
        module.weight[1] = 0
    module.weight_quantizer.set_range(module.weight_quantizer.weight_amax(module.weight))
    assert module.weight_quantizer.has_range
    out = module.weight_quantizer(module.weight)
    out.sum().backward()
    assert bool(out[1].eq(0).all())
    assert bool(out.isfinite().all())
    assert bool(module.state_dict()["weight_quantizer.amax"].gt(0).all())
    assert bool(module.weight.grad.eq(1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weight_is_quantized_in_float32(dtype):
    module = calibrated().to(dtype)
    module.weight_quantizer.refresh(module.weight)
    amax = module.weight.detach().float().abs().amax(1, keepdim=True)
    out = module.weight_quantizer(module.weight)
    assert out.dtype == dtype
    expected = torch.from_numpy(by_hand(module.weight.float(), amax)).to(dtype)
    assert torch.equal(out, expected)


def test_learned_excludes_follow():
    assert not WeightQuantizer(learned=True, follow=True).follow


# Saving and loading.


@pytest.mark.parametrize("initial", list(State))
@pytest.mark.parametrize(("amax", "state"), [(2.0, State.QUANTIZING), (0.0, State.OFF)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_switches_on_exactly_where_there_is_a_range(initial, amax, state, learned, assign):
    quantizer = site(5.0, learned=learned)
    quantizer.state = initial
    quantizer.load_state_dict({"amax": torch.tensor(amax)}, strict=True, assign=assign)
    assert (quantizer.amax.item(), quantizer.state) == (amax, state)
    assert quantizer.learned == learned


def test_loading_without_the_key_changes_nothing():
    quantizer = site(5.0)
    quantizer.load_state_dict({}, strict=False)
    assert (quantizer.amax.item(), quantizer.state) == (5.0, State.QUANTIZING)


def test_loading_a_range_of_another_shape_fails():
    with pytest.raises(RuntimeError, match="size mismatch for amax"):
        WeightQuantizer(axis=0, channels=3).load_state_dict({"amax": torch.ones(4)})


@pytest.mark.parametrize("learned", [False, True])
def test_plain_and_learned_checkpoints_are_interchangeable(learned):
    target = Quantizer(learned=learned)
    target.load_state_dict(site(3.0, learned=not learned).state_dict())
    assert (target.amax.item(), target.state) == (3.0, State.QUANTIZING)


def through_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
@pytest.mark.parametrize("module", [site(), site(learned=True), calibrated(), calibrated(nn.Conv2d, 2, 3, 3)])
def test_copies_have_the_same_state_and_own_tensors(duplicate, module):
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert str(twin) == str(module)
    for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    for (_, a), (_, b) in zip(quantizers(twin), quantizers(module), strict=True):
        assert a.state is b.state


def test_checkpoint_holds_tensors_only():
    buffer = io.BytesIO()
    torch.save(calibrated().state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == {
        "weight",
        "bias",
        "input_quantizer.amax",
        "weight_quantizer.amax",
    }


# What is shown.


def test_repr_shows_format_granularity_range_and_state():
    assert repr(site(2.0)) == "Quantizer(int8, per-tensor, amax=2, quantizing)"
    assert repr(Quantizer(learned=True)) == "Quantizer(int8, per-tensor, amax=0, learned, off)"
    weight_site = WeightQuantizer(INT4, axis=0, channels=2)
    weight_site.set_range(torch.tensor([1.0, 3.0]))
    assert repr(weight_site) == "WeightQuantizer(int4, per-channel axis=0, amax=[1, 3], quantizing)"
    assert "amax=meta" in repr(Quantizer(device=torch.device("meta")))


def test_quantizers_yields_a_shared_site_once():
    model = nn.ModuleDict({"a": calibrated(), "b": calibrated()})
    model["b"].input_quantizer = model["a"].input_quantizer
    assert [name for name, _ in quantizers(model)] == [
        "a.input_quantizer",
        "a.weight_quantizer",
        "b.weight_quantizer",
    ]


# Sites that read one tensor.


def ranged(learned=False):
    site = Quantizer(learned=learned)
    site.set_range(torch.tensor(2.0))
    return site


def leaf(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def inner(*shape):
    """As within a network."""
    return leaf(*shape) * 1


def test_one_tensor_is_quantized_once():
    site, x = ranged(), inner(4, 8)
    first = site(x)
    assert site(x) is first
    assert site(x.detach().clone()) is not first


@pytest.mark.parametrize("learned", [False, True])
def test_a_leaf_may_come_again_after_a_backward_pass(learned):
    site, x = ranged(learned), leaf(4, 8)
    held = [site(x) for _ in range(2)]
    for result in held:
        result.sum().backward()
    assert x.grad.abs().sum() > 0


def test_its_gradient_is_the_sum_of_its_readers():
    site, x = ranged(), leaf(4, 8)
    inside = x * 1
    (site(inside) * 2 + site(inside) * 3).sum().backward()
    alone = leaf(4, 8)
    other = ranged()(alone)
    (other * 5).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad, rtol=0, atol=0)


def test_nothing_is_kept_alive_for_it():
    site, x = ranged(), inner(4, 8)
    result = weakref.ref(site(x))
    assert result() is None
    assert torch.equal(site(x), ranged()(leaf(4, 8)))


def test_what_not_all_readers_have_had_is_kept_for_them():
    site, x = ranged(), inner(4, 8)
    site.readers = 3
    result = weakref.ref(site(x))
    assert result() is not None
    assert site(x) is result()
    assert site(x) is not None
    assert result() is None, "kept after the last reader"


def test_what_is_kept_goes_with_its_tensor():
    site, x = ranged(), inner(4, 8).detach()
    site.readers = 2
    result = weakref.ref(site(x))
    assert result() is not None
    del x
    assert result() is None


def test_what_is_kept_goes_with_the_next_tensor():
    site, x, y = ranged(), inner(4, 8), inner(4, 8)
    site.readers = 2
    result = weakref.ref(site(x))
    other = site(y)
    assert result() is None
    assert site(y) is other


def test_copies_hold_nothing_back():
    site, x = ranged(), inner(4, 8).detach()
    site.readers = 2
    result = weakref.ref(site(x))
    twins = [copy.deepcopy(site), pickle.loads(pickle.dumps(site))]
    assert [twin.readers for twin in twins] == [2, 2]
    site(x)
    assert result() is None


def in_place(site, x, result):
    with torch.no_grad():
        x.mul_(2)


def in_place_on_the_result(site, x, result):
    with torch.no_grad():
        result.zero_()


def another_range(site, x, result):
    site.set_range(torch.tensor(1.0))


def a_range_that_moved(site, x, result):
    with torch.no_grad():
        site.amax.mul_(0.5)


@pytest.mark.parametrize("change", [in_place, in_place_on_the_result, another_range, a_range_that_moved])
@pytest.mark.parametrize("learned", [False, True])
def test_what_changed_is_quantized_anew(change, learned):
    site, x = ranged(learned), inner(4, 8)
    result = site(x)
    change(site, x, result)
    fresh = Quantizer()
    fresh.set_range(site.amax.detach())
    again = site(x)
    assert again is not result
    assert torch.equal(again, fresh(x.detach()))


@pytest.mark.parametrize("first", [True, False])
def test_results_with_and_without_gradient_are_not_mixed(first):
    site, x = ranged(), inner(4, 8)
    with torch.set_grad_enabled(first):
        one = site(x)
    with torch.set_grad_enabled(not first):
        two = site(x)
    assert (one.requires_grad, two.requires_grad) == (first, not first)


def test_a_tensor_that_begins_to_require_a_gradient_is_quantized_anew():
    site, x = ranged(), torch.randn(4, 8)
    one = site(x)
    x.requires_grad_()
    assert site(x).requires_grad
    assert not one.requires_grad


@pytest.mark.parametrize("made_outside", [False, True])
def test_inference_tensors_pass(made_outside):
    site = ranged()
    x = torch.randn(4, 8)
    with torch.inference_mode():
        x = x if made_outside else torch.randn(4, 8)
        expected = site(x)
        assert torch.equal(site(x), expected)
    assert torch.equal(site(x), expected)
    assert torch.equal(site(x), expected)


def test_compiled_sites_are_not_compiled_again_after_eager_calls():
    site = ranged()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(site, backend=counter, fullgraph=True)
    for _ in range(3):
        result = compiled(inner(4, 8))
        assert torch.equal(result, site(inner(4, 8)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda site: pickle.loads(pickle.dumps(site))])
def test_a_site_that_was_used_can_be_copied(duplicate):
    site, x = ranged(), inner(4, 8)
    result = site(x)
    other = duplicate(site)
    assert torch.equal(other(x), result)
    assert other(x) is not result


def test_is_prepared_sees_any_site():
    assert is_prepared(nn.Sequential(calibrated()))
    assert not is_prepared(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(("float_class", "cls"), [(nn.Linear, QuantLinear), (nn.Conv2d, QuantConv2d)])
def test_torch_layers_have_named_classes(float_class, cls):
    assert quant_class(float_class) is cls


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_trace_is_the_same_with_and_without_gradients(learn_scales):
    # TensorBoard's picture of a model is such a trace; torch compares it with a second one, made without gradients.
    module = calibrated(learn_scales=learn_scales)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    traced = torch.jit.trace(module, x)
    assert torch.equal(traced(x), module(x))
    found = []
    for each in (traced, module):
        each(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
        module.zero_grad()
    assert all(map(torch.equal, *found))
