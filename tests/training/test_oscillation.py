"""The penalty that keeps weights from oscillating between two codes."""

import itertools

import pytest
import torch
from lightning_nets import Lit, callback, fit
from prepare_nets import Net, images
from torch import nn

import qat
from qat.training.oscillation import ramp


def linear(weights, weight_range="frozen", granularity="tensor", fmt="int4"):
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    config = qat.QuantConfig(head=(), weight_format=fmt, weight_range=weight_range, weight_granularity=granularity)
    qat.prepare(model, config)
    qat.calibrate(model, [torch.eye(len(weights))], method="max", progress=False)
    return model


def test_penalty_is_the_squared_distance_to_the_codes_and_its_gradient_pulls_there():
    # Scale 0.5: codes 7, 0.6, -1.2 and, out of range, 9.
    model = linear([3.5, 0.3, -0.6, 3.5])
    with torch.no_grad():
        model[0].weight[0, 3] = 4.5
    penalty = qat.oscillation_penalty(model)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.2**2 + 0.1**2, rel=1e-5)
    torch.testing.assert_close(model[0].weight.grad, torch.tensor([[0.0, -0.4, -0.2, 0.0]]), rtol=1e-4, atol=1e-6)


def code_changes(factor):
    """A weight whose best value lies between two codes, trained by the straight-through gradient (section 2.2)."""
    model = linear([3.5, 0.3])
    x, wanted = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3]])
    codes = []
    for step in range(200):
        model.zero_grad()
        loss = (model(x) - wanted).square().sum() + factor * ramp(step / 100) * qat.oscillation_penalty(model)
        loss.backward()
        with torch.no_grad():
            model[0].weight -= 0.02 * model[0].weight.grad
        codes.append((model[0].weight[0, 1] / 0.5).round().item())
    return sum(a != b for a, b in itertools.pairwise(codes[100:]))


def test_penalty_ends_oscillations():
    assert code_changes(0.0) > 10
    assert code_changes(2.0) == 0


def test_every_quantized_weight_counts_once_and_the_head_not():
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Conv2d(4, 4, 1)))
    model.body.append(model.body[0])
    qat.prepare(model)
    qat.calibrate(model, [images()], progress=False)
    qat.oscillation_penalty(model).backward()
    assert model.fc.weight.grad is None
    shared = qat.oscillation_penalty(model).item()
    model.body[1] = nn.Identity()
    assert qat.oscillation_penalty(model).item() == pytest.approx(shared)


def test_learned_ranges_get_no_gradient_from_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    qat.prepare(model, qat.QuantConfig(head=(), learn_scales=True))
    qat.calibrate(model, [torch.randn(4, 4)], progress=False)
    qat.oscillation_penalty(model).backward()
    assert model[0].weight_quantizer.amax.grad is None
    assert model[0].weight.grad is not None


def test_attention_counts():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    qat.prepare(layer, qat.QuantConfig(head=()))
    qat.calibrate(layer, [torch.randn(2, 3, 8)], progress=False)
    qat.oscillation_penalty(layer).backward()
    assert layer.self_attn.in_proj_weight.grad.any()
    assert layer.self_attn.out_proj.weight.grad.any()


def test_a_float_model_is_refused():
    with pytest.raises(qat.QATError, match="no weight is quantized"):
        qat.oscillation_penalty(Net())


# With Lightning


class ByHand(Lit):
    """What the callback is to do, written into the training step."""

    def training_step(self, batch, batch_idx):
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        return super().training_step(batch, batch_idx) + 0.5 * ramp(progress) * qat.oscillation_penalty(self)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_the_callback_adds_what_a_training_step_would(options):
    found, expected, plain = Lit(), ByHand(), Lit()
    fit(found, callback(dampen_oscillations=0.5), **options)
    fit(expected, callback(), **options)
    trainer = fit(plain, callback(), **options)
    assert "oscillation_penalty" not in trainer.callback_metrics
    differs = False
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-6)
        differs |= not torch.equal(plain.state_dict()[name], value)
    assert differs, "the penalty changed nothing, so this test shows nothing"


def test_a_negative_factor_is_refused():
    with pytest.raises(qat.QATError, match="dampen_oscillations=-1"):
        qat.QATCallback(dampen_oscillations=-1)
