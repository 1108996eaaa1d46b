"""What version 0.1 wrote is read by this one, and gives the codes that it gave there (tests/helpers/make_recorded.py)."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from ort import open_as_written
from recorded_nets import IMAGES, LABELS, SETTINGS, Lit, Net, is_weight, loader, quantized_codes, trainer

import qat
from qat.calibration import METHODS, Histogram, find_amax
from qat.checkpoints import load_quantized_state
from qat.quantizer import quantizers

FOLDER = Path(__file__).parents[1] / "recorded" / "v0.1"
# Processors add the products of a convolution in their own orders, so a value at a tie may get the next code. Outputs reach
# 0.4, and images that differ by 1e-3 move them by up to 1.5e-3. On the machine that wrote the files they were the same bits.
MOVED = 2e-3
# Likewise, of a weight in one epoch, which moves it by 3e-4 to 3e-2.
TRAINED = 1e-4


def read(name):
    return dict(np.load(FOLDER / f"{'default' if name == 'learned' else name}.npz"))


def saved(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES).numpy()


def check(model, expected):
    """Scales, and codes of weights and of recorded activations, are the same bits; outputs differ by little."""
    seen = {}
    hooks = [
        site.register_forward_pre_hook(lambda _, inputs, path=path: seen.setdefault(path, inputs[0].detach().clone()))
        for path, site in quantizers(model)
    ]
    assert np.abs(outputs(model) - expected["output"]).max() < MOVED
    for hook in hooks:
        hook.remove()
    assert {key.rpartition(":")[0] for key in expected if key != "output"} == {path for path, _ in quantizers(model)}
    for path, site in quantizers(model):
        codes, scale = quantized_codes(site, seen[path] if is_weight(path) else torch.from_numpy(expected[f"{path}:x"]))
        assert scale.numpy().tobytes() == expected[f"{path}:scale"].tobytes(), path
        assert np.array_equal(codes.numpy(), expected[f"{path}:codes"]), path


@pytest.mark.parametrize("name", SETTINGS)
def test_quantized_states(name):
    model = Net()
    load_quantized_state(model, saved(name), example_inputs=IMAGES[:2])
    check(model, read(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    assert qat.QuantConfig.from_yaml(FOLDER / f"{name}.yaml") == qat.QuantConfig(**SETTINGS[name])


@pytest.mark.parametrize("name", ["default", "learned", "tensor"])
def test_state_dicts_into_a_model_prepared_by_the_recorded_settings(name):
    model = Net()
    qat.prepare(model, qat.QuantConfig.from_yaml(FOLDER / f"{name}.yaml"), example_inputs=IMAGES[:2])
    model.load_state_dict(saved(name)["state_dict"])
    check(model, read(name))


def test_a_whole_pickled_model():
    model = torch.load(FOLDER / "model.pt", weights_only=False)
    check(model, read("default"))
    report = qat.preparation.prepared_report(model)
    fresh = qat.prepare(Net(), example_inputs=IMAGES[:2])
    assert [(site.path, site.kind) for site in report.sites] == [(site.path, site.kind) for site in fresh.sites]
    assert str(report) == str(fresh)
    qat.restore(model)
    assert not list(quantizers(model))


def test_pickled_settings_formats_and_histograms():
    with gzip.open(FOLDER / "objects.pickle.gz") as file:
        objects = pickle.load(file)
    assert objects["config"] == qat.QuantConfig(**SETTINGS["tensor"])
    assert objects["formats"] == [qat.INT8, qat.INT4]
    assert objects["labels"] == LABELS.tolist()
    histogram, expected = objects["histogram"], read("ranges")
    assert isinstance(histogram, Histogram)
    assert np.array_equal(histogram.counts.numpy(), expected["steps:counts"])
    histogram.add(torch.tensor([100.0]))
    assert (histogram.amax, histogram.total) == (100.0, expected["steps:counts"].sum() + 1)


@pytest.mark.parametrize("file", ["epoch.ckpt", "weights.ckpt"])
def test_checkpoints_of_the_callback(file):
    options = {} if file == "epoch.ckpt" else {"config": qat.QuantConfig()}
    check(qat.load_from_checkpoint(Lit, FOLDER / file, **options).model, read("epoch"))


def test_a_checkpoint_of_the_callback_is_resumed(tmp_path):
    lit = Lit()
    run = trainer(qat.QATCallback(calibration={"progress": False}), 2, tmp_path)
    run.fit(lit, loader(), ckpt_path=FOLDER / "epoch.ckpt")
    assert run.current_epoch == 2
    expected, found = read("resumed"), lit.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert np.allclose(found[key].numpy(), value, rtol=0, atol=TRAINED), key


def test_the_exported_file():
    """It runs, and holds the codes of the weights and the scales that the model of today has."""
    expected = read("default")
    session = open_as_written(FOLDER / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert np.abs(output - expected["output"]).max() < MOVED
    graph = onnx.load(FOLDER / "model.onnx").graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    quantized = [[constants.get(name) for name in node.input] for node in graph.node if node.op_type == "QuantizeLinear"]
    scales = {scale.tobytes() for _, scale, _ in quantized}
    weights = {tuple(codes_of_rows(weight, scale)) for weight, scale, _ in quantized if weight is not None}
    model = Net()
    load_quantized_state(model, saved("default"), example_inputs=IMAGES[:2])
    for path, site in quantizers(model):
        assert site.scale.detach().numpy().tobytes() in scales, path
        if is_weight(path):
            codes = expected[f"{path}:codes"]
            assert tuple(row.tobytes() for row in codes.reshape(len(codes), -1)) in weights, path


def codes_of_rows(weight, scale):
    """The codes of each output channel."""
    return [np.rint(row / step).astype(np.int8).tobytes() for row, step in zip(weight, scale, strict=True)]


def test_ranges_by_every_method():
    expected = read("ranges")
    for name in {key.partition(":")[0] for key in expected}:
        histogram = Histogram(name)
        histogram.counts = torch.from_numpy(expected[f"{name}:counts"].astype(np.int64))
        width, amax = expected[f"{name}:sizes"].tolist()
        histogram.cover(amax)
        assert histogram.width == width
        histogram.counts = torch.from_numpy(expected[f"{name}:counts"].astype(np.int64))
        for fmt in (qat.INT8, qat.INT4):
            found = [float(find_amax(histogram, method, fmt=fmt)) for method in METHODS]
            assert np.array(found, np.float32).tobytes() == expected[f"{name}:{fmt}"].tobytes(), (name, fmt)
