"""Write what a version of qat saves, for later versions to load: ``python tests/helpers/make_recorded.py FOLDER``.

``tests/recorded/v0.1`` was made by the commit before modules moved into rooms, with the version of before on PYTHONPATH and
``OMP_NUM_THREADS=1``. Only names that users know are used, so that the script runs with any version. It is not run again for
a version that is out: what that wrote is what users have.
"""

import gzip
import pickle
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from recorded_nets import IMAGES, LABELS, SETTINGS, Lit, Net, is_weight, loader, quantized_codes, trainer

import qat
from qat.calibration import METHODS, Histogram, find_amax
from qat.checkpoints import quantized_state
from qat.inputs import call
from qat.quantizer import quantizers
from qat.ranges import freeze_ranges


def calibrated(name):
    """A net of :data:`SETTINGS` with ranges."""
    torch.manual_seed(1)
    model = Net()
    qat.prepare(model, qat.QuantConfig(**SETTINGS[name]), example_inputs=IMAGES[:2])
    qat.calibrate(model, [IMAGES], progress=False, **({"weight_method": "mse"} if name == "tensor" else {}))
    if name == "frozen":
        freeze_ranges(model)
        with torch.no_grad():
            model.stem.weight.mul_(1.25)  # a range that stays where it is shows
    return model.eval()


def expected(model):
    """The result on IMAGES, and of each site its scale and codes: of all of a weight, or of what begins a tensor, and that."""
    seen = {}
    hooks = [
        site.register_forward_pre_hook(lambda _, inputs, path=path: seen.setdefault(path, inputs[0].detach().clone()))
        for path, site in quantizers(model)
    ]
    with torch.no_grad():
        output = model(IMAGES)
    for hook in hooks:
        hook.remove()
    found = {"output": output.numpy()}
    for path, site in quantizers(model):
        x = seen[path]
        if not is_weight(path):
            x = x.flatten()[:160]
            found[f"{path}:x"] = x.numpy()
        codes, scale = quantized_codes(site, x)
        found |= {f"{path}:codes": codes.numpy(), f"{path}:scale": scale.numpy()}
    return found


def histograms():
    """Tensors of eight kinds."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(20_000)
    return {
        "normal": normal,
        "relu": normal.clip(0, None),
        "laplace": draw.laplace(size=20_000),
        "heavy": draw.standard_t(2.5, 20_000),
        "lognormal": draw.lognormal(0, 1, 20_000),
        "background": np.concatenate([np.full(50_000, 0.1), draw.random(1_000)]),
        "gate": 1 / (1 + np.exp(-normal)),
        "steps": draw.integers(0, 30, 5_000) / 8,
    }


def write_ranges(path):
    """Counts of several tensors, and the range that each method found."""
    found = {}
    for name, values in histograms().items():
        histogram = Histogram(name)
        histogram.add(torch.from_numpy(values.astype(np.float32)))
        found[f"{name}:counts"] = histogram.counts.numpy().astype(np.uint16)
        found[f"{name}:sizes"] = np.array([histogram.width, histogram.amax])
        for fmt in (qat.INT8, qat.INT4):
            found[f"{name}:{fmt}"] = np.array([float(find_amax(histogram, method, fmt=fmt)) for method in METHODS], np.float32)
    np.savez_compressed(path, **found)
    return histogram


def write_training(folder):
    """Checkpoints of the callback after one epoch, and the weights after a second one that was resumed."""
    pl.seed_everything(3, verbose=False)
    lit = Lit()
    run = trainer(qat.QATCallback(calibration={"progress": False}), 1, folder)
    run.fit(lit, loader())
    run.save_checkpoint(folder / "epoch.ckpt")
    run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    np.savez_compressed(folder / "epoch.npz", **expected(lit.model.eval()))
    again = Lit()
    trainer(qat.QATCallback(calibration={"progress": False}), 2, folder).fit(again, loader(), ckpt_path=folder / "epoch.ckpt")
    np.savez_compressed(folder / "resumed.npz", **{key: value.numpy() for key, value in again.state_dict().items()})


def main(folder):
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in SETTINGS.items():
        model = calibrated(name)
        torch.save(quantized_state(model), folder / f"{name}.pt")
        if name != "learned":  # as calibrated, like the default
            np.savez_compressed(folder / f"{name}.npz", **expected(model))
        qat.QuantConfig(**settings).to_yaml(folder / f"{name}.yaml")
    model = calibrated("default")
    call(model, IMAGES[:1])
    torch.save(model, folder / "model.pt")
    qat.export_onnx(model, folder / "model.onnx", IMAGES)
    write_training(folder)
    objects = {
        "histogram": write_ranges(folder / "ranges.npz"),
        "config": qat.QuantConfig(**SETTINGS["tensor"]),
        "formats": [qat.INT8, qat.INT4],
        "labels": LABELS.tolist(),
    }
    with gzip.GzipFile(folder / "objects.pickle.gz", "wb", mtime=0) as file:
        pickle.dump(objects, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
