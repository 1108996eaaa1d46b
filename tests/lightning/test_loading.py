"""Checkpoints of quantized LightningModules: loaded in a fresh process, whole, weights only, damaged, of another kind."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning_nets import IMAGES, Lit, callback, fit, loader, make_net, make_trainer
from lightning_package import callbacks as C
from lightning_package import part, pl
from torch import nn

import qat
from qat.core.quantizer import is_prepared


class Sized(pl.LightningModule):
    """With a hyper-parameter; its model is made in configure_model."""

    def __init__(self, width: int, late: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Identity()
        if not late:
            self.configure_model()

    def configure_model(self):
        if isinstance(self.model, nn.Identity):
            torch.manual_seed(0)
            width = self.hparams.width
            self.model = nn.Sequential(
                nn.Conv2d(3, width, 3),
                nn.ReLU(),
                nn.Conv2d(width, 4, 3),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 4),
            )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Chosen(Sized):
    """What a command line may choose instead, with an argument of its own."""

    def __init__(self, width: int, late: bool = False, temperature: float = 1.0):
        super().__init__(width, late)
        self.temperature = temperature


@pytest.fixture
def trained(tmp_path):
    module = Sized(6)
    trainer = make_trainer(callback({"add_inputs": "residual"}))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    return module.eval()


@pytest.mark.parametrize("late", [False, True])
def test_the_module_computes_what_the_saved_one_did(trained, late, tmp_path):
    loaded = qat.load_from_checkpoint(Sized, tmp_path / "whole.ckpt", late=late)
    assert type(loaded) is Sized
    assert loaded.hparams.width == 6
    assert torch.equal(loaded.eval()(IMAGES), trained(IMAGES))
    qat.export_onnx(loaded.model, tmp_path / "m.onnx", IMAGES[:1])


def test_in_a_fresh_process(tmp_path):
    lit = Lit()
    fit(lit, callback()).save_checkpoint(tmp_path / "qat.ckpt")
    torch.save(lit.eval()(IMAGES), tmp_path / "expected.pt")
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
        import torch, qat
        from lightning_nets import IMAGES, Lit
        loaded = qat.load_from_checkpoint(Lit, {str(tmp_path / "qat.ckpt")!r}).eval()
        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        assert torch.equal(loaded(IMAGES), expected)
        print("equal")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_weights_only_needs_the_settings_if_they_are_not_the_defaults(trained, tmp_path):
    loaded = qat.load_from_checkpoint(Sized, tmp_path / "weights.ckpt", config={"add_inputs": "residual"})
    assert torch.equal(loaded.eval()(IMAGES), trained(IMAGES))
    with pytest.raises(qat.QATError, match=r"weights\.ckpt: does not fit Sized\. It does not hold the settings.*pass config="):
        qat.load_from_checkpoint(Sized, tmp_path / "weights.ckpt", config={"weight_granularity": "tensor"})


def test_settings_that_a_checkpoint_does_not_hold_are_not_assumed_silently(trained, tmp_path):
    with pytest.warns(UserWarning, match=r"weights\.ckpt does not hold the settings of its sites: the defaults are assumed"):
        qat.load_from_checkpoint(Sized, tmp_path / "weights.ckpt")


def test_model_checkpoint_of_weights_only(tmp_path):
    lit = Lit()
    saver = C.ModelCheckpoint(tmp_path, "best", save_weights_only=True)
    fit(lit, callback(), saver, enable_checkpointing=True)
    assert torch.equal(qat.load_from_checkpoint(Lit, saver.best_model_path).eval()(IMAGES), lit.eval()(IMAGES))


def test_another_config_is_refused(trained, tmp_path):
    with pytest.raises(qat.QATError, match="holds its own settings"):
        qat.load_from_checkpoint(Sized, tmp_path / "whole.ckpt", config=qat.QuantConfig())


def test_float_weights_of_a_quantized_checkpoint(trained, tmp_path):
    loaded = qat.load_from_checkpoint(Sized, tmp_path / "whole.ckpt", quantized=False)
    assert not is_prepared(loaded)
    qat.restore(trained.model)
    assert torch.equal(loaded.eval()(IMAGES), trained(IMAGES))


def test_float_checkpoint_gives_the_float_model(tmp_path):
    lit = Lit()
    fit(lit).save_checkpoint(tmp_path / "float.ckpt")
    loaded = qat.load_from_checkpoint(Lit, tmp_path / "float.ckpt")
    assert not is_prepared(loaded)
    assert torch.equal(loaded.eval()(IMAGES), lit.eval()(IMAGES))


class Amax(nn.Module):
    """A module of the user's that has a parameter of the same name, next to others."""

    def __init__(self):
        super().__init__()
        self.amax, self.other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x.clamp(max=self.amax) * self.other


def test_a_parameter_of_the_users_called_amax_is_no_site(tmp_path):
    def make():
        return Lit(nn.Sequential(*make_net()[:2], Amax(), *make_net()[2:]))

    lit = make()
    fit(lit).save_checkpoint(tmp_path / "float.ckpt")
    fresh = make()
    make_trainer().test(fresh, loader(False), ckpt_path=tmp_path / "float.ckpt", verbose=False)
    with pytest.raises(qat.QATError, match="a checkpoint of the float model"):
        make_trainer(callback(), epochs=2).fit(make(), loader(), ckpt_path=tmp_path / "float.ckpt")


class Other(Lit):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 4)))


def test_another_module_is_refused_by_the_name_of_the_file(tmp_path):
    fit(Lit(), callback()).save_checkpoint(tmp_path / "qat.ckpt")
    with pytest.raises(qat.QATError, match=r"qat\.ckpt: does not fit Other"):
        qat.load_from_checkpoint(Other, tmp_path / "qat.ckpt")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a checkpoint."""
    path = tmp_path_factory.mktemp("good") / "x.ckpt"
    fit(Lit(), callback()).save_checkpoint(path)
    return path.read_bytes()


def damaged(content, kind):
    """A good checkpoint, changed."""
    weights = content.index(b"data/0") + 500
    return {
        "truncated": content[:-500],
        "half": content[: len(content) // 2],
        "changed": content[:weights] + bytes([content[weights] ^ 1]) + content[weights + 1 :],
        "text": b"no checkpoint",
        "empty": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "half", "changed", "text", "empty"])
@pytest.mark.parametrize("how", ["fit", "test", "load"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_loaded(how, kind, good, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged(good, kind))
    lit = Lit()
    before = {name: value.clone() for name, value in lit.state_dict().items()}
    trainer = make_trainer(callback(), epochs=2)
    calls = {
        "fit": lambda: trainer.fit(lit, loader(False), ckpt_path=path),
        "test": lambda: trainer.test(lit, loader(False), ckpt_path=path),
        "load": lambda: qat.load_from_checkpoint(Lit, path),
    }
    with pytest.raises(qat.QATError, match=r"x\.ckpt: damaged"):
        calls[how]()
    assert all(torch.equal(value, lit.state_dict()[name]) for name, value in before.items())


def test_checksums_are_not_compared_where_they_are_not_written(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        fit(Lit(), callback()).save_checkpoint(tmp_path / "x.ckpt")
        qat.load_from_checkpoint(Lit, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(qat.QATError, match=r"x\.ckpt: damaged: the checksum of"):
        qat.load_from_checkpoint(Lit, tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", ["missing", "tensor", "code"])
def test_what_is_no_checkpoint_is_named(kind, tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    if kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "code":
        torch.save({"state_dict": {}, "evil": Evil()}, path)
    with pytest.raises(qat.QATError, match=r"x\.ckpt"):
        qat.load_from_checkpoint(Lit, path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("subclasses", [False, True])
def test_a_checkpoint_of_lightning_cli(subclasses, late, tmp_path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    path = tmp_path / "cli.ckpt"
    chosen = [f"--model={Chosen.__module__}.Chosen"] if subclasses else []
    cli = part("cli").LightningCLI(
        Sized if subclasses else Chosen,
        subclass_mode_model=subclasses,
        args=[*chosen, "--model.width=6", f"--model.late={late}", "--model.temperature=2"],
        run=False,
        save_config_callback=None,
    )
    trained = cli.model
    trainer = make_trainer(callback({"learn_scales": True}))
    trainer.fit(trained, loader())
    trainer.save_checkpoint(path)
    loaded = qat.load_from_checkpoint(Chosen, path)
    assert type(loaded) is Chosen
    assert loaded.temperature == 2
    assert torch.equal(loaded.eval()(IMAGES), trained.eval()(IMAGES))
    # The class that is asked for, as Lightning does.
    base = qat.load_from_checkpoint(Sized, path)
    assert type(base) is Sized
    assert torch.equal(base.eval()(IMAGES), trained(IMAGES))
    with pytest.raises(qat.QATError, match="size mismatch"):
        qat.load_from_checkpoint(Chosen, path, width=5)
