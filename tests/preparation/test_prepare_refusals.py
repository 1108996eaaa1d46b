"""Models and settings that prepare refuses, with the module and the remedy, and without a change."""

import warnings

import pytest
import torch
from prepare_nets import Attending, Block, Net, conv, decorate, snapshot, why
from torch import nn
from torch.nn.utils import prune

import qat
from qat.core.config import QuantConfig
from qat.errors import QATError

# Bad input.


def test_second_prepare_changes_nothing_and_says_so():
    model = Net()
    first = qat.prepare(model)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="prepared before: nothing was changed"):
        second = qat.prepare(model)
    assert snapshot(model) == before
    assert second.sites == first.sites
    assert "nothing was changed" in str(second)
    with pytest.warns(UserWarning, match="nothing was changed"):
        qat.prepare(model, QuantConfig())


def test_other_settings_on_a_prepared_model_are_refused():
    model = Net()
    qat.prepare(model)
    before = snapshot(model)
    with pytest.raises(QATError, match="prepared with other settings"):
        qat.prepare(model, QuantConfig(add_inputs="none"))
    assert snapshot(model) == before


def test_model_with_a_prepared_part_is_refused():
    part = Net()
    qat.prepare(part)
    with pytest.raises(QATError, match="part of this model is prepared already"):
        qat.prepare(nn.Sequential(part, nn.Linear(5, 2)))


def weight_norm_new():
    return nn.utils.parametrizations.weight_norm(conv())


def weight_norm_old():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv())


def pruned():
    layer = conv()
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def attention_with_normed_projection():
    module = Attending()
    nn.utils.parametrizations.weight_norm(module.attn.out_proj)
    return module


LAYERS = {
    "weight norm": (weight_norm_new, r"body: weight is parametrized; call .*remove_parametrizations"),
    "old weight norm": (weight_norm_old, "body: its weight is recomputed before each forward .*remove_weight_norm"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(conv()), "body: weight is parametrized"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(conv()), "body: its weight is recomputed"),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(conv()), "body: weight is parametrized"),
    "pruned": (pruned, "body: its weight is recomputed .*prune.remove"),
    "attention": (attention_with_normed_projection, "body.attn: its weight is recomputed"),
}


@pytest.mark.parametrize(("make", "message"), LAYERS.values(), ids=LAYERS)
def test_layer_with_a_computed_weight_is_refused(make, message):
    model = Net(make())
    before = snapshot(model)
    with pytest.raises(QATError, match=message):
        qat.prepare(model)
    assert snapshot(model) == before
    glob = message.partition(":")[0]
    report = qat.prepare(model, QuantConfig(rules=[{"match": glob, "quantize": False}]))
    assert why(report, glob) == "excluded by a rule"


def test_head_with_a_computed_weight_is_left_alone():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.fc)
    assert qat.prepare(model).head == ("fc",)


def compiled():
    return torch.compile(Net(), backend="eager")


def lazy():
    model = Net()
    model.fc = nn.LazyLinear(3)
    return model


def on_meta():
    with torch.device("meta"):
        return Net()


def partly_on_meta():
    return Net(conv().to("meta"))


WHOLE = {
    "not a module": (lambda: Net().forward, "model is a method, not a torch.nn.Module"),
    "nothing": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "Nothing to quantize: looked for Conv1d, Conv2d"),
    "only a head": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), r"Nothing to quantize(.|\n)*1: classifier head"),
    "data parallel": (lambda: nn.DataParallel(Net()), "the model is wrapped by DataParallel: prepare the model first"),
    "inner data parallel": (lambda: Net(nn.DataParallel(Block())), "body is wrapped by DataParallel"),
    "compiled": (compiled, r"the model is compiled: prepare the original \(model._orig_mod\)"),
    "inner compiled": (lambda: Net(torch.compile(Block(), backend="eager")), "body is compiled"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(conv(3), conv())), "the model is a TorchScript module"),
    "inner traced": (lambda: Net(torch.jit.trace(conv(), torch.zeros(1, 4, 2, 2))), "body is a TorchScript module"),
    "lazy": (lazy, "fc is a lazy LazyLinear without shapes yet: run one forward pass first"),
    "meta": (on_meta, "stem.weight is on the meta device and has no values: load the weights first"),
    "partly meta": (partly_on_meta, "body.weight is on the meta device"),
}


def classes(model: nn.Module) -> list:
    return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(("make", "message"), WHOLE.values(), ids=WHOLE)
def test_model_that_cannot_be_prepared_is_refused(make, message):
    model = make()
    is_module = isinstance(model, nn.Module)
    before = classes(model) if is_module else None
    with pytest.raises(QATError, match=message):
        qat.prepare(model)
    assert not is_module or classes(model) == before


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrappers_are_refused(one_process):
    model = nn.parallel.DistributedDataParallel(Net())
    with pytest.raises(QATError, match="the model is wrapped by DistributedDataParallel: prepare the model first, then wrap"):
        qat.prepare(model)
    assert type(model.module.stem) is nn.Conv2d


def test_sharded_model_is_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model.body, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(QATError, match="body is wrapped by FSDPBlock: prepare the model first, then wrap it"):
        qat.prepare(model)
    assert type(model.stem) is nn.Conv2d


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(head=("classifier",)), "head: 'classifier' matches no convolution, linear or attention layer"),
        (QuantConfig(head=("fc", "aux")), "head: 'aux' matches no"),
        (QuantConfig(head=("pool",)), "head: 'pool' matches no"),
        (QuantConfig(rules=[{"match": "layer9", "quantize": False}]), "rules: 'layer9' matches no layer, Add, gate or pooling"),
        (QuantConfig(rules=[{"match": "stem"}, {"match": "*.conv9"}]), r"rules: '\*.conv9' matches no layer"),
        (QuantConfig(rules=[{"match": "*", "quantize": False}]), r"Nothing to quantize(.|\n)*stem: excluded by a rule"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    model = decorate(Net()).train()
    before = snapshot(model)
    with pytest.raises(QATError, match=message):
        qat.prepare(model, config)
    assert snapshot(model) == before
    assert qat.prepare(model).count("conv") == 3
