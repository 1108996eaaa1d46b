"""qat.calibrate on prepared models: what it sets, what it leaves alone, and how it fails."""

import copy
import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from calibrated_nets import images, quantized, ranges_of, same, small_model, states_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.calibration import METHODS, calibrate
from qat.calibration.observers import HistogramObserver
from qat.core.config import QuantConfig
from qat.core.quantizer import Quantizer, State, WeightQuantizer, quantizers
from qat.errors import QATError
from qat.nn.layers import is_quantizable


@pytest.fixture(params=["fresh", "calibrated"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = small_model().train()
    if request.param == "calibrated":
        calibrate(model, images(count=1), method="max", progress=False)
    return model


def site_inputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What each layer reads, from hooks on a float copy."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if is_quantizable(module):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten()))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(values) for name, values in seen.items()}


# What it sets


@pytest.mark.parametrize("learned", [False, True])
def test_max_is_the_largest_value_that_the_layer_read(learned: bool) -> None:
    model = small_model(learned=learned)
    read = site_inputs(copy.deepcopy(model), images())
    calibrate(model, images(), method="max", progress=False)
    for name, values in read.items():
        assert torch.equal(model.get_submodule(name).input_quantizer.amax.detach(), values.abs().max())


def test_weights_get_their_maximum_by_channel() -> None:
    model = small_model()
    calibrate(model, images(), progress=False)
    conv = model[0]
    np.testing.assert_array_equal(conv.weight_quantizer.amax.numpy(), np.abs(conv.weight.detach().numpy()).max(axis=(1, 2, 3)))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("learn_scales", [False, True])
def test_weights_by_least_squared_error(weight_format: str, granularity: str, learn_scales: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = 3.0  # far outside of the others
    settings = {"weight_format": weight_format, "weight_granularity": granularity, "learn_scales": learn_scales}
    qat.prepare(model, QuantConfig(**settings, weight_range="frozen", head=()))
    result = calibrate(model, images(), weight_method="mse", progress=False)
    assert "weights: by mse" in str(result)
    qmax = 127 if weight_format == "int8" else 7
    for layer in (model[0], model[3]):
        weight, amax = layer.weight.detach().double().numpy(), layer.weight_quantizer.amax.detach().double().numpy()
        rows = weight.reshape(len(weight), -1) if granularity == "channel" else weight.reshape(1, -1)
        for values, found in zip(rows, amax.reshape(-1), strict=True):
            largest = np.abs(values).max()

            def error(amax: float, values: np.ndarray = values) -> float:
                scale = amax / qmax
                return float(((np.clip(np.rint(values / scale), -qmax - 1, qmax) * scale - values) ** 2).sum())

            candidates = [largest * percent / 100 for percent in range(20, 101)]
            assert error(found) <= min(map(error, candidates)) * (1 + 1e-5)
            assert 0.19 * largest < found <= largest * (1 + 1e-6)


def test_weight_ranges_that_follow_the_weights_are_no_place_for_a_method() -> None:
    model = small_model()
    before, states = ranges_of(model), states_of(model)
    with pytest.raises(QATError, match=r"weight_method='mse': the range of 0\.weight_quantizer follows its weight.*frozen"):
        calibrate(model, images(), weight_method="mse", progress=False)
    assert same(ranges_of(model), before)
    assert states_of(model) == states


def test_every_site_quantizes_afterwards() -> None:
    model = small_model()
    calibrate(model, images(), progress=False)
    assert set(states_of(model)) == {State.QUANTIZING}
    assert all(site.observer is None for _, site in quantizers(model))


def test_learned_ranges_stay_parameters() -> None:
    model = small_model(learned=True)
    before = model[0].input_quantizer.amax
    calibrate(model, images(), progress=False)
    assert model[0].input_quantizer.amax is before
    assert before.requires_grad
    assert before.grad is None


def test_weight_range_is_of_the_weight_that_reaches_the_convolution() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean()) * 10
            return F.conv2d(x, weight, self.bias)

    model = quantized(nn.Sequential(Standardized(3, 4, 3)))
    calibrate(model, images(), progress=False)
    weight = model[0].weight.detach()
    expected = ((weight - weight.mean()) * 10).abs().amax(dim=(1, 2, 3))
    assert torch.equal(model[0].weight_quantizer.amax, expected)


def test_statistics_are_those_of_the_float_model() -> None:
    """Ranges that are there already, here absurd ones, do not distort what later layers show."""
    fresh, old = small_model(), small_model()
    for _, site in quantizers(old):
        site.set_range(torch.full_like(site.amax, 1e-3))
    calibrate(fresh, images(), progress=False)
    calibrate(old, images(), progress=False)
    assert same(ranges_of(fresh), ranges_of(old))


def test_order_of_batches_does_not_matter() -> None:
    a, b = small_model(), small_model()
    first = calibrate(a, images(), progress=False)
    second = calibrate(b, images()[::-1], progress=False)
    assert all(same(first.ranges(method), second.ranges(method)) for method in METHODS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    calibrate(model, [x], method="max", progress=False)
    amax = model[0].input_quantizer.amax
    assert amax.dtype == torch.float32
    assert amax == x.to(torch.float32).abs().max()


def test_shared_quantizer_counts_a_tensor_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = quantized(Branches())
    model.b.input_quantizer = model.a.input_quantizer
    result = calibrate(model, [torch.randn(4, 8), torch.randn(4, 8)], progress=False)
    assert list(result.histograms) == ["a.input_quantizer"]
    assert result.histograms["a.input_quantizer"].total == 2 * 4 * 8


def test_a_tensor_changed_in_place_is_counted_again() -> None:
    observer = HistogramObserver("site")
    x = torch.ones(3)
    observer.observe(x)
    observer.observe(x)
    x.mul_(2)
    observer.observe(x)
    assert observer.histogram.total == 6
    assert observer.histogram.amax == 2


def test_methods_compare_on_the_same_statistics() -> None:
    model = small_model()
    result = calibrate(model, images(), method="max", progress=False)
    by_entropy = result.ranges("entropy")
    other = small_model()
    calibrate(other, images(), method="entropy", progress=False)
    assert by_entropy == {path: ranges_of(other)[path] for path in by_entropy}
    assert model[0].input_quantizer.amax == result.ranges("max")["0.input_quantizer"]


def test_apply_sets_the_ranges_of_another_method() -> None:
    model = small_model()
    result = calibrate(model, images(), method="max", progress=False)
    result.apply("percentile", percentile=99.0)
    assert model[0].input_quantizer.amax == result.ranges("percentile", percentile=99.0)["0.input_quantizer"]
    assert result.ranges("percentile", percentile=99.0) != result.ranges("percentile", percentile=90.0)


def test_result_prints_every_site_with_its_range() -> None:
    text = str(calibrate(small_model(), images(), method="max", progress=False))
    assert "Activation ranges (max)" in text
    assert "0.input_quantizer" in text
    assert "6.input_quantizer" in text
    assert "0.0000%" in text  # nothing is clipped


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_prepared_models_of_torchvision(arch: str) -> None:
    model = torchvision.models.get_model(arch)
    qat.prepare(model)
    result = qat.calibrate(model, [torch.randn(2, 3, 64, 64)], progress=False)
    assert set(states_of(model)) == {State.QUANTIZING}
    # A quantizer that several layers share has one path.
    distinct = {site for module in model.modules() for site in module.children() if isinstance(site, Quantizer)}
    assert len(result.histograms) + len(result.weights) == len(distinct)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


# What it is fed


def test_tuples_lists_and_tensors_are_the_same() -> None:
    results = []
    for wrap in (lambda x: x, lambda x: (x, torch.zeros(4)), lambda x: [x], lambda x: [x, "label", None]):
        model = small_model()
        calibrate(model, [wrap(x) for x in images()], progress=False)
        results.append(ranges_of(model))
    assert all(same(other, results[0]) for other in results[1:])


def test_data_loader_with_targets() -> None:
    x = torch.cat(images())
    model, other = small_model(), small_model()
    calibrate(model, DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=5), progress=False)
    calibrate(other, [x], progress=False)
    assert ranges_of(model)["0.input_quantizer"] == ranges_of(other)["0.input_quantizer"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


@pytest.mark.parametrize("with_target", [False, True])
def test_mappings_become_the_keyword_arguments_that_forward_takes(with_target: bool) -> None:
    model = quantized(TwoInputs())
    batch = {"left": torch.full((2, 3), 2.0), "right": torch.full((2, 3), 5.0), "label": torch.full((2,), 9.0)}
    calibrate(model, [(batch, 0) if with_target else batch], method="max", progress=False)
    assert model.a.input_quantizer.amax == 2
    assert model.b.input_quantizer.amax == 5


def test_mappings_reach_a_forward_with_open_keywords() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, **batch: Tensor) -> Tensor:
            return self.layer(batch["image"])

    model = quantized(Open())
    calibrate(model, [{"image": torch.full((1, 3), 4.0)}], method="max", progress=False)
    assert model.layer.input_quantizer.amax == 4


def test_a_list_of_images_is_one_argument() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.layer(torch.stack(images))

    model = quantized(Detector())
    calibrate(model, [([torch.ones(3), torch.full((3,), 2.0)], ["target"])], method="max", progress=False)
    assert model.layer.input_quantizer.amax == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_function_runs_the_model(mode: Callable[[], Any]) -> None:
    model, other = small_model(), small_model()

    def run(module: nn.Module) -> None:
        assert module is model
        with mode():
            for x in images():
                module(x)

    result = calibrate(model, run, progress=False)
    calibrate(other, images(), progress=False)
    assert same(ranges_of(model), ranges_of(other))
    result.apply("entropy")  # what was collected in inference mode can be used outside of it


def test_data_that_end_before_the_batches_that_were_asked_for_are_reported() -> None:
    short, whole = quantized(small_model()), quantized(small_model())
    with pytest.warns(UserWarning, match="data: the loader ended after 2 of 5 batches"):
        calibrate(short, iter(images(count=2)), method="max", batches=5, progress=False)
    calibrate(whole, images(count=2), method="max", progress=False)
    assert same(ranges_of(short), ranges_of(whole))


def test_batches_limits_the_pass() -> None:
    fed = []

    def loader() -> Iterator[Tensor]:
        for x in images():
            fed.append(x)
            yield x

    calibrate(small_model(), loader(), batches=2, progress=False)
    assert len(fed) == 2


def test_compiled_model_is_calibrated_without_compiling() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = small_model()
    calibrate(torch.compile(model, backend=backend), images(), progress=False)
    assert set(states_of(model)) == {State.QUANTIZING}
    assert not compiled


# What it leaves alone


def test_parameters_buffers_and_gradients_stay() -> None:
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, images(), progress=False)
    for name, value in model.state_dict().items():
        assert name.endswith(".amax") or torch.equal(value, before[name])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)


def test_training_flags_stay_one_by_one() -> None:
    model = small_model()
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    calibrate(model, images(), progress=False)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_during_the_pass() -> None:
    a, b = small_model().train(), small_model().eval()
    calibrate(a, images(), progress=False)
    calibrate(b, images(), progress=False)
    assert ranges_of(a)["6.input_quantizer"] == ranges_of(b)["6.input_quantizer"]


def test_random_streams_stay() -> None:
    def draws() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)

    def run(model: nn.Module) -> None:
        draws()
        for (x,) in DataLoader(TensorDataset(torch.cat(images())), batch_size=4, shuffle=True):
            model(x)

    model = small_model()
    seed()
    expected = draws()
    seed()
    calibrate(model, run, progress=False)
    assert draws() == expected


# Memory


def test_activations_are_freed() -> None:
    model = small_model()
    outputs: list[weakref.ref[Tensor]] = []
    model[2].register_forward_hook(lambda *args: outputs.append(weakref.ref(args[2])))
    alive = []

    def loader() -> Iterator[Tensor]:
        for x in images(count=5):
            alive.append(sum(output() is not None for output in outputs))
            yield x

    calibrate(model, loader(), progress=False)
    assert alive == [0] * 5


def test_memory_stays_flat() -> None:
    model = small_model()
    held = []

    def loader() -> Iterator[Tensor]:
        for _ in range(8):
            gc.collect()
            held.append(sum(t.numel() for t in gc.get_objects() if type(t) is Tensor))
            yield torch.randn(8, 3, 16, 16)

    calibrate(model, loader(), progress=False)
    # The batch that was yielded last is alive from the second look on.
    assert len(set(held[1:])) == 1


# Failures: each leaves the model as it was


def assert_refused(model: nn.Module, data: Any, match: str, error: type[BaseException] = QATError, **kwargs: Any) -> None:
    """``calibrate`` raises, and neither ranges, states, observers nor training flags changed."""
    ranges, states = ranges_of(model), states_of(model)
    training = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        calibrate(model, data, progress=False, **kwargs)
    assert same(ranges, ranges_of(model))
    assert states_of(model) == states
    assert all(site.observer is None for _, site in quantizers(model))
    assert [module.training for module in model.modules()] == training


@pytest.mark.parametrize("data", [[], iter([]), DataLoader(TensorDataset(torch.empty(0, 3)))])
def test_empty_loader(model: nn.Module, data: Any) -> None:
    assert_refused(model, data, "data: the loader is empty")


def test_function_that_runs_nothing(model: nn.Module) -> None:
    assert_refused(model, lambda module: None, "no layer of the model was run")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_names_the_first_site(model: nn.Module, bad: float) -> None:
    x = images()[0]
    x[0, 0, 0, 0] = bad
    assert_refused(model, [images()[1], x], r"^0\.input_quantizer: NaN or Inf seen")


def test_non_finite_activation_names_the_site_that_sees_it(model: nn.Module) -> None:
    model[1].bias.data[0] = float("inf")
    assert_refused(model, images(), r"^6\.input_quantizer: NaN or Inf seen")


def test_non_finite_weight_names_the_site(model: nn.Module) -> None:
    model[6].weight.data[0, 0] = float("nan")
    assert_refused(model, images(), r"^6\.weight_quantizer: NaN or Inf seen")


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_weight_names_the_site_by_least_squared_error_too(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    qat.prepare(model, QuantConfig(weight_range="frozen"))
    model[0].weight.data[0, 0] = bad
    with pytest.raises(QATError, match=r"^0\.weight_quantizer: NaN or Inf seen"):
        calibrate(model, [torch.zeros(1, 3)], weight_method="mse", progress=False)


def test_sites_without_data_are_all_listed_with_the_remedy() -> None:
    model = quantized(TwoInputs())
    model.forward = lambda x: model.a(x)
    assert_refused(
        model, [torch.ones(2, 3)], r"b\.input_quantizer, b\.weight_quantizer: no data seen.*'match': 'b', 'quantize': False"
    )


def test_empty_tensors_are_no_data() -> None:
    model = quantized(nn.Sequential(nn.Linear(3, 3)))
    assert_refused(model, [torch.empty(0, 3)], r"0\.input_quantizer: no data seen")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_the_models_forward(model: nn.Module, error: type[BaseException]) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("from the hook")

    model[4].register_forward_hook(fail)
    assert_refused(model, images(), "from the hook", error)


def test_exception_in_the_loader(model: nn.Module) -> None:
    def loader() -> Iterator[Tensor]:
        yield images()[0]
        raise OSError("broken image")

    assert_refused(model, loader(), "broken image", OSError)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.ones(4, 3, 8, 8), "data: is a Tensor"),
        ({"x": torch.ones(4, 3, 8, 8)}, "data: is a dict"),
        (3, "data: is of type int"),
        ([np.ones((4, 3, 8, 8))], "a batch is of type ndarray"),
        ([()], "a batch is an empty list"),
        ([{"picture": torch.ones(4, 3, 8, 8)}], "a batch has the keys picture, but the model's forward takes input"),
    ],
)
def test_unusable_data(model: nn.Module, data: Any, match: str) -> None:
    assert_refused(model, data, match)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "kl"}, "method='kl': choose one of"),
        ({"percentile": 101}, "percentile=101"),
        ({"weight_method": "entropy"}, "weight_method='entropy': choose one of max, mse"),
        ({"batches": 0}, "batches=0"),
        ({"batches": 1.5}, "batches=1.5"),
    ],
)
def test_unusable_arguments(model: nn.Module, kwargs: dict[str, Any], match: str) -> None:
    assert_refused(model, images(), match, **kwargs)


def test_batches_do_not_limit_a_function(model: nn.Module) -> None:
    assert_refused(model, lambda module: module(images()[0]), "batches: a function", batches=2)


def test_unprepared_model() -> None:
    with pytest.raises(QATError, match=r"Run qat\.prepare\(model\) first"):
        calibrate(nn.Linear(2, 2), [torch.ones(1, 2)])


def test_meta_model() -> None:
    model = small_model().to("meta")
    with pytest.raises(QATError, match="meta device"):
        calibrate(model, images(), progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_dead_activation_gets_a_safe_scale_and_a_warning(method: str) -> None:
    model = quantized(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    with pytest.warns(UserWarning, match=r"1\.input_quantizer, 0\.weight_quantizer: only zeros were seen"):
        calibrate(model, [torch.ones(2, 3)], method=method, progress=False)
    assert model[1].input_quantizer.scale > 0
    assert torch.isfinite(model(torch.ones(2, 3))).all()


def test_one_dead_channel_is_no_reason_to_warn() -> None:
    model = quantized(nn.Sequential(nn.Linear(3, 3)))
    model[0].weight.data[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [torch.ones(2, 3)], progress=False)
    assert (model[0].weight_quantizer.scale > 0).all()


def test_progress_bar_counts_batches(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(small_model(), images(count=3))
    assert "3/3" in capsys.readouterr().out


def test_no_progress_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(small_model(), images(count=3), progress=False)
    assert capsys.readouterr() == ("", "")


# Several processes


def _worker(rank: int, folder: str) -> None:
    """One of two ranks: runs every scenario and saves what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = images()[rank::2]
    found: dict[str, Any] = {}

    model = small_model()
    result = calibrate(model, batches, progress=False)
    for method in METHODS:
        result.apply(method)
        found[method] = ranges_of(model)
    found["counts"] = [histogram.counts for histogram in result.histograms.values()]

    uneven = small_model()
    wrapped = nn.parallel.DistributedDataParallel(uneven)
    calibrate(wrapped, images()[: 1 if rank else 5], method="max", progress=False)
    found["uneven"] = ranges_of(uneven)

    partial = quantized(TwoInputs())
    partial.load_state_dict(quantized(TwoInputs()).state_dict())

    def one_side(module: nn.Module) -> None:
        side = (module.a, module.b)[rank]
        side(torch.full((2, 3), rank + 2.0))

    calibrate(partial, one_side, method="max", progress=False)
    found["partial"] = [ranges_of(partial)[f"{name}.input_quantizer"].item() for name in "ab"]
    found["partial weights"] = [bool(partial.get_submodule(name).weight_quantizer.amax.all()) for name in "ab"]

    scenarios: dict[str, Any] = {
        "empty": [] if rank else batches,
        "nan": [batches[0], batches[0] * float("nan")] if rank else batches,
        "unseen": lambda module: module[0](batches[0]),
    }
    for name, data in scenarios.items():
        failing = small_model()
        try:
            calibrate(failing, data, progress=False)
            found[name] = "no error"
        except QATError as error:
            found[name] = str(error)
        found[f"{name} states"] = {site.state for _, site in quantizers(failing)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_end_with_the_ranges_of_one_process(ranks: list[dict[str, Any]], method: str) -> None:
    model = small_model()
    calibrate(model, images(), method=method, progress=False)
    assert same(ranks[0][method], ranges_of(model))
    assert same(ranks[1][method], ranges_of(model))


def test_two_ranks_count_what_one_process_counts(ranks: list[dict[str, Any]]) -> None:
    result = calibrate(small_model(), images(), progress=False)
    for k, histogram in enumerate(result.histograms.values()):
        assert torch.equal(ranks[0]["counts"][k], histogram.counts)
        assert torch.equal(ranks[1]["counts"][k], histogram.counts)


def test_wrapped_model_with_uneven_loaders(ranks: list[dict[str, Any]]) -> None:
    assert same(ranks[0]["uneven"], ranks[1]["uneven"])
    assert ranks[0]["uneven"]["0.input_quantizer"] == max(x.abs().max() for x in images()[:5])


def test_a_site_may_see_data_on_one_rank_only(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["partial"] == [2.0, 3.0]
        assert rank["partial weights"] == [True, True]


@pytest.mark.parametrize(("name", "message"), [("empty", "the loader is empty"), ("nan", "0.input_quantizer: NaN or Inf seen")])
def test_failure_of_one_rank_ends_all(ranks: list[dict[str, Any]], name: str, message: str) -> None:
    assert message in ranks[1][name]
    assert "calibration failed on rank 1" in ranks[0][name]
    assert ranks[0][f"{name} states"] == ranks[1][f"{name} states"] == {State.OFF}


def test_a_site_that_no_rank_showed_data_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "6.input_quantizer, 6.weight_quantizer: no data seen" in rank["unseen"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_model_is_fed_from_the_cpu(method: str) -> None:
    model = small_model().cuda()
    result = calibrate(model, images(), method=method, progress=False)
    assert all(site.amax.is_cuda for _, site in quantizers(model))
    assert result.ranges("max")["0.input_quantizer"].item() == max(x.abs().max().item() for x in images())
    weights = [site for _, site in quantizers(model) if isinstance(site, WeightQuantizer)]
    assert all(bool((site.amax > 0).all()) for site in weights)
