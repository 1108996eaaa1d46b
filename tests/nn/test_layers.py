"""Quantized layers against the float layer applied to operands that were quantized by hand."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.quantizer import State, quantizers
from qat.nn import QuantAttention, QuantConv2d, QuantLayer, QuantLinear, QuantPool
from qat.nn.attention import quant_attention_class
from qat.nn.layers import quant_class
from qat.nn.pool import AVERAGE_POOLS


def fake(x, amax, axis=None):
    """Fake quantization by NumPy."""
    values = x.detach().numpy()
    scale = np.asarray(amax, np.float32) / np.float32(127)
    if axis is not None:
        scale = scale.reshape([-1 if d == axis else 1 for d in range(values.ndim)])
    return torch.from_numpy(np.clip(np.rint(values / scale), -128, 127).astype(np.float32) * scale)


def fake_weight(weight, per_channel=True):
    magnitude = np.abs(weight.detach().numpy())
    if not per_channel:
        return fake(weight, magnitude.max())
    return fake(weight, magnitude.reshape(len(magnitude), -1).max(1), axis=0)


def prepared(layer: nn.Module, amax: float = 1.5, **config) -> nn.Module:
    """The layer with sites, every activation range ``amax``, weight ranges from the weights."""
    qat.prepare(layer, qat.QuantConfig(head=(), **config))
    for _, site in quantizers(layer):
        site.set_range(torch.full(site.amax.shape, amax))
    return layer


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONV = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
SIZES = [(9,), (7, 8), (5, 6, 4)]
OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2},
    {"groups": 4},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 2, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conv_equals_float_conv_of_quantized_operands(dimension, options):
    torch.manual_seed(0)
    layer = CONV[dimension](4, 8, 3, **options)
    reference, x = copy.deepcopy(layer), random(2, 4, *SIZES[dimension])
    reference.weight.data = fake_weight(layer.weight)
    assert torch.equal(prepared(layer)(x), reference(fake(x, 1.5)))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_float_linear_of_quantized_operands(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6, bias=bias), random(*shape)
    reference = copy.deepcopy(layer)
    reference.weight.data = fake_weight(layer.weight)
    assert torch.equal(prepared(layer)(x), reference(fake(x, 1.5)))


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 2)], ids=["linear", "conv"])
def test_one_scale_a_weight_if_configured(layer):
    reference, x = copy.deepcopy(layer), random(2, 4) if isinstance(layer, nn.Linear) else random(2, 4, 5, 5)
    reference.weight.data = fake_weight(layer.weight, per_channel=False)
    assert torch.equal(prepared(layer, weight_granularity="tensor")(x), reference(fake(x, 1.5)))


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}, {"groups": 2}, {"bias": False}], ids=str)
def test_transposed_conv_has_one_scale_a_weight(dimension, options):
    torch.manual_seed(0)
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dimension](4, 8, 3, **options)
    reference, x = copy.deepcopy(layer), random(2, 4, *SIZES[dimension])
    reference.weight.data = fake_weight(layer.weight, per_channel=False)
    assert torch.equal(prepared(layer, conv_transpose=True)(x), reference(fake(x, 1.5)))


def test_transposed_conv_takes_its_output_size():
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2), random(1, 2, 4, 4)
    reference = copy.deepcopy(layer)
    reference.weight.data = fake_weight(layer.weight, per_channel=False)
    out = prepared(layer, conv_transpose=True)(x, output_size=[10, 10])
    assert torch.equal(out, reference(fake(x, 1.5), output_size=[10, 10]))


def test_gradients_pass_to_input_weight_and_bias():
    layer, x = prepared(nn.Conv2d(2, 3, 3), amax=10.0), random(1, 2, 5, 5).requires_grad_()
    reference = nn.Conv2d(2, 3, 3)
    reference.weight.data, reference.bias.data = fake_weight(layer.weight), layer.bias.data
    twin = fake(x, 10.0).requires_grad_()
    layer(x).square().sum().backward()
    reference(twin).square().sum().backward()
    # Nothing is clipped, so straight through: the gradients of the float layer at the quantized point.
    for ours, theirs in ((x, twin), (layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert torch.equal(ours.grad, theirs.grad)


# Subclasses.


class PlainConv(nn.Conv2d):
    """Only a constructor of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)


class PlainLinear(nn.Linear):
    """Only a constructor of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)


class StandardizedConv(nn.Conv2d):
    """Its weight is standardized before use."""

    def standardized(self) -> torch.Tensor:
        mean = self.weight.mean([1, 2, 3], keepdim=True)
        return (self.weight - mean) / self.weight.std([1, 2, 3], keepdim=True)

    def forward(self, x):
        return F.conv2d(x, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1), value=7.0))


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input * 2, weight, bias)


class KeywordLinear(nn.Linear):
    def forward(self, x):
        return F.linear(input=x, weight=self.weight, bias=self.bias)


class HalfKeywordLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, bias=self.bias, weight=self.weight)


class ScaledLinear(nn.Linear):
    """With another product of other operands in its forward."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("mix", torch.eye(self.out_features) * 2)

    def forward(self, x):
        return F.linear(super().forward(x), self.mix)


def quantized_by_hand(layer, x):
    """What each subclass computes if both operands of its weighted function are quantized."""
    if isinstance(layer, StandardizedConv):
        return F.conv2d(fake(x, 1.5), fake_weight(layer.standardized()), layer.bias)
    if isinstance(layer, PadsItself):
        return F.conv2d(fake(F.pad(x, (0, 1, 0, 1), value=7.0), 1.5), fake_weight(layer.weight), layer.bias)
    if isinstance(layer, OwnConvForward):
        return F.conv2d(fake(x * 2, 1.5), fake_weight(layer.weight), layer.bias)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(fake(x, 1.5), fake_weight(layer.weight), layer.bias)
    out = F.linear(fake(x, 1.5), fake_weight(layer.weight), layer.bias)
    return F.linear(out, layer.mix) if isinstance(layer, ScaledLinear) else out


SUBCLASSES = [
    PlainConv(3),
    StandardizedConv(3, 3, 3),
    PadsItself(3, 3, 3),
    OwnConvForward(3, 3, 3),
    PlainLinear(3),
    KeywordLinear(3, 3),
    HalfKeywordLinear(3, 3),
    ScaledLinear(3, 5),
]


def subclass_case(layer):
    layer = copy.deepcopy(layer)
    return layer, random(2, 3) if isinstance(layer, nn.Linear) else random(1, 3, 6, 6)


@pytest.mark.parametrize("layer", SUBCLASSES, ids=lambda m: type(m).__name__)
def test_subclass_keeps_its_own_forward(layer):
    layer, x = subclass_case(layer)
    expected = quantized_by_hand(layer, x)
    assert torch.equal(prepared(layer)(x), expected)


@pytest.mark.parametrize("layer", SUBCLASSES, ids=lambda m: type(m).__name__)
def test_subclass_stays_an_instance_of_its_class(layer):
    layer, _ = subclass_case(layer)
    float_class = type(layer)
    prepared(layer)
    assert isinstance(layer, (float_class, QuantLayer))
    assert isinstance(layer, float_class)
    assert type(layer).__name__ == f"Quant{float_class.__name__}"
    assert quant_class(float_class) is type(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("layer", SUBCLASSES, ids=lambda m: type(m).__name__)
def test_subclass_can_be_copied(layer, duplicate):
    layer, x = subclass_case(layer)
    twin = duplicate(prepared(layer))
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    qat.restore(twin)
    assert isinstance(layer, QuantLayer)
    assert type(twin) is type(subclass_case(layer)[0]).float_class


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", SUBCLASSES, ids=lambda m: type(m).__name__)
def test_subclass_compiles_to_one_graph(layer, training):
    layer, x = subclass_case(layer)
    prepared(layer).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_timm_conv_with_same_padding():
    timm = pytest.importorskip("timm", reason="needs timm")
    layer = timm.layers.Conv2dSame(3, 4, 3, stride=2)
    x = random(1, 3, 7, 8)
    padded = F.pad(x, (0, 1, 1, 1))  # TensorFlow's SAME: 7 -> 4 needs 2 in all, 8 -> 4 needs 1, the odd one at the end
    expected = F.conv2d(fake(padded, 1.5), fake_weight(layer.weight), layer.bias, stride=2)
    assert torch.equal(prepared(layer)(x), expected)
    assert isinstance(layer, timm.layers.Conv2dSame)


def test_a_layer_inside_a_subclass_is_not_taken_for_it():
    """An adapter of another shape beside the weight stays in float."""

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    layer, x = Adapted(), random(2, 6)
    expected = F.linear(fake(x, 1.5), fake_weight(layer.weight), layer.bias) + layer.up(layer.down(x))
    assert torch.equal(prepared(layer)(x), expected)


# Average pooling.

POOLS = [
    (nn.AvgPool1d(2), 3),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False), 4),
    (nn.AvgPool3d(2), 5),
    (nn.AdaptiveAvgPool1d(2), 3),
    (nn.AdaptiveAvgPool2d((1, 2)), 4),
    (nn.AdaptiveAvgPool3d(1), 5),
]


@pytest.mark.parametrize(("pool", "dimensions"), POOLS, ids=lambda p: type(p).__name__)
def test_pooling_reads_a_quantized_input(pool, dimensions):
    model = nn.Sequential(nn.Identity(), copy.deepcopy(pool), nn.Flatten(), nn.LazyLinear(3))
    x = random(2, 3, *[6] * (dimensions - 2))
    model(x)  # the linear layer learns its size
    prepared(model)
    model[3].input_quantizer.set_state(State.OFF)
    model[3].weight_quantizer.set_state(State.OFF)
    assert isinstance(model[1], QuantPool)
    assert isinstance(model[1], AVERAGE_POOLS)
    assert torch.equal(model(x), F.linear(pool(fake(x, 1.5)).flatten(1), model[3].weight, model[3].bias))


def test_pooling_can_be_copied():
    model = prepared(nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is type(model[1])
        assert torch.equal(twin(random(2, 3, 4)), model(random(2, 3, 4)))


# Attention.

EMBED, HEADS, LENGTH, KEYS, BATCH = 8, 2, 5, 7, 3
MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "kdim_vdim_no_bias": {"kdim": 6, "vdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "everything": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
PADDING = torch.zeros(BATCH, KEYS, dtype=torch.bool)
PADDING[0, 5:] = True
PADDING[2, 1:3] = True
CAUSAL = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
CALLS = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "each_head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "float_padding": {"key_padding_mask": random(BATCH, KEYS, seed=5)},
    "bool_mask": {"attn_mask": CAUSAL},
    "float_mask": {"attn_mask": random(LENGTH, KEYS, seed=6)},
    "mask_a_head": {"attn_mask": random(BATCH * HEADS, LENGTH, KEYS, seed=7)},
    "both_masks": {"attn_mask": random(BATCH * HEADS, LENGTH, KEYS, seed=8) > 1, "key_padding_mask": PADDING},
    "both_masks_no_weights": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal_weights": {"attn_mask": CAUSAL, "is_causal": True},
}


def attention(options=None, **config):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(EMBED, HEADS, **(options or {}))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_()  # zero initially: a forgotten bias would go unnoticed
    return module


def operands(options, *, unbatched=False):
    shapes = [(LENGTH, EMBED), (KEYS, options.get("kdim", EMBED)), (KEYS, options.get("vdim", EMBED))]
    first = options.get("batch_first", False)
    made = []
    for seed, (length, width) in enumerate(shapes):
        shape = (length, width) if unbatched else (BATCH, length, width) if first else (length, BATCH, width)
        made.append(random(*shape, seed=seed))
    return made


def collecting(module):
    """Sites that let everything pass, so that the quantized form computes the float result by itself."""
    qat.prepare(module, qat.QuantConfig(head=()))
    for _, site in quantizers(module):
        site.set_state(State.COLLECTING)
    return module


def assert_same_attention(ours, theirs):
    # Not bit-equal: torch scales the query before the product, or the scores inside a fused kernel; we divide the scores.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert (ours[1] is None) == (theirs[1] is None)
    if theirs[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_attention_without_quantization_equals_torch(options, call):
    module = attention(options)
    expected = module(*operands(options), **call)
    assert_same_attention(collecting(module)(*operands(options), **call), expected)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": PADDING[0]},
        {"attn_mask": CAUSAL},
        {"attn_mask": random(HEADS, LENGTH, KEYS), "key_padding_mask": PADDING[2].float()},
    ],
    ids=["plain", "no_weights", "each_head", "padding", "mask", "mask_a_head"],
)
def test_unbatched_attention_equals_torch(options, call):
    module = attention(options)
    inputs = operands(options, unbatched=True)
    expected = module(*inputs, **call)
    assert_same_attention(collecting(module)(*inputs, **call), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_draws_as_torch_does(need_weights):
    module = attention({"dropout": 0.5})
    inputs = operands({})
    torch.manual_seed(1)
    expected = module(*inputs, need_weights=need_weights)
    collecting(module)
    torch.manual_seed(1)
    assert_same_attention(module(*inputs, need_weights=need_weights), expected)
    assert_same_attention(module.eval()(*inputs), qat.restore(copy.deepcopy(module))(*inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_attention_that_is_off_equals_torch_to_the_bit(options, training):
    module = attention(options).train(training)
    inputs = operands(options)
    with torch.set_grad_enabled(training):
        expected = module(*inputs)
        qat.prepare(module, qat.QuantConfig(head=()))
        out = module(*inputs)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("call", [{}, {"need_weights": False, "attn_mask": CAUSAL}], ids=["plain", "masked"])
def test_quantized_attention_equals_torch_on_quantized_operands(options, call):
    module = attention(options)
    inputs = operands(options)
    reference = copy.deepcopy(module)
    for name, parameter in reference.named_parameters():
        if name.endswith("proj_weight"):
            parameter.data = fake_weight(parameter)
    out_weight, out_bias = fake_weight(module.out_proj.weight), module.out_proj.bias
    reference.out_proj.weight.data = torch.eye(EMBED)
    if out_bias is not None:
        reference.out_proj.bias.data = torch.zeros(EMBED)
    before_projection = reference(*(fake(x, 1.5) for x in inputs), **call)[0]
    seen = {}
    prepared(module).out_quantizer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    out = module(*inputs, **call)[0]
    # The site sees batches first.
    between = seen["x"] if options.get("batch_first") else seen["x"].transpose(0, 1)
    torch.testing.assert_close(between, before_projection, rtol=1e-5, atol=1e-6)
    # From the very tensor that reached the site: the same codes, so equal to the bit but for the layout.
    torch.testing.assert_close(out, F.linear(fake(between, 1.5), out_weight, out_bias), rtol=1e-6, atol=1e-6)


def test_self_attention_quantizes_its_input_once():
    module = prepared(attention())
    calls = []
    for name in ("query", "key", "value"):
        getattr(module, f"{name}_quantizer").register_forward_pre_hook(lambda m, args, name=name: calls.append(name))
    x = operands({})[0]
    out = module(x, x, x)[0]
    assert calls == ["query"]
    torch.testing.assert_close(out, module(x, x.clone(), x.clone())[0], rtol=1e-5, atol=1e-6)


def test_one_site_switched_off_leaves_the_others_on():
    module = prepared(attention())
    inputs = operands({})
    with_all = module(*inputs)[0]
    module.query_quantizer.set_state(State.OFF)
    one_off = module(*inputs)[0]
    assert not torch.equal(one_off, with_all)
    assert not torch.allclose(one_off, qat.restore(copy.deepcopy(module))(*inputs)[0], rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_parameter_of_attention():
    module = prepared(attention({"kdim": 6, "vdim": 10, "add_bias_kv": True}), amax=10.0)
    module(*operands({"kdim": 6, "vdim": 10}))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.ne(0).any()), name


@pytest.mark.parametrize("state", [State.OFF, State.QUANTIZING])
def test_causal_hint_without_mask_is_refused_as_in_torch(state):
    module = prepared(attention())
    for _, site in quantizers(module):
        site.set_state(state)
    with pytest.raises((RuntimeError, ValueError), match="is_causal"):
        module(*operands({}), is_causal=True)


class OwnAttention(nn.MultiheadAttention):
    """Only a constructor of its own."""

    def __init__(self) -> None:
        super().__init__(EMBED, HEADS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [attention, OwnAttention])
def test_attention_can_be_copied_and_restored(make, duplicate):
    module = make()
    float_class, state = type(module), list(module.state_dict())
    twin = duplicate(prepared(module))
    inputs = operands({})
    assert type(twin) is type(module) is quant_attention_class(float_class)
    assert isinstance(twin, (QuantAttention, float_class))
    assert torch.equal(twin(*inputs)[0], module(*inputs)[0])
    qat.restore(twin)
    assert type(twin) is float_class
    assert list(twin.state_dict()) == state


@pytest.mark.parametrize("call", [{}, {"need_weights": False}], ids=["weights", "no_weights"])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10, "batch_first": True}], ids=["self", "cross"])
def test_attention_compiles_to_one_graph(options, call):
    module = prepared(attention(options)).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*operands(options), **call)[0], module(*operands(options), **call)[0])


# PyTorch's transformer layers, whose fused inference kernels bypass the modules.


def encoder_layer(**kwargs):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True, **kwargs)


TOKENS = random(BATCH, LENGTH, EMBED)
LEFT_ALIGNED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
ATTENTION_SITES, LINEAR_SITES, ADD_SITES = 6, 2, 2


def run_sites(model, *args, **kwargs):
    """Quantizers that quantize in one inference call."""
    ran = set()
    handles = [s.register_forward_hook(lambda m, a, o, name=name: ran.add(name)) for name, s in quantizers(model)]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_site_of_an_encoder_layer_runs_in_inference(norm_first):
    """Attention: 4 inputs and 2 weights; two linear layers and two Adds with two sites each."""
    model = encoder_layer(norm_first=norm_first).eval()
    report = qat.prepare(model, qat.QuantConfig(head=()), example_inputs=TOKENS)
    assert len(report.sites) == ATTENTION_SITES + 2 * LINEAR_SITES + 2 * ADD_SITES
    assert [report.count(kind) for kind in ("attention", "linear", "add")] == [1, 2, 2]
    qat.calibrate(model, [TOKENS], method="max", progress=False)
    # Key and value are the query: they are quantized once, together with it.
    unread = {"self_attn.key_quantizer", "self_attn.value_quantizer"}
    assert run_sites(model.eval(), TOKENS) >= {name for name, _ in quantizers(model)} - unread


@pytest.mark.parametrize("norm_first", [False, True])
def test_linear_layers_run_quantized_beside_a_float_attention(norm_first):
    model = encoder_layer(norm_first=norm_first).eval()
    config = qat.QuantConfig(head=(), rules=[{"match": "self_attn", "quantize": False}])
    qat.prepare(model, config, example_inputs=TOKENS)
    qat.calibrate(model, [TOKENS], method="max", progress=False)
    assert {"linear1.weight_quantizer", "linear2.weight_quantizer"} <= run_sites(model.eval(), TOKENS)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_with_padding_quantizes_in_inference_as_with_gradients(norm_first):
    model = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2).eval()
    report = qat.prepare(model, qat.QuantConfig(head=()), example_inputs=TOKENS)
    assert [report.count(kind) for kind in ("attention", "linear", "add")] == [2, 4, 4]
    qat.calibrate(model, [TOKENS], method="max", progress=False)
    with torch.no_grad():
        out = model.eval()(TOKENS, src_key_padding_mask=LEFT_ALIGNED)
    expected = model(TOKENS, src_key_padding_mask=LEFT_ALIGNED)
    assert torch.equal(out[~LEFT_ALIGNED], expected[~LEFT_ALIGNED])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_restored_encoder_uses_the_fused_path_again():
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    attributes = [sorted(m.__dict__) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        expected = model(TOKENS, src_key_padding_mask=LEFT_ALIGNED)
        qat.prepare(model, qat.QuantConfig(head=()), example_inputs=TOKENS)
        qat.restore(model)
        assert torch.equal(model(TOKENS, src_key_padding_mask=LEFT_ALIGNED), expected)
    assert bool(expected[LEFT_ALIGNED].eq(0).all())  # zeros are what the fused path gives: it ran
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_quantizes_self_and_cross_attention(norm_first):
    """Two attentions, two linear layers, three Adds."""
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(EMBED, HEADS, 16, batch_first=True, norm_first=norm_first).eval()
    memory = random(BATCH, KEYS, EMBED, seed=9)
    report = qat.prepare(model, qat.QuantConfig(head=()), example_inputs=(TOKENS, memory))
    assert [report.count(kind) for kind in ("attention", "linear", "add")] == [2, 2, 3]
    qat.calibrate(model, lambda m: m(TOKENS, memory), method="max", progress=False)
    ran = run_sites(model.eval(), TOKENS, memory)
    crossing = {f"multihead_attn.{name}_quantizer" for name in ("query", "key", "out", "in_weight", "out_weight")}
    assert crossing <= ran
    assert {"linear1.input_quantizer", "linear2.input_quantizer", "self_attn.out_quantizer"} <= ran


def test_layers_show_their_sites():
    shown = re.sub(r"\s+", " ", repr(prepared(nn.Linear(2, 3))))
    assert "QuantLinear( in_features=2, out_features=3, bias=True (input_quantizer): Quantizer(int8, per-tensor" in shown
    assert "(weight_quantizer): WeightQuantizer(int8, per-channel axis=0" in shown


@pytest.mark.parametrize(("float_class", "cls"), [(nn.Linear, QuantLinear), (nn.Conv2d, QuantConv2d)])
def test_torch_layers_become_the_public_classes(float_class, cls):
    assert quant_class(float_class) is cls
