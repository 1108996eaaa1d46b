"""Saving and loading quantized models without Lightning."""

import pytest
import torch
from lightning_nets import IMAGES, Lit, callback, fit, make_net
from torch import nn

import qat
from qat.core.quantizer import is_prepared, quantizers
from qat.training.checkpoints import load_quantized_state, quantized_state
from qat.training.ranges import freeze_ranges, ranges_are_frozen


def trained(**config):
    torch.manual_seed(0)
    model = make_net()
    qat.prepare(model, qat.QuantConfig(**config))
    qat.calibrate(model, [IMAGES], progress=False)
    return model


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def through_a_file(saved, path):
    torch.save(saved, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("config", [{}, {"learn_scales": True}, {"add_inputs": "none"}, {"weight_granularity": "tensor"}])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_float_model_becomes_the_one_that_was_saved(config, frozen, tmp_path):
    model = trained(**config)
    if frozen:
        freeze_ranges(model)
        with torch.no_grad():
            model[0].weight.mul_(1.5)  # a range that stays where it is shows
    other = make_net()
    load_quantized_state(other, through_a_file(quantized_state(model), tmp_path / "model.pt"))
    assert torch.equal(outputs(other), outputs(model))
    assert ranges_are_frozen(other) == ranges_are_frozen(model) == frozen
    assert [path for path, _ in quantizers(other)] == [path for path, _ in quantizers(model)]


def test_ranges_that_were_frozen_in_part_are_frozen_in_part():
    model = trained()
    freeze_ranges(model[0])
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    other = make_net()
    load_quantized_state(other, quantized_state(model))
    assert torch.equal(outputs(other), outputs(model))
    assert [getattr(site, "follow", None) for _, site in quantizers(other)] == [
        getattr(site, "follow", None) for _, site in quantizers(model)
    ]


@pytest.mark.parametrize("frozen", [True, False])
def test_states_that_say_frozen_or_not_are_read_too(frozen):
    """As they were written before they named the sites."""
    model = trained()
    if frozen:
        freeze_ranges(model)
    saved = quantized_state(model)
    saved["qat"]["frozen_ranges"] = frozen
    other = make_net()
    load_quantized_state(other, saved)
    assert ranges_are_frozen(other) == frozen
    saved["qat"]["frozen_ranges"] = "all"
    with pytest.raises(qat.QATError, match="frozen_ranges: 'all' in the checkpoint is no list"):
        load_quantized_state(make_net(), saved)


def test_a_model_that_is_prepared_already_only_loads():
    model, other = trained(), trained()
    with torch.no_grad():
        model[0].weight.add_(0.1)
    load_quantized_state(other, quantized_state(model))
    assert torch.equal(outputs(other), outputs(model))


def test_a_checkpoint_of_the_callback_is_such_a_state(tmp_path):
    lit = Lit()
    fit(lit, callback()).save_checkpoint(tmp_path / "end.ckpt")
    other = Lit()
    load_quantized_state(other, torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert torch.equal(outputs(other.model), outputs(lit.model))


def test_a_float_model_is_not_saved_as_quantized():
    with pytest.raises(qat.QATError, match="holds no quantizers"):
        quantized_state(make_net())


def smaller(saved):
    saved["state_dict"]["0.weight"] = saved["state_dict"]["0.weight"][:4]
    return saved


def with_value(saved, key, value):
    saved["state_dict"][key] = value
    return saved


def without(saved, key):
    del saved["state_dict"][key]
    return saved


REFUSED = {
    "no mapping": (lambda saved: [1], "holds no settings of quantization"),
    "weights alone": (lambda saved: saved["state_dict"], "holds no settings of quantization"),
    "another shape": (smaller, r"0\.weight is missing, unexpected or of another shape"),
    "a missing range": (lambda saved: without(saved, "0.input_quantizer.amax"), r"0\.input_quantizer\.amax is missing"),
    "a range that is not finite": (
        lambda saved: with_value(saved, "0.input_quantizer.amax", torch.tensor(float("nan"))),
        "finite",
    ),
    "a key that is no name": (lambda saved: with_value(saved, 3, torch.ones(1)), "3 is no entry"),
    "a value that is no tensor": (lambda saved: with_value(saved, "0.weight", "x"), r"0\.weight is missing"),
    "a sparse tensor": (lambda saved: with_value(saved, "0.bias", torch.zeros(8).to_sparse()), "does not fit the model"),
    "another module": (lambda saved: saved["qat"]["configs"].update(head={}) or saved, "holds sites of 'head'"),
    "an unknown setting": (lambda saved: saved["qat"]["configs"][""].update(bits=3) or saved, "bits"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_changes_nothing(change, message):
    other = make_net()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    saved = quantized_state(trained())
    with pytest.raises(qat.QATError, match=message):
        load_quantized_state(other, change(saved))
    assert not is_prepared(other)
    assert before.keys() == other.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_frozen_ranges_do_not_take_those_that_move():
    other = trained()
    freeze_ranges(other)
    with pytest.raises(qat.QATError, match=r"its ranges are frozen.*qat\.restore"):
        load_quantized_state(other, quantized_state(trained()))


def test_another_configuration_is_refused():
    other = trained(add_inputs="none")
    with pytest.raises(qat.QATError, match=r"the model: the checkpoint.*add_inputs \(checkpoint 'both', here 'none'\)"):
        load_quantized_state(other, quantized_state(trained()))
    assert isinstance(other, nn.Sequential)
