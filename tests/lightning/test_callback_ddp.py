"""QATCallback in several processes (DDP with gloo): the same ranges everywhere, and those of one process on the same data."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def start(folder, processes, settings):
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "ddp_run.py"), str(folder), str(processes), settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ranges at the start of training and states at its end, one of each process."""

    @functools.cache
    def run(processes, settings):
        folder = tmp_path_factory.mktemp("ddp")
        done = start(folder, processes, settings)
        assert done.returncode == 0, done.stderr[-3000:]
        return [
            [torch.load(folder / f"{kind}-{rank}.pt", map_location="cpu", weights_only=True) for rank in range(processes)]
            for kind in ("ranges", "state")
        ]

    return lambda processes, **settings: run(processes, json.dumps(settings))


def equal(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    ["max", "entropy", pytest.param("percentile", marks=pytest.mark.slow), pytest.param("mse", marks=pytest.mark.slow)],
)
def test_ranges_are_those_of_one_process_on_all_the_data(run, method, processes):
    (alone,), _ = run(1, method=method)
    found, states = run(processes, method=method)
    assert all(equal(ranges, alone) for ranges in found)
    assert all(ranges > 0 for ranges in (value.min() for value in alone.values()))
    moving = {"model.2.bn.running_mean", "model.2.bn.running_var"}  # torch's own, of each process until the next forward
    for state in states[1:]:
        assert [name for name in state if not torch.equal(state[name], states[0][name])] == [
            name for name in state if name in moving
        ]


def test_learned_ranges_and_layers_that_no_loss_reaches(run):
    _, states = run(2, method="max", learn_scales=True, unused=True, frozen=True)
    assert equal(states[0], states[1])
    (start, _), _ = run(2, method="max", learn_scales=True, unused=True, frozen=True)
    moved = [path for path, amax in start.items() if not torch.equal(states[0][f"{path}.amax"], amax)]
    assert moved
    assert not any("0.runs" in path for path in moved)


def test_a_process_that_cannot_look_at_its_batch_keeps_no_other_waiting(run):
    """For clip rates the module runs on the last batch of each process, and all log the same values."""
    _, states = run(2, method="max", fails=True)
    _, expected = run(2, method="max")
    assert all(equal(state, other) for state, other in zip(states, expected, strict=True))


gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        pytest.param(method, precision, marks=gpus)
        for method, precision in (
            *((method, "32-true") for method in ("max", "entropy", "percentile", "mse")),
            *(("max", precision) for precision in ("16-mixed", "bf16-mixed")),
        )
    ],
)
def test_ranges_are_equal_on_two_gpus(run, method, precision):
    """And near those of one GPU: with batches of another size, cuDNN adds up in another order."""
    options = {"method": method, "accelerator": "gpu", "precision": precision}
    (alone,), _ = run(1, **options)
    found, states = run(2, **options)
    assert equal(found[0], found[1])
    assert all(bool((value > 0).all()) for value in found[0].values())
    # A step of half precision in the values that a range is made of, or of its histogram's 2048 bins.
    tolerance = 1e-3 if precision == "32-true" else 1e-2
    for path, value in alone.items():
        torch.testing.assert_close(found[0][path], value, rtol=tolerance, atol=0)
    assert equal(*({k: v for k, v in state.items() if "running" not in k} for state in states))


@pytest.mark.parametrize("learned", [pytest.param(value, marks=gpus) for value in (False, True)])
def test_synchronised_batch_norm_on_two_gpus_has_the_statistics_of_all_the_data(run, learned):
    """Weights stay as they are: in six steps that learn ranges, differences of 1e-4 (TF32) grow to those looked for here.

    Both statistics are moving averages, so that the order of the images matters, too.
    """
    options = {"method": "max", "accelerator": "gpu", "learn_scales": learned, "rate": 0.0}
    _, (alone,) = run(1, **options)
    _, (synchronised, other) = run(2, **options, sync_batchnorm=True)
    _, (apart, _) = run(2, **options)
    assert equal(synchronised, other)
    for name in ("model.2.bn.running_mean", "model.2.bn.running_var"):
        assert (synchronised[name] - alone[name]).norm() < 0.2 * (apart[name] - alone[name]).norm()


def test_forked_training_says_that_the_ranges_stay_in_its_processes(tmp_path):
    """Unless the model was prepared before: then those of its six quantizers come back."""
    warning = "the process that called fit gets the weights, but no ranges"
    done = start(tmp_path, 2, json.dumps({"method": "max"}))
    assert (warning in done.stderr, json.loads(done.stdout.splitlines()[-1])) == (True, 0)
    done = start(tmp_path, 2, json.dumps({"method": "max", "prepared": True}))
    assert (warning in done.stderr, json.loads(done.stdout.splitlines()[-1])) == (False, 6)


REFUSED = {
    # torch's DistributedDataParallel says so of a float model, too.
    "synchronised batch norm on a CPU, float": (
        {"sync_batchnorm": True, "quantized": False},
        "SyncBatchNorm layers only work with GPU modules",
    ),
    "synchronised batch norm on a CPU": ({"sync_batchnorm": True}, "SyncBatchNorm layers only work with GPU modules"),
    "learned ranges that freeze": (
        {"learn_scales": True, "freeze_ranges_epoch": 1, "strategy": "ddp_fork"},
        "freeze_ranges_epoch: DDP waits for the gradients of learned ranges",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_ddp_cannot_do_is_refused_at_the_start(settings, message, tmp_path):
    done = start(tmp_path, 2, json.dumps({"method": "max", **settings}))
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.iterdir()), "training began"
