"""The training loops of docs/lightning.md, run as they stand there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from lightning_nets import IMAGES, LABELS, make_net
from lightning_package import make_fabric, pl
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.core.quantizer import quantizers

HEADING = "## The same in Fabric, and in a loop of your own"
WAYS = ("lightning", "fabric", "plain")


@pytest.fixture(scope="module")
def blocks():
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text().split(HEADING)[1].split("\n## ")[0]
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


class Quiet:
    """Lightning with what a test run does not want to see or write, on a CPU."""

    LightningModule = pl.LightningModule
    precision = "32-true"

    def Trainer(self, **given):
        off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return pl.Trainer(accelerator="cpu", devices=1, precision=self.precision, **off, **given)

    def Fabric(self):
        return make_fabric(accelerator="cpu", devices=1, precision=self.precision)


def run(code, precision="32-true"):
    """Run a block; the model it trained."""
    torch.manual_seed(0)
    model = make_net().train()
    lightning = Quiet()
    lightning.precision = precision
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 8)
    exec(
        compile(code, "docs/lightning.md", "exec"),
        {"L": lightning, "qat": qat, "torch": torch, "F": F, "model": model, "loader": loader},
    )
    return model


def state(model):
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def trained(blocks):
    return {way: run(block) for way, block in zip(WAYS, blocks, strict=False)}


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_loops_train_the_same_weights(trained, way):
    expected, found = state(trained["lightning"]), state(trained[way])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_loops_train_a_quantized_model(trained, way):
    torch.manual_seed(0)
    start = make_net().state_dict()
    model = trained[way]
    assert len([1 for _ in quantizers(model)]) == 6
    assert all(site.state == "quantizing" for _, site in quantizers(model))
    moved = [
        name for name, value in start.items() if name.endswith("weight") and not torch.equal(model.state_dict()[name], value)
    ]
    assert {"0.weight", "2.conv.weight", "5.weight"} <= set(moved)


def test_fabric_and_lightning_have_the_same_ranges_in_mixed_precision(blocks):
    """The weights differ: Fabric computes the loss outside of autocast, on outputs that it made float32."""
    calibrating = "qat.calibrate(model, loader)"
    fabric = blocks[1].replace(calibrating, f"with fabric.autocast():\n    {calibrating}")
    expected, found = (state(run(code, "bf16-mixed")) for code in (blocks[0], fabric))
    ranges = [name for name in expected if name.endswith("input_quantizer.amax")]
    assert len(ranges) == 3
    assert all(torch.equal(expected[name], found[name]) for name in ranges)


def test_the_teacher_of_the_docs_counts(blocks):
    torch.manual_seed(0)
    model = make_net().train()
    names = {"qat": qat, "F": F, "model": model, "x": IMAGES, "y": LABELS}
    first, *rest = blocks[3].splitlines()
    exec(first, names)
    qat.prepare(model)
    qat.calibrate(model, [IMAGES], progress=False)
    exec("\n".join(rest), names)
    assert names["loss"] > F.cross_entropy(model(IMAGES), LABELS)
    names["loss"].backward()
