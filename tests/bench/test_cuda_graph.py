"""CUDA graphs of models: on the CPU with a stand-in for the capture, on a GPU for real."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qat.bench import capture, cuda_graph
from qat.bench.capture import CudaGraph
from qat.errors import QATError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(1, 1)

    def forward(self, x, scale=1.0):
        features = self.backbone(x)
        return {"out": self.head(features.mean((2, 3))) * scale, "features": [features]}


@pytest.fixture
def stand_in(monkeypatch):
    """A capture for the CPU: a replay computes on the static inputs and writes to the static outputs."""
    replays = []

    def record(module, run, name, device, warm_up):
        for _ in range(warm_up):
            run()
        outputs = run()

        def replay():
            replays.append(name)
            for static, new in zip(capture.pytree.tree_leaves(outputs), capture.pytree.tree_leaves(run()), strict=True):
                if isinstance(static, torch.Tensor):
                    static.copy_(new)

        return outputs, replay

    monkeypatch.setattr(capture, "_record", record)
    monkeypatch.setattr(capture, "_device", lambda name, module, leaves: torch.device("cpu"))
    return replays


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


# What the wrapper does around a capture


def test_new_inputs_are_read(stand_in, net):
    graph = cuda_graph(net, X)
    with torch.no_grad():
        assert torch.equal(graph(Y)["out"], net(Y)["out"])
        assert torch.equal(graph(Y)["features"][0], net(Y)["features"][0])


def test_outputs_survive_the_next_call(stand_in, net):
    graph = cuda_graph(net, X)
    first = graph(X)["out"]
    kept = first.clone()
    graph(Y)
    assert torch.equal(first, kept)


def test_static_outputs_are_the_same_memory(stand_in, net):
    graph = cuda_graph(net, X, clone_outputs=False)
    assert graph(X)["out"].data_ptr() == graph(Y)["out"].data_ptr()


def test_callers_example_is_not_written_to(stand_in, net):
    x = X.clone()
    cuda_graph(net, x)(Y)
    assert torch.equal(x, X)


def test_weights_changed_in_place_are_seen(stand_in, net):
    graph = cuda_graph(net, X)
    with torch.no_grad():
        net.head.bias.add_(1)
        assert torch.equal(graph(X)["out"], net(X)["out"])


def test_state_dict_has_the_models_names(stand_in, net):
    assert list(cuda_graph(net, X).state_dict()) == list(net.state_dict())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(1, 3, 8, 8),), r"captured for float32\[2, 3, 8, 8\] on cpu, called with float32\[1, 3, 8, 8\]"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.float64),), r"called with float64\[2, 3, 8, 8\]"),
        ((torch.zeros(2, 3, 8, 8, device="meta"),), r"\[2, 3, 8, 8\] on meta"),
        ((torch.zeros(2, 3, 8, 8), 2.0), "other arguments than at the capture"),
        ((3,), "called with 3"),
    ],
)
def test_changed_inputs_are_refused(stand_in, net, args, message):
    with pytest.raises(QATError, match=message):
        cuda_graph(net, X)(*args)


def test_changed_constants_are_refused(stand_in, net):
    graph = cuda_graph(net, (X, 2.0))
    with torch.no_grad():
        assert torch.equal(graph(Y, 2.0)["out"], net(Y, 2.0)["out"])
    with pytest.raises(QATError, match=r"captured for 2\.0, called with 3\.0"):
        graph(Y, 3.0)


def test_keyword_example_is_called_by_keyword(stand_in, net):
    graph = cuda_graph(net, {"x": X, "scale": 0.5})
    with torch.no_grad():
        assert torch.equal(graph(x=Y, scale=0.5)["out"], net(Y, 0.5)["out"])


def test_gradients_are_refused(stand_in, net):
    graph = cuda_graph(net, X)
    with pytest.raises(QATError, match="has no gradient"):
        graph(Y.clone().requires_grad_())


def test_training_mode_is_refused(net):
    with pytest.raises(QATError, match=r"training mode.*eval"):
        cuda_graph(net.train(), X)


def test_captured_model_cannot_be_trained_moved_or_copied(stand_in, net):
    graph = cuda_graph(net, X)
    with pytest.raises(QATError, match="can't be trained"):
        graph.train()
    with pytest.raises(QATError, match="can't be moved or cast"):
        graph.half()
    with pytest.raises(QATError, match="can't be copied or pickled"):
        copy.deepcopy(graph)
    with pytest.raises(QATError, match="can't be copied or pickled"):
        pickle.dumps(graph)
    assert net.head.weight.dtype == torch.float32


def test_weights_that_were_cast_are_noticed(stand_in, net):
    graph = cuda_graph(net, X)
    net.double()
    with pytest.raises(QATError, match="moved or cast since the capture"):
        graph(X)


def test_outputs_without_findable_tensors_are_refused(stand_in):
    class Opaque(nn.Module):
        def forward(self, x):
            return type("Result", (), {"x": x})()

    with pytest.raises(QATError, match="returns a Result"):
        cuda_graph(Opaque().eval(), X)


def test_missing_cuda_device_is_said(net):
    with pytest.raises(QATError, match=r"inputs on the cpu\. CUDA graphs need a CUDA device"):
        cuda_graph(net, X)


def test_example_without_tensor_is_refused(net):
    with pytest.raises(QATError, match="holds no tensor"):
        cuda_graph(net, 3)


def test_capture_needs_a_warm_up(net):
    with pytest.raises(QATError, match="warm_up=0"):
        cuda_graph(net, X, warm_up=0)


def test_innermost_module_is_located(net):
    with capture._locate(net, "model") as where:
        net(X)
        assert where == ["model (Net)"]
        with pytest.raises(RuntimeError):
            net(torch.zeros(2, 4, 8, 8))
        assert where[-1] == "backbone.0 (Conv2d)"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# Submodules of a model whose remainder is dynamic


def test_named_submodules_are_replayed_and_the_rest_runs(stand_in, net):
    fast = cuda_graph(net, X, submodules=["backbone"])
    stand_in.clear()
    with torch.no_grad():
        out = fast(Y, scale=3.0)
        assert torch.equal(out["out"], net(Y, scale=3.0)["out"])
    assert stand_in == ["backbone"]


def test_model_is_not_changed_by_capturing_submodules(stand_in, net):
    before = dict(net.named_modules())
    fast = cuda_graph(net, X, submodules=["backbone.0", "head"])
    assert dict(net.named_modules()) == before
    assert isinstance(fast, Net)
    assert isinstance(fast.backbone[0], CudaGraph)
    assert fast.backbone[1] is net.backbone[1]
    assert fast.head.weight is net.head.weight


def test_hooks_of_the_copy_are_its_own(stand_in, net):
    fast = cuda_graph(net, X, submodules=["head"])
    fast.register_forward_hook(lambda *_: None)
    assert not net._forward_hooks


def test_surrounding_model_reads_attributes_of_its_part(stand_in, net):
    assert cuda_graph(net, X, submodules=["head"]).head.out_features == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["back"], r"no submodule 'back'. Its children are backbone, head, unused"),
        ([""], "no submodule ''"),
        ([], "submodules is empty"),
        ("backbone", r"pass a list of paths, such as \['backbone'\]"),
        (["backbone", "backbone.0"], "'backbone.0' lies inside 'backbone'"),
        (["unused"], "unused: the model does not call it"),
    ],
)
def test_wrong_submodules_are_refused(stand_in, net, names, message):
    with pytest.raises(QATError, match=message):
        cuda_graph(net, X, submodules=names)


class Twice(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.part, self.second = nn.Conv2d(3, 3, 1), second

    def forward(self, x):
        return self.part(x).sum() + self.part(x[: self.second]).sum()


def test_submodule_called_twice_with_one_shape_is_captured_once(stand_in):
    model = Twice(2).eval()
    fast = cuda_graph(model, X, submodules=["part"])
    with torch.no_grad():
        assert torch.equal(fast(Y), model(Y))


def test_submodule_called_with_two_shapes_is_refused(stand_in):
    with pytest.raises(QATError, match="part: the model calls it with 2 different shapes"):
        cuda_graph(Twice(1).eval(), X, submodules=["part"])


def test_submodule_reached_by_another_way_is_refused(stand_in):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(8, 8)
            self.steps = [self.part]

        def forward(self, x):
            return self.steps[0](x)

    with pytest.raises(QATError, match="does not call it by this path"):
        cuda_graph(Hidden().eval(), X, submodules=["part"])


# For real

pytestmark_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(test):
    for mark in pytestmark_gpu:
        test = mark(test)
    return test


def assert_cuda_is_usable():
    """What a broken capture leaves behind would show in these: random numbers, memory, another capture."""
    assert torch.randn(1000, device="cuda").std().item() > 0.5
    torch.cuda.empty_cache()
    torch.empty(1 << 26, device="cuda").zero_()
    torch.cuda.synchronize()
    assert torch.cuda.get_sync_debug_mode() == 0
    graph = cuda_graph(nn.ReLU().eval(), torch.zeros(4, device="cuda"))
    assert graph(torch.tensor([-1.0, 1, -2, 2], device="cuda")).tolist() == [0, 1, 0, 2]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replay_equals_eager_bitwise(net, dtype):
    model, x, y = net.to("cuda", dtype), X.to("cuda", dtype), Y.to("cuda", dtype)
    graph = cuda_graph(model, x)
    with torch.no_grad():
        for value in (y, x):
            assert torch.equal(graph(value)["out"], model(value)["out"])


@on_gpu
def test_replay_of_a_resnet_equals_eager_bitwise():
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    model = torchvision.models.resnet18(weights=None).eval().cuda()
    x, y = torch.randn(4, 3, 96, 96, device="cuda"), torch.randn(4, 3, 96, 96, device="cuda")
    with torch.no_grad():
        assert torch.equal(cuda_graph(model, x)(y), model(y))


@on_gpu
def test_changed_shape_raises_and_the_graph_still_works(net):
    graph = cuda_graph(net.cuda(), X.cuda())
    with pytest.raises(QATError, match="Capture again"):
        graph(torch.zeros(1, 3, 8, 8, device="cuda"))
    with pytest.raises(QATError, match="on cpu"):
        graph(Y)
    with torch.no_grad():
        assert torch.equal(graph(Y.cuda())["out"], net(Y.cuda())["out"])


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


class Selects(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Uploads(nn.Module):
    def forward(self, x):
        return x + torch.arange(x.shape[-1], dtype=torch.float32).to(x.device)


class Downloads(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.cpu().numpy() * 2).to(x.device)


class Waits(nn.Module):
    def forward(self, x):
        torch.cuda.synchronize()
        return x * 2


@on_gpu
@pytest.mark.parametrize("part", [Branches, Selects, Uploads, Downloads, Waits])
def test_cpu_work_inside_is_named_and_leaves_cuda_usable(part):
    model = nn.Sequential(nn.ReLU(), part()).eval().cuda()
    with pytest.raises(QATError, match=rf"^1 \({part.__name__}\): works on the CPU or waits for the GPU"):
        cuda_graph(model, X.cuda())
    assert_cuda_is_usable()


@on_gpu
def test_dropout_that_stays_on_draws_anew(net):
    class Noise(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    graph = cuda_graph(Noise().eval(), torch.ones(10_000, device="cuda"))
    x = torch.ones(10_000, device="cuda")
    assert not torch.equal(graph(x), graph(x))


@on_gpu
def test_autocast_survives_its_end(net):
    model, x, y = net.cuda(), X.cuda(), Y.cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        expected = model(y)["out"]
        graph = cuda_graph(model, x)
    # The memory of autocast's copies of the weights is written over if it was freed.
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(graph(y)["out"], expected)
    del junk


@on_gpu
def test_weights_and_inputs_on_two_devices_are_named(net):
    with pytest.raises(QATError, match="weights on the cpu"):
        cuda_graph(net, X.cuda())


@on_gpu
def test_submodules_of_a_dynamic_model_on_a_gpu():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
            self.head = Selects()

        def forward(self, x):
            return self.head(self.backbone(x))

    torch.manual_seed(0)
    model = Dynamic().eval().cuda()
    fast = cuda_graph(model, X.cuda(), submodules=["backbone"])
    with torch.no_grad():
        assert torch.equal(fast(Y.cuda()), model(Y.cuda()))


@on_gpu
def test_memory_of_a_graph_is_given_back(net):
    model, x = net.cuda(), torch.randn(64, 3, 224, 224, device="cuda")
    cuda_graph(model, x)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = cuda_graph(model, x)
    assert torch.cuda.memory_reserved() > before
    del graph
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
