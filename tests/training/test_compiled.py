"""What compiled training keeps for the backward pass, and where clipping begins; without a GPU.

The memory of a compiled step is what its forward graph hands to its backward graph, which the partitioner decides before any
code is made for a device.
"""

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.compile_fx
import torch._inductor.lowering
import torchvision
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torchvision.models.resnet import BasicBlock, ResNet

import qat
from qat.core.numerics import INT4, INT8, _clipped_traced
from qat.core.quantizer import WeightQuantizer, quantizers

BATCH = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(model, x):
    """The forward and backward graphs of a training step in bfloat16, partitioned as for inductor."""
    found = {}

    def keep(name, module, inputs):
        found[name] = module.graph
        return make_boxed_func(module.forward)

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=functools.partial(keep, "forward"),
        bw_compiler=functools.partial(keep, "backward"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    compiled = torch.compile(model.train(), backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(x).float().logsumexp(1).sum()
    loss.backward()
    return found["forward"], found["backward"]


def activation_bytes(backward):
    values = [n.meta["val"] for n in backward.nodes if n.op == "placeholder"]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == BATCH)


def roundings(graph):
    """Tensors of a batch that a graph quantizes."""
    return sum("round" in str(n.target) and n.meta["val"].shape[0] == BATCH for n in graph.nodes if n.op == "call_function")


def network(name, x, prepared):
    torch.manual_seed(0)
    if name == "short":
        # A block with the identity as its shortcut, and one that downsamples.
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
        model.layer3 = model.layer4 = nn.Identity()
        model.fc = nn.Linear(128, 5)
    else:
        model = torchvision.models.get_model(name, num_classes=5)
    if prepared:
        qat.prepare(model, example_inputs=x)
        qat.calibrate(model, [x], method="max", progress=False)
    return model


@pytest.mark.parametrize(
    "name", ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "resnet50", "mobilenet_v2"))]
)
def test_a_compiled_step_keeps_what_the_float_one_keeps(name):
    x = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    base = activation_bytes(graphs(network(name, x, prepared=False), x)[1])
    torch._dynamo.reset()
    model = network(name, x, prepared=True)
    forward, backward = graphs(model, x)
    assert activation_bytes(backward) <= 1.1 * base
    sites = [site for _, site in quantizers(model) if not isinstance(site, WeightQuantizer)]
    assert roundings(forward) == len(sites), "a tensor with several readers is quantized once"
    assert roundings(backward) == sum(site.readers > 1 for site in sites)


def test_a_compiled_step_gives_the_eager_gradients():
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = network("short", x, prepared=True).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = step(x)
        found.append((y.detach(), *torch.autograd.grad(y.logsumexp(1).sum(), parameters)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_compile_options_are_ones_that_torch_has(mode):
    options = qat.compile_options(mode)
    assert {"realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold"} <= set(options)
    assert bool(options.get("max_autotune")) == (mode == "max-autotune")
    torch.compile(nn.Linear(2, 2), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_compile_options_change_no_result(learned):
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Sums in another order bring a value across a tie for two draws of twelve, and with it all that depends on its code.
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    qat.prepare(model, qat.QuantConfig(learn_scales=learned), example_inputs=x)
    qat.calibrate(model, [x], method="max", progress=False)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for step in (model, torch.compile(model, fullgraph=True, options=qat.compile_options())):
        y = step(x)
        found.append((y.detach(), *torch.autograd.grad(y.logsumexp(1).sum(), parameters)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def inside(x, scale, fmt):
    """Whether the correctly rounded float32 quotient rounds into the range."""
    code = np.rint(np.float32(x) / np.float32(scale))
    return fmt.qmin <= code <= fmt.qmax


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_clipping_begins_where_the_rounded_quotient_leaves_the_range(fmt):
    generator = np.random.default_rng(0)
    mantissas = np.concatenate([generator.integers(2**23, 2**24, 60), [2**23, 2**23 + 1, 2**24 - 1, 2**23 + 2**12 - 1]])
    wrong, near_ties = [], 0
    for mantissa, exponent in zip(mantissas, generator.integers(-46, -15, len(mantissas)), strict=True):
        scale = np.float32(np.ldexp(float(mantissa), int(exponent)))
        for tie in (fmt.qmax + 0.5, fmt.qmin - 0.5):
            nearest = np.float32(float(Fraction(float(scale)) * Fraction(tie)))
            steps = [nearest]
            for direction in (np.float32(np.inf), np.float32(-np.inf)):
                x = nearest
                for _ in range(4):
                    x = np.nextafter(x, direction)
                    steps.append(x)
            x = torch.tensor(np.array(steps))
            ones = torch.ones_like(x)
            found = _clipped_traced(ones, x, torch.tensor(scale), fmt)
            expected = [inside(value, scale, fmt) for value in steps]
            near_ties += len(set(expected)) == 2
            wrong += [(float(scale), v) for v, f, e in zip(steps, found.tolist(), expected, strict=True) if bool(f) != bool(e)]
    assert not wrong
    assert near_ties == 2 * len(mantissas), "each tie has values on both sides"


def test_what_is_no_number_is_clipped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30])
    found = _clipped_traced(torch.ones(7), x, torch.tensor(0.05), INT8)
    assert found.tolist() == [0, 0, 0, 1, 1, 0, 0]


def test_no_recompilation_by_site_or_range():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    qat.prepare(model)
    qat.calibrate(model, [x], method="max", progress=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x).sum().backward()
    for _, site in quantizers(model):
        site.set_range(site.amax * 2)
    compiled(x).sum().backward()
    assert counter.frame_count == 1
