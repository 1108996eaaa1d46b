"""Distillation from the float model: the loss that is added, with and without Lightning."""

import copy

import pytest
import torch
from lightning_nets import Lit, callback, fit, loader, make_net, make_trainer
from prepare_nets import Net, images
from torch.nn import functional as F

import qat
from qat.core.quantizer import is_prepared
from qat.training.distillation import Distillation, float_copy, logits_divergence


def divergence(student, teacher):
    """By the definition, in float64."""
    p = teacher.double().softmax(1)
    return float((p * (p.log() - student.double().softmax(1).log())).sum(1).mean())


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 6, 6)])
def test_divergence_is_that_of_the_definition(shape):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    assert float(logits_divergence(a, b)) == pytest.approx(divergence(a, b), rel=1e-5)
    assert float(logits_divergence(a, a)) == 0
    assert logits_divergence(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("outputs", [(torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(2), torch.ones(2)), ({}, {})])
def test_what_is_no_logits_asks_for_a_loss(outputs):
    with pytest.raises(qat.QATError, match="pass a loss"):
        logits_divergence(*outputs)


def quantized():
    torch.manual_seed(0)
    model = Net()
    teacher = float_copy(model)
    qat.prepare(model)
    qat.calibrate(model, [images()], progress=False)
    return model, teacher


def test_float_copy_of_a_prepared_model_is_the_float_model():
    model, teacher = quantized()
    copied = float_copy(model)
    assert not is_prepared(copied)
    assert is_prepared(model)
    assert torch.equal(copied(images()), teacher(images()))
    assert not any(p.requires_grad for p in copied.parameters())


def test_calls_in_training_count_and_no_others():
    model, teacher = quantized()
    distillation = Distillation(model, teacher)
    with torch.no_grad():
        model.fc.weight.mul_(-20)
    model.train()
    first, second = model(images(1)), model(images(2))
    model.eval()(images(3))
    with torch.no_grad():
        model.train()(images(4))
    expected = [divergence(y.detach(), teacher(images(seed))) for y, seed in ((first, 1), (second, 2))]
    assert distillation.loss().item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    with pytest.raises(qat.QATError, match="was not called in training mode"):
        distillation.loss()
    distillation.remove()
    model(images())
    with pytest.raises(qat.QATError, match="was not called"):
        distillation.loss()


def test_a_plain_loop_without_labels_comes_closer_to_the_teacher():
    model, teacher = quantized()
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    distillation, optimizer = Distillation(model, teacher), torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        model(images(step % 4))
        loss = distillation.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-4:]) < sum(losses[:4]) / 4


def test_a_teacher_inside_the_model_is_refused():
    model, _ = quantized()
    with pytest.raises(qat.QATError, match="Pass a copy"):
        Distillation(model, model.body)


# With Lightning


def other_net():
    torch.manual_seed(5)
    return make_net()


class ByHand(Lit):
    """What the callback is to do, written into the training step."""

    def __init__(self, weight, teacher=None):
        super().__init__()
        self.weight = weight
        self.others = [teacher]

    def on_fit_start(self):
        self.others[0] = self.others[0] or float_copy(self.model)

    def training_step(self, batch, batch_idx):
        y = self(batch[0])
        with torch.no_grad():
            expected = self.others[0](batch[0])
        return F.cross_entropy(y, batch[1]) + self.weight * logits_divergence(y, expected)


def weights(module):
    return {name: value for name, value in module.state_dict().items() if name.startswith("model")}


@pytest.mark.parametrize("teacher", ["float", "model"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_the_callback_adds_what_a_training_step_would(teacher, options):
    given = None if teacher == "float" else other_net()
    found, expected = Lit(), ByHand(0.7, copy.deepcopy(given).eval() if given else None)
    fit(found, callback(distill_from=given or "float", distill_weight=0.7), **options)
    fit(expected, callback(), **options)
    plain = Lit()
    fit(plain, callback(), **options)
    differs = False
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=1e-6)
        differs |= not torch.allclose(weights(plain)[name], value, rtol=1e-3, atol=1e-5)
    assert differs, "distillation changed nothing, so this test shows nothing"


def test_the_teacher_is_no_part_of_the_module():
    lit = Lit()
    names = set(lit.state_dict())
    parameters = [id(p) for p in lit.parameters()]
    teacher = other_net()
    trainer = fit(lit, callback(distill_from=teacher))
    assert all(name.endswith("quantizer.amax") for name in set(lit.state_dict()) - names)
    assert [id(p) for p in lit.parameters()] == parameters
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    assert "distillation" in trainer.callback_metrics
    assert not lit.model._forward_hooks


def test_resuming_with_the_same_teacher_and_with_another(tmp_path):
    straight = Lit()

    def run(lit, epochs, ckpt_path=None):
        trainer = make_trainer(callback(distill_from="float"), epochs=epochs)
        trainer.fit(lit, loader(False), ckpt_path=ckpt_path)
        return trainer

    run(straight, 3)
    run(Lit(), 1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = Lit()
    run(resumed, 3, tmp_path / "one.ckpt")
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())
    with pytest.raises(qat.QATError, match="the teacher is not the one"):
        run(Lit(other_net()), 3, tmp_path / "one.ckpt")


def test_two_prepared_sub_models_need_a_target():
    lit = Lit()
    lit.second = make_net()
    with pytest.raises(qat.QATError, match=r"distill_from: 2 prepared sub-models \(model, second\): name one by target="):
        fit(lit, callback(distill_from="float", target=("model", "second")))


@pytest.mark.parametrize("value", ["teacher", 3])
def test_what_is_no_model_is_refused_at_once(value):
    with pytest.raises(qat.QATError, match="distill_from="):
        qat.QATCallback(distill_from=value)


def test_a_loss_of_ones_own():
    lit, seen = Lit(), []

    def loss(student, teacher):
        seen.append((student.shape, teacher.requires_grad))
        return (student - teacher).square().mean()

    fit(lit, callback(distill_from="float", distill_loss=loss))
    assert seen == [(torch.Size([8, 4]), False)] * 6


class InPlace(torch.nn.Module):
    """Normalizes its input in place."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.sub_(1).div_(2))


def test_the_teacher_sees_what_the_student_was_given():
    torch.manual_seed(0)
    model = InPlace().train()
    distillation = Distillation(model, float_copy(model))
    batch = torch.rand(8, 4)
    model(batch)
    batch.zero_()
    assert float(distillation.loss()) == 0
