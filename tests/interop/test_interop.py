"""Models of pytorch-quantization become models of qat with equal outputs, and go back."""

import copy
import io

import pytest
import pytorch_quantization_standin as pq
import torch
from prepare_nets import snapshot
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.numerics import SCALE_MIN, amax_to_scale, quantize
from qat.core.quantizer import State, is_prepared, quantizers
from qat.errors import QATError
from qat.interop import Imported, from_pytorch_quantization, load_pytorch_quantization, to_pytorch_quantization


class Block(nn.Module):
    """A residual block, as the example of pytorch-quantization has it: a quantizer on the identity branch."""

    def __init__(self, quantized, channels, out, stride):
        super().__init__()
        conv = pq.QuantConv2d if quantized else nn.Conv2d
        self.conv1, self.bn1 = conv(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.quantized = quantized
        if quantized:
            self.residual_quantizer = pq.TensorQuantizer()

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.quantized:
            identity = self.residual_quantizer(identity)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, quantized=False):
        super().__init__()
        torch.manual_seed(1)
        conv = pq.QuantConv2d if quantized else nn.Conv2d
        self.conv1 = conv(3, 8, 3, 1, 1)
        self.norm = (pq.QuantInstanceNorm2d if quantized else nn.InstanceNorm2d)(8, affine=True)
        self.maxpool = (pq.QuantMaxPool2d if quantized else nn.MaxPool2d)(3, 2, 1)
        self.layer1 = nn.Sequential(Block(quantized, 8, 8, 1), Block(quantized, 8, 16, 2))
        self.avgpool = (pq.QuantAdaptiveAvgPool2d if quantized else nn.AdaptiveAvgPool2d)(1)
        self.fc = (pq.QuantLinear if quantized else nn.Linear)(16, 10)

    def forward(self, x):
        x = self.maxpool(self.norm(self.conv1(x)).relu())
        return self.fc(torch.flatten(self.avgpool(self.layer1(x)), 1))


def batch(seed=0):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make_exact(module):
    """Ranges of 127 times a power of two, with which both formulas are exact. Some weights and activations are clipped."""
    for name, tensor in module.named_buffers():
        if name.endswith("_amax"):
            tensor.copy_(127 * 2 ** torch.round(torch.log2(tensor / 127)))
    return module


def source(exact=True):
    """A calibrated model of pytorch-quantization, with weights that have moved since, as in training."""
    model = pq.calibrate(Net(True), batch())
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter += 0.02 * noise
    return make_exact(model) if exact else model


SITES = 19  # 7 layers of 2, max and average pooling, instance norm, 2 identity branches


# Equal outputs


def test_outputs_are_equal_to_the_bit_where_both_formulas_are_exact():
    model, x = source(), batch(1)
    imported = load_pytorch_quantization(fresh := Net().eval(), model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert len(imported.sites) == len(imported.report.sites) == SITES
    assert not imported.unset
    moved = fresh.layer1[1].conv2
    assert (moved.weight.abs().amax((1, 2, 3)) > moved.weight_quantizer.amax).any()  # stored, not recomputed


@pytest.mark.parametrize("seed", range(3))
def test_codes_differ_next_to_ties_only_and_values_in_the_last_places(seed):
    """``x * (127 / amax)`` against ``x / (amax / 127)``. Measured: 52 of 40 million codes, values within 3.4 * 2 ** -24."""
    generator = torch.Generator().manual_seed(seed)
    amax = 10 ** torch.empty(20, 1).uniform_(-3, 3, generator=generator)
    x = torch.randn(20, 50_000, generator=generator) * amax / 2
    theirs = pq.fake_quant(x, amax)
    codes = quantize(x, amax_to_scale(amax[:, 0]), axis=0)
    ours = qat.fake_quantize(x, amax_to_scale(amax[:, 0]), axis=0)
    other = (theirs * 127 / amax).round() != codes
    exact = x.double() * 127 / amax.double()
    assert ((exact - exact.floor() - 0.5).abs()[other] < 1e-5 * 127).all()
    assert other.sum() <= 10
    assert torch.allclose(ours[~other], theirs[~other], rtol=4 * 2.0**-24, atol=0)


def test_outputs_for_any_range_are_as_close_as_pytorch_is_to_itself():
    """A code that flips at a tie changes all that follows: the other memory layout, which sums in another order, does that."""
    model, x = source(exact=False), batch(1)
    load_pytorch_quantization(fresh := Net().eval(), model.state_dict())
    with torch.no_grad():
        wanted, found = model(x), fresh(x)
        quantized_by = (pq_off(model)(x) - wanted).abs().max()
    assert (found - wanted).abs().max() < 0.2 * quantized_by


def pq_off(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, pq.TensorQuantizer):
            module._disabled = True
    return model


def test_live_modules_are_converted_in_place():
    model, x = source(), batch(1)
    wanted, weight = model(x), model.conv1.weight
    imported = from_pytorch_quantization(model)
    assert torch.equal(model(x), wanted)
    assert model.conv1.weight is weight
    assert isinstance(model.conv1, nn.Conv2d)
    assert isinstance(model.avgpool, nn.AdaptiveAvgPool2d)
    assert imported.sites["layer1.0.residual_quantizer.input_quantizer"] == "layer1.0.residual_quantizer"
    assert not any(isinstance(module, pq.TensorQuantizer) for module in model.modules())
    restored = qat.restore(model)
    assert type(restored.conv1) is nn.Conv2d
    assert type(restored.layer1[0].residual_quantizer) is nn.Identity
    float_model = Net().eval()
    float_model.load_state_dict(restored.state_dict())
    assert torch.equal(restored(x), float_model(x))


def test_an_imported_model_trains_with_ranges_that_stay():
    load_pytorch_quantization(model := Net().train(), source().state_dict())
    before = {path: site.amax.clone() for path, site in quantizers(model)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    model.eval()(batch())
    assert all(torch.equal(site.amax, before[path]) for path, site in quantizers(model))


def test_an_imported_model_exports_and_the_file_computes_the_same(tmp_path):
    load_pytorch_quantization(model := Net().eval(), source().state_dict())
    path = qat.export_onnx(model, tmp_path / "x.onnx", batch())
    segments = qat.parity(model, path, batch(1), segments=True).segments
    assert {segment.site for segment in segments} == {site for site, _ in quantizers(model)}
    # Each site on its own, fed with what PyTorch computed before it: only codes next to a tie may differ.
    assert all(segment.max_difference <= 1 and segment.differing <= 1e-3 * segment.elements for segment in segments)


# Placement


def test_sites_are_those_of_the_state_dict_and_their_settings_reproduce_them():
    state = source().state_dict()
    imported = load_pytorch_quantization(model := Net().eval(), state)
    placed = {site.path: site.what for site in imported.report.sites if site.kind in ("add", "pool", "other")}
    assert placed == {
        "norm": "input",
        "maxpool": "input",
        "layer1.0.quant_add0": "add b",
        "layer1.1.quant_add0": "add b",
        "avgpool": "input",
    }
    qat.prepare(other := Net().eval(), qat.QuantConfig.from_dict(imported.report.config.to_dict()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch(1)), model(batch(1)))


def test_layers_without_ranges_stay_in_float():
    state = {k: v for k, v in source().state_dict().items() if not ("_amax" in k and k.startswith(("fc", "layer1.0", "norm")))}
    imported = load_pytorch_quantization(model := Net(), state)
    assert {site.path.partition(".")[0] for site in imported.report.sites} == {"conv1", "maxpool", "layer1", "avgpool"}
    assert type(model.fc) is nn.Linear
    assert type(model.layer1[0]) is Block


def test_sites_of_one_tensor_share_a_quantizer_unless_their_ranges_differ():
    state = source().state_dict()
    shared = load_pytorch_quantization(model := Net(), state)
    assert model.layer1[1].conv1.input_quantizer is model.layer1[1].downsample[0].input_quantizer
    state["layer1.1.downsample.0._input_quantizer._amax"] = torch.tensor(127.0)
    apart = load_pytorch_quantization(model := Net(), state)
    assert model.layer1[1].downsample[0].input_quantizer.amax == 127
    assert apart.report.quantizers == shared.report.quantizers + 1
    assert "kept apart" in str(apart)
    qat.prepare(prepared := Net(), shared.report.config)
    with pytest.raises(QATError, match=r"its range is not that of layer1\.1\.conv1\._input_quantizer"):
        load_pytorch_quantization(prepared, state)


def test_a_prepared_model_gets_the_ranges_and_keeps_its_other_sites():
    state = source().state_dict()
    first = load_pytorch_quantization(model := Net().eval(), state)
    config = first.report.config.replace(add_inputs="both", weight_range="follow")
    qat.prepare(prepared := Net().eval(), config)
    with pytest.warns(UserWarning, match=r"layer1\.0\.quant_add0\.a_quantizer.*without a range"):
        imported = load_pytorch_quantization(prepared, state)
    assert torch.equal(prepared(batch(1)), model(batch(1)))
    assert imported.unset == ("layer1.0.quant_add0.a_quantizer", "layer1.1.quant_add0.a_quantizer")
    qat.calibrate(prepared, [batch()], progress=False)
    again = load_pytorch_quantization(prepared, state)
    assert not again.unset
    assert any("as before: layer1.0.quant_add0.a_quantizer" in note for note in again.notes)
    assert torch.equal(prepared.conv1.input_quantizer.amax, state["conv1._input_quantizer._amax"])


class TwoAdds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.a(x) + x
        return self.c(self.b(x) + x)


def layer_ranges(model, *names):
    state = dict(model.state_dict())
    for name in names:
        state[f"{name}._input_quantizer._amax"] = torch.tensor(127.0 / 32)
        state[f"{name}._weight_quantizer._amax"] = pq.weight_range(model.get_submodule(name).weight)
    return state


def test_a_quantizer_that_stands_alone_is_matched_only_where_it_is_clear():
    state = layer_ranges(TwoAdds(), "a", "b", "c") | {"my_quantizer._amax": torch.tensor(2.0)}
    with pytest.raises(QATError, match=r"my_quantizer: stands alone.*quant_add1.b_quantizer"):
        load_pytorch_quantization(TwoAdds(), state)
    names = {"quant_add1.b_quantizer": "my_quantizer"}
    imported = load_pytorch_quantization(model := TwoAdds(), state, sites=names)
    assert [site.path for site in imported.report.sites if site.kind == "add"] == ["quant_add1"]
    assert model.quant_add1.b_quantizer.amax == 2
    assert "residual_quantizer._amax" in to_pytorch_quantization(model)  # what the example calls it
    assert set(to_pytorch_quantization(model, sites=imported.sites)) == set(state)


def test_shared_modules_may_have_two_names():
    def net():
        torch.manual_seed(0)
        shared = nn.Conv2d(3, 3, 1)
        return nn.Sequential(shared, nn.ReLU(), shared)

    state = layer_ranges(net(), "0", "2")
    model = net()
    load_pytorch_quantization(model, state)
    assert set(to_pytorch_quantization(model)) == set(state)
    state["2._input_quantizer._amax"] = torch.tensor(1.0)
    with pytest.raises(QATError, match=r"its range is not that of 0\._input_quantizer"):
        load_pytorch_quantization(net(), state)


# Key layout


def test_round_trip_of_a_state_dict_is_equal():
    state = source(exact=False).state_dict()
    load_pytorch_quantization(model := Net(), state)
    back = to_pytorch_quantization(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].shape == state[key].shape for key in state)


def test_a_model_of_qat_can_be_loaded_there():
    config = qat.QuantConfig(head=(), add_inputs="residual", module_inputs=["maxpool", "norm"])
    qat.prepare(model := Net().eval(), config)
    qat.calibrate(model, [batch()], method="max", progress=False)
    with torch.no_grad():  # ranges follow the weights
        model.conv1.weight.mul_(2)
    state = to_pytorch_quantization(model)
    there = pq.calibrate(Net(True), batch(5))
    there.load_state_dict(state)
    assert torch.equal(there.conv1._weight_quantizer._amax, pq.weight_range(model.conv1.weight))
    exact = make_exact(there)
    load_pytorch_quantization(model, exact.state_dict())
    assert torch.equal(exact(batch(1)), model(batch(1)))


class PoolsByHand(nn.Module):
    """A pooling in forward, whose input is quantized."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.conv(x).relu(), 1).flatten(1))


def test_the_remedy_for_a_pooling_without_a_name_there_is_no_site():
    def made(**options):
        qat.prepare(model := PoolsByHand().eval(), qat.QuantConfig(head=(), **options))
        qat.calibrate(model, [batch()], progress=False)
        return model

    with pytest.raises(QATError, match=r"quant_pool0: .* prepare without it: QuantConfig\(pool_inputs=False\)$"):
        to_pytorch_quantization(made())
    assert to_pytorch_quantization(made(pool_inputs=False))


def test_what_has_no_name_there_is_refused():
    qat.prepare(model := Net(), qat.QuantConfig(head=()))
    with pytest.raises(QATError, match="no site has a range"):
        to_pytorch_quantization(model)
    qat.calibrate(model, [batch()], progress=False)
    with pytest.raises(QATError, match=r"layer1\.0\.quant_add0\.a_quantizer, .*: pytorch-quantization has no name"):
        to_pytorch_quantization(model)
    with pytest.raises(QATError, match="'conv9' is no site"):
        to_pytorch_quantization(model, sites={"conv9": "x"})
    model.conv1.input_quantizer.set_state(State.OFF)
    with pytest.raises(QATError, match=r"conv1\.input_quantizer: has a range, but does not quantize"):
        to_pytorch_quantization(model)
    with pytest.raises(QATError, match="not prepared"):
        to_pytorch_quantization(Net())


@pytest.mark.parametrize("wrap", ["module.", "module.model.", "{model}", "{model_state_dict}", "file", "half"])
def test_state_dicts_come_wrapped(wrap, tmp_path):
    model = source()
    state = given = model.state_dict()
    if wrap.startswith("{"):
        given = {wrap.strip("{}"): state, "epoch": 3, "optimizer": {"state": {}}}
    elif wrap == "file":
        given = tmp_path / "x.pth"
        torch.save({"model": state, "epoch": 3}, given)
    elif wrap == "half":
        given = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        model.load_state_dict(given)
    else:
        given = {wrap + key: value for key, value in state.items()}
    load_pytorch_quantization(fresh := Net().eval(), given)
    assert torch.equal(fresh(batch(1)), model(batch(1)))


def test_modelopts_keys_are_read():
    state = source().state_dict()
    renamed = {key.replace("._input_q", ".input_q").replace("._weight_q", ".weight_q"): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    load_pytorch_quantization(ours := Net().eval(), renamed)
    load_pytorch_quantization(same := Net().eval(), state)
    assert torch.equal(ours(batch(1)), same(batch(1)))


def test_one_range_a_weight():
    """A calibration per tensor stores ``()``; that of a single channel ``()`` or ``(1, 1, 1, 1)``."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1), nn.ConvTranspose2d(1, 2, 2))
    state = layer_ranges(net, "0", "1", "2")
    state["0._weight_quantizer._amax"] = net[0].weight.detach().abs().max()
    state["2._weight_quantizer._amax"] = net[2].weight.detach().abs().max()
    model = copy.deepcopy(net)
    imported = load_pytorch_quantization(model, state)
    assert [model[i].weight_quantizer.amax.shape for i in range(3)] == [(), (1,), ()]
    back = to_pytorch_quantization(model)
    assert all(torch.equal(back[key], state[key]) for key in state)
    rules = tuple(rule for rule in imported.report.config.rules if rule.weight_granularity is None)
    qat.prepare(per_channel := copy.deepcopy(net), imported.report.config.replace(rules=rules))
    load_pytorch_quantization(per_channel, state)
    assert per_channel[0].weight_quantizer.amax.shape == (4,)
    x = batch()
    assert torch.equal(per_channel(x), model(x))


def test_a_model_that_is_one_layer():
    layer = nn.Linear(4, 3)
    state = dict(layer.state_dict())
    state["_input_quantizer._amax"], state["_weight_quantizer._amax"] = torch.tensor(4.0), torch.tensor(1.0)
    load_pytorch_quantization(layer, state)
    assert layer.weight_quantizer.axis is None
    assert set(to_pytorch_quantization(layer)) == set(state)


# What is not calibrated, switched off, or otherwise special


@pytest.mark.parametrize("what", ["missing", "nan"])
def test_uncalibrated_quantizers_are_warned_of(what):
    state = source().state_dict()
    if what == "nan":
        state["conv1._input_quantizer._amax"] = torch.tensor(float("nan"))
    else:
        del state["conv1._input_quantizer._amax"]
    with pytest.warns(UserWarning, match=r"^conv1\.input_quantizer: without a range"):
        imported = load_pytorch_quantization(model := Net(), state)
    assert imported.unset == ("conv1.input_quantizer",)
    assert "without a range: conv1.input_quantizer" in str(imported)
    with pytest.raises(QATError, match=r"conv1\.input_quantizer: no data seen"):
        qat.export_onnx(model, "x.onnx", batch())


def test_disabled_quantizers_that_carry_a_range_are_left_out_by_name():
    model = source()
    for name in ("_input_quantizer", "_weight_quantizer"):
        getattr(model.fc, name)._disabled = True
    model.layer1[0].residual_quantizer._disabled = True
    state = model.state_dict()
    assert "fc._input_quantizer._amax" in state
    disabled = ["fc._*", "layer1.0.residual_quantizer"]
    load_pytorch_quantization(fresh := Net().eval(), state, disabled=disabled)
    assert torch.equal(fresh(batch(1)), model(batch(1)))
    wanted = model(batch(1))
    from_pytorch_quantization(model)  # the live model tells itself
    assert torch.equal(model(batch(1)), wanted)
    with pytest.raises(QATError, match=r"disabled: 'fd\.\*' matches no quantizer"):
        load_pytorch_quantization(Net(), state, disabled=["fd.*"])
    with pytest.raises(QATError, match="pass a list of globs"):
        load_pytorch_quantization(Net(), state, disabled="fc")


def test_weights_alone_can_be_quantized():
    model = source()
    model.conv1._input_quantizer._disabled = True
    wanted = model(batch(1))
    with pytest.warns(UserWarning, match="without a range"):
        from_pytorch_quantization(model)
    assert torch.equal(model(batch(1)), wanted)


def test_dead_channels_give_zeros_as_there():
    model = source()
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.conv1._weight_quantizer._amax[2] = 0
    imported = load_pytorch_quantization(fresh := Net().eval(), model.state_dict())
    assert torch.equal(fresh(batch(1)), model(batch(1)))
    assert not any("raised" in note for note in imported.notes)


def test_ranges_below_the_smallest_scale_are_raised_and_told():
    model = source()
    model.conv1._weight_quantizer._amax[2] = 0  # the weight is not
    imported = load_pytorch_quantization(fresh := Net().eval(), model.state_dict())
    assert any("conv1._weight_quantizer: 1 range(s) below" in note for note in imported.notes)
    conv = fresh.conv1
    assert conv.weight_quantizer(conv.weight)[2].abs().max() <= 128 * SCALE_MIN


def test_scaled_ranges_are_scaled():
    model = source()
    model.conv1._input_quantizer._scale_amax = 0.5
    wanted = model(batch(1))
    from_pytorch_quantization(model)
    assert torch.equal(model(batch(1)), wanted)


def test_four_bit_weights_of_live_modules():
    torch.manual_seed(0)
    model = nn.Sequential(pq.QuantConv2d(3, 4, 3), pq.QuantConv2d(4, 4, 3))
    model[1]._weight_quantizer._num_bits = 4
    make_exact(pq.calibrate(model, batch()))
    model[1]._weight_quantizer._amax.copy_(torch.full((4, 1, 1, 1), 7 / 64))
    wanted = model(batch(1))
    from_pytorch_quantization(model)
    assert str(model[1].weight_quantizer.fmt) == "int4"
    assert torch.equal(model(batch(1)), wanted)


def test_learned_ranges():
    model = source()
    model.fc._input_quantizer = pq.TensorQuantizer(learn=(-1.0, 127 / 64))
    wanted = model(batch(1))
    state = model.state_dict()
    assert "fc._input_quantizer.clip.clip_value_max" in state
    imported = load_pytorch_quantization(fresh := Net().eval(), state)
    assert torch.equal(fresh(batch(1)), wanted)  # its input is never negative
    assert any("not below the lower one" in note for note in imported.notes)
    from_pytorch_quantization(model)
    assert torch.equal(model(batch(1)), wanted)
    state["fc._input_quantizer.clip.clip_value_min"].copy_(torch.tensor(-3.0))
    with pytest.raises(QATError, match=r"fc\._input_quantizer\.clip: clips to \[-3, 1\.98438\], inside of its grid"):
        load_pytorch_quantization(Net(), state)


# Refusals: the model is as it was


def setting(name, value, quantizer="conv1._input_quantizer"):
    def change(model):
        setattr(model.get_submodule(quantizer), name, value)

    return change


def reflecting(model):
    model.layer1[0].conv2.padding_mode = "reflect"


class Own(pq.QuantConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


# A class of somebody else's: the modules of the stand-in are in another top-level module.
def own_forward(model):
    model.conv1.__class__ = Own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("_unsigned", True), r"conv1\._input_quantizer: is unsigned"),
        (setting("_num_bits", 4), r"conv1\._input_quantizer: has num_bits=4"),
        (setting("_num_bits", (4, 3), "fc._weight_quantizer"), r"fc\._weight_quantizer: has num_bits=\(4, 3\)"),
        (setting("_narrow_range", True), r"conv1\._input_quantizer: narrow_range=True leaves out the lowest code"),
        (setting("_fake_quant", False), "returns codes"),
        (setting("_pre_quant_scale", torch.ones(3)), "SmoothQuant"),
        (
            setting("_amax", torch.ones(3)),
            r"conv1\._input_quantizer\._amax: has shape \(3,\); TensorRT",
        ),
        (setting("_amax", torch.tensor(-1.0)), "infinite or negative"),
        (
            setting("_amax", torch.ones(16), "fc._weight_quantizer"),
            r"fc\._weight_quantizer\._amax: has shape \(16,\)",
        ),
        (
            setting("_amax", torch.ones(1, 3, 1, 1), "conv1._weight_quantizer"),
            r"shape \(8, 3, 3, 3\) needs one range",
        ),
        (reflecting, r"layer1\.0\.conv2: has padding_mode='reflect'"),
        (own_forward, "Own: has a forward of its own"),
    ],
)
def test_settings_without_equal_are_refused(change, message):
    model = source()
    change(model)
    before, wanted = snapshot(model), [type(module) for module in model.modules()]
    with pytest.raises(QATError, match=message):
        from_pytorch_quantization(model)
    assert snapshot(model) == before
    assert [type(module) for module in model.modules()] == wanted


def test_narrow_range_is_no_matter_where_no_code_reaches_it():
    model = pq.calibrate(Net(True), batch())
    for module in model.modules():
        if isinstance(module, pq.TensorQuantizer):
            module._narrow_range = module._axis is not None
            if hasattr(module, "_amax"):
                module._amax.copy_(127 * 2 ** torch.ceil(torch.log2(module._amax / 127)))
    wanted = model(batch(1))
    from_pytorch_quantization(model)
    assert torch.equal(model(batch(1)), wanted)


def edit(**changes):
    def change(state):
        for key, value in changes.items():
            if value is None:
                del state[key.replace("__", ".")]
            else:
                state[key.replace("__", ".")] = value

    return change


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(conv1__weight=None), r"conv1\.weight is missing"),
        (edit(conv9__weight=torch.ones(1)), r"conv9\.weight is not in the model"),
        (edit(conv1__weight=torch.ones(1)), r"conv1\.weight: has shape \(1,\), the model's \(8, 3, 3, 3\)"),
        (edit(conv1__weight=[1.0]), r"conv1\.weight is a list, not a tensor"),
        (edit(conv9___input_quantizer___amax=torch.ones(())), "conv9._input_quantizer: the model has no module 'conv9'"),
        (edit(lstm___input_quantizers__0___amax=torch.ones(())), r"lstm\._input_quantizers\.0: stands alone"),
        (edit(layer1__1__other_quantizer___amax=torch.ones(())), r"layer1\.1\.residual_quantizer: stands alone"),
        (edit(conv1___input_quantizer___pre_quant_scale=torch.ones(3)), "SmoothQuant"),
        (edit(conv1___input_quantizer___amax=torch.tensor(float("inf"))), r"conv1\._input_quantizer\._amax: infinite"),
        (edit(conv1___input_quantizer___amax=torch.tensor([])), "no range: it must be a tensor"),
        (edit(conv1___input_quantizer___amax=torch.tensor(3)), "no range: it must be a tensor of floating-point"),
        (
            edit(conv1___weight_quantizer___amax=torch.ones(7, 1, 1, 1)),
            r"conv1\._weight_quantizer\._amax: has shape \(7",
        ),
        (edit(conv1___input_quantizer__clip__clip_value_max=torch.ones(())), "clip_value_min: missing"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change, message, prepared):
    state = dict(source().state_dict())
    model = Net()
    if prepared:
        load_pytorch_quantization(model, state)
    change(state)
    before, values = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(QATError, match=message):
        load_pytorch_quantization(model, state)
    assert snapshot(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert is_prepared(model) == prepared


def test_transposed_convolutions_have_one_range():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2))
    state = layer_ranges(net, "0", "1")
    for axis in (0, 1):
        state["1._weight_quantizer._amax"] = pq.weight_range(net[1].weight, axis)
        with pytest.raises(QATError, match=r"1\._weight_quantizer\._amax: has shape .* transposed convolution"):
            load_pytorch_quantization(copy.deepcopy(net), state)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "truncated", "code", "tensor", "float", "two"])
def test_files_that_hold_no_ranges_are_named(kind, tmp_path, capsys):
    path, state = tmp_path / "x.pth", source().state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    contents = {"text": b"no tensors", "empty": b"", "truncated": saved.getvalue()[:-300]}
    objects = {
        "code": {"model": state, "evil": Evil()},
        "tensor": torch.ones(3),
        "float": Net().state_dict(),
        "two": {"model": state, "ema": state},
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind != "missing":
        torch.save(objects[kind], path)
    with pytest.raises(QATError, match=r"x\.pth"):
        load_pytorch_quantization(Net(), path)
    assert "executed" not in capsys.readouterr().out


def test_models_of_another_kind_are_refused():
    with pytest.raises(QATError, match="holds no TensorQuantizer"):
        from_pytorch_quantization(Net())
    load_pytorch_quantization(model := Net(), source().state_dict())
    with pytest.raises(QATError, match="has sites already"):
        from_pytorch_quantization(model)
    with pytest.raises(QATError, match="holds no range"):
        load_pytorch_quantization(Net(), Net().state_dict())
    with pytest.raises(QATError, match="sites: 'x' is no quantizer"):
        load_pytorch_quantization(Net(), source().state_dict(), sites={"conv1.input_quantizer": "x"})


def test_the_result_prints():
    imported = load_pytorch_quantization(Net(), source().state_dict())
    assert isinstance(imported, Imported)
    assert str(imported).startswith(f"{SITES} ranges imported; {SITES} sites")
    assert "layer1.0.residual_quantizer: taken for layer1.0.quant_add0.b_quantizer" in str(imported)
