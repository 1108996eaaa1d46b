"""Products of a tensor and a gate computed from its own average: which get sites, and what they compute and export."""

import copy
import operator

import numpy as np
import onnx
import pytest
import torch
from ort import open_as_written
from prepare_nets import Net, conv, images, whats, why
from torch import nn
from torch.nn import functional as F

import qat
from qat.core.config import QuantConfig
from qat.errors import QATError
from qat.nn import QuantMul


class Squeeze(nn.Module):
    """Squeeze-and-excitation by a pooling module."""

    def __init__(self):
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), conv(), conv()

    def scale(self, x):
        return self.fc2(F.relu(self.fc1(self.average(x)))).sigmoid()

    def average(self, x):
        return self.pool(x)

    def forward(self, x):
        return self.scale(x) * x


class ByFunction(Squeeze):
    def average(self, x):
        return F.adaptive_avg_pool2d(x, 1)


class ByMean(Squeeze):
    def average(self, x):
        return x.mean((2, 3), keepdim=True)


class ByMeanFunction(Squeeze):
    def average(self, x):
        return torch.mean(x, dim=[-2, -1], keepdim=True)


class ByMethod(Squeeze):
    def forward(self, x):
        return x.mul(self.scale(x))


class ByTorch(Squeeze):
    def forward(self, x):
        return torch.mul(self.scale(x), x)


class ByOperator(Squeeze):
    def forward(self, x):
        return operator.mul(x, self.scale(x))


class InPlace(Squeeze):
    def forward(self, x):
        x *= self.scale(x)
        return x


class InPlaceByMethod(Squeeze):
    def forward(self, x):
        return x.mul_(self.scale(x))


class Broadcast(Squeeze):
    def forward(self, x):
        return x * self.scale(x).expand_as(x)


class Child(nn.Module):
    """The gate comes from a module that averages inside."""

    def __init__(self, inner):
        super().__init__()
        self.gate = inner

    def forward(self, x):
        return x * self.gate(x)


class Scale(Squeeze):
    def forward(self, x):
        return self.scale(x)


class ScaleByMean(ByMean):
    def forward(self, x):
        return self.scale(x)


def net(body):
    torch.manual_seed(0)
    return Net(nn.Sequential(conv(), nn.SiLU(), body, conv())).eval()


GATES = [
    *(Squeeze, ByFunction, ByMean, ByMeanFunction, ByMethod, ByTorch, ByOperator, InPlace, InPlaceByMethod, Broadcast),
    *(lambda: Child(Scale()), lambda: Child(ScaleByMean())),
]


@pytest.mark.parametrize("make", GATES, ids=lambda make: getattr(make, "__name__", "child"))
def test_tensor_and_gate_get_sites_and_the_average_shares_the_tensors(make):
    model = net(make())
    expected = model(images())
    report = qat.prepare(model)
    assert whats(report, "body.2.quant_mul0") == ["gate a", "gate b"]
    assert report.count("gate") == 1
    gate = {site.what: site.quantizer for site in report.sites if site.kind == "gate"}
    pools = [site.quantizer for site in report.sites if site.kind == "pool" and site.path.startswith("body")]
    assert len(pools) == 1
    assert list(gate.values()).count(pools[0]) == 1
    assert torch.equal(model(images()), expected)
    qat.calibrate(model, [images()], progress=False)
    assert not torch.equal(model(images()), expected)
    qat.restore(model)
    assert torch.equal(model(images()), expected)
    assert not any(isinstance(module, QuantMul) for module in model.modules())


class Twice(nn.Module):
    """Two branches of one tensor: no gate, for nothing is averaged."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        return self.a(x) * self.b(x).sigmoid()


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class OverChannels(Squeeze):
    def forward(self, x):
        return x * x.mean((1,), keepdim=True).sigmoid()


class OfAnother(Squeeze):
    """The average of another tensor."""

    def forward(self, x):
        return self.fc1(x) * self.fc2(self.pool(x)).sigmoid()


class Scaled(Squeeze):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        return self.gamma * x * 2


@pytest.mark.parametrize("make", [Twice, Swish, OverChannels, OfAnother, Scaled])
def test_other_products_stay_as_they_are(make):
    report = qat.prepare(net(make()))
    assert report.count("gate") == 0


def test_a_gate_on_the_input_of_the_model_stays_float():
    model = nn.Sequential(Squeeze(), conv(), nn.Flatten(), nn.Linear(256, 2))
    assert qat.prepare(model).count("gate") == 0


class ReadAgain(Squeeze):
    def forward(self, x):
        y = x
        y *= self.scale(x)
        return y + x


def test_a_gate_in_place_of_a_tensor_that_is_read_again_is_left_and_told():
    report = qat.prepare(net(ReadAgain()))
    assert report.count("gate") == 0
    assert "read again later" in why(report, "body.2")


@pytest.mark.parametrize(
    ("config", "gates", "pools"),
    [
        (QuantConfig(gate_inputs=False), 0, 1),
        (QuantConfig(pool_inputs=False), 1, 0),
        (QuantConfig(rules=[{"match": "body.2", "quantize": False}]), 0, 1),
        (QuantConfig(rules=[{"match": "body.2.quant_mul0", "quantize": False}]), 0, 2),
    ],
)
def test_settings(config, gates, pools):
    report = qat.prepare(net(ByMean()), config)
    assert (report.count("gate"), report.count("pool")) == (gates, pools)


def test_the_setting_is_checked():
    with pytest.raises(QATError, match="gate_inputs"):
        QuantConfig(gate_inputs="yes")


def test_copies_and_checkpoints(tmp_path):
    model = net(ByMean())
    qat.prepare(model)
    qat.calibrate(model, [images()], progress=False)
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    other = net(ByMean())
    qat.prepare(other)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("make", [Squeeze, ByMean, Broadcast])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_inputs_of_the_product_are_dequantized_in_the_file(make, precision, tmp_path):
    model = net(make())
    qat.prepare(model)
    qat.calibrate(model, [images()], progress=False)
    path = qat.export_onnx(model, tmp_path / "m.onnx", images()[:1], precision=precision)
    graph = onnx.load(path).graph
    producer = {name: node for node in graph.node for name in node.output}

    def behind(name):
        while producer[name].op_type in ("Cast", "Expand"):
            name = producer[name].input[0]
        return producer[name]

    # The last product is the gate's; the one before it belongs to the SiLU.
    product = [node for node in graph.node if node.op_type == "Mul"][-1]
    assert [behind(name).op_type for name in product.input] == ["DequantizeLinear"] * 2
    average = next(node for node in graph.node if node.op_type in ("GlobalAveragePool", "ReduceMean"))
    # One pair serves the product and the average.
    assert behind(average.input[0]).output[0] in {behind(name).output[0] for name in product.input}
    session = open_as_written(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images()).numpy(), atol=1e-5 if precision == "fp32" else 2e-2)
