"""What placement="fast" leaves in float, and what it keeps."""

import pytest
import torch
import torchvision
from prepare_nets import Block, Net, images, whats
from torch import nn

import qat
from qat.core.config import QuantConfig
from qat.errors import QATError
from qat.nn import Add

FAST = QuantConfig(placement="fast")


class PreNorm(nn.Module):
    """A layer behind a layer norm, and the sum with what came in."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class PostNorm(PreNorm):
    def forward(self, x):
        return self.norm(x + self.linear(x))


class Activated(PreNorm):
    """The sum goes through an activation to the next layer."""

    def __init__(self):
        super().__init__()
        self.activation = nn.GELU()

    def forward(self, x):
        return self.activation(x + self.linear(self.norm(x)))


class WithModule(PreNorm):
    def __init__(self):
        super().__init__()
        self.add = Add()

    def forward(self, x):
        return self.add(x, self.linear(self.norm(x)))


def chain(*blocks):
    return nn.Sequential(nn.Linear(8, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 3))


def reasons(report, what):
    return {item.path: item.why for item in report.left if item.what == what and "fast" in item.why}


def test_adds_between_layer_norms_stay_float():
    report = qat.prepare(chain(PreNorm(), PreNorm()), FAST)
    assert report.count("add") == 0
    assert set(reasons(report, "addition")) == {"1.quant_add0", "2.quant_add0"}
    assert "no quantized layer reads an operand or the sum" in reasons(report, "addition")["1.quant_add0"]


def test_add_modules_are_judged_likewise():
    report = qat.prepare(chain(WithModule(), PreNorm()), FAST)
    assert report.count("add") == 0
    assert set(reasons(report, "addition")) == {"1.add", "2.quant_add0"}


def test_add_whose_operand_a_layer_reads_is_kept():
    report = qat.prepare(chain(PostNorm()), FAST)
    assert whats(report, "1.quant_add0") == ["add a", "add b"]


@pytest.mark.parametrize("block", [Activated(), WithModule(), PreNorm()])
def test_add_whose_sum_a_layer_reads_is_kept(block):
    model = nn.Sequential(nn.Linear(8, 8), block, nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 3))
    assert qat.prepare(model, FAST).count("add") == 1


def test_batch_norm_does_not_part_a_sum_from_its_reader():
    model = nn.Sequential(nn.Linear(8, 8), PreNorm(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    assert qat.prepare(model, FAST).count("add") == 1


def test_head_in_float_is_no_reader():
    model = nn.Sequential(nn.Linear(8, 8), PreNorm(), nn.Linear(8, 3))
    assert qat.prepare(model, FAST).count("add") == 0


def test_pool_is_a_reader():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Block(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    assert qat.prepare(model, FAST).count("add") == 1
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Block(), nn.Flatten(), nn.Linear(4, 3))
    kept = qat.prepare(model, QuantConfig(placement="fast", pool_inputs=False)).count("add")
    assert kept == 1, "its operand is read by the block's convolution"


def test_residual_network_is_placed_as_before():
    everything, fast = Net(), Net()
    assert qat.prepare(everything, QuantConfig()).sites == qat.prepare(fast, FAST).sites


def test_patches():
    def model(conv):
        return nn.Sequential(conv, nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 3))

    report = qat.prepare(model(nn.Conv2d(3, 8, 4, 4)), FAST)
    assert set(reasons(report, "Conv2d")) == {"0"}
    for conv in (nn.Conv2d(3, 8, 4, 2), nn.Conv2d(8, 8, 4, 4), nn.Conv2d(3, 8, 1)):
        report = qat.prepare(model(conv), FAST)
        assert not reasons(report, "Conv2d")
        assert report.count("conv") == 1


def test_rules_override():
    rules = [{"match": "1.quant_add0", "quantize": True}, {"match": "0", "quantize": True}]
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), PreNorm(), PreNorm(), nn.LayerNorm(8), nn.Linear(8, 3))
    report = qat.prepare(model, QuantConfig(placement="fast", rules=rules))
    assert report.count("conv") == 1
    assert set(reasons(report, "addition")) == {"2.quant_add0"}


def test_untraceable_forward_keeps_its_adds():
    class Branching(PreNorm):
        def forward(self, x):
            if x.sum() > 0:
                x = x * 2
            return x + self.linear(self.norm(x))

    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert qat.prepare(chain(Branching()), FAST, example_inputs=x).count("add") == 1


@pytest.mark.parametrize(("name", "adds", "convs"), [("vit_b_16", 0, 0), ("convnext_tiny", 18, 21), ("swin_t", 0, 0)])
def test_models(name, adds, convs):
    model = torchvision.models.get_model(name, weights=None)
    report = qat.prepare(model.eval(), FAST)
    assert (report.count("add"), report.count("conv")) == (adds, convs)


def test_default_is_everything():
    assert QuantConfig().placement == "all"
    with pytest.raises(QATError, match="placement='best': choose one of all, fast"):
        QuantConfig(placement="best")


def test_prepared_model_runs_and_exports(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(9, 8), PreNorm(), nn.LayerNorm(8), nn.Linear(8, 3))
    x = images()
    report = qat.prepare(model.eval(), FAST, example_inputs=x)
    qat.calibrate(model, [x], progress=False)
    qat.export_onnx(model, tmp_path / "m.onnx", x)
    assert report.count("linear") == 2
