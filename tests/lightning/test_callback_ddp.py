"""QATCallback in several processes (DDP with gloo): the same ranges everywhere, and those of one process on the same data."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SLOW = ("percentile", "mse")
LEARNED = {"method": "max", "learn_scales": True, "unused": True, "frozen": True}
REFUSED = {
    # torch's DistributedDataParallel says so of a float model, too.
    "synchronised batch norm on a CPU, float": (
        {"sync_batchnorm": True, "quantized": False},
        "SyncBatchNorm layers only work with GPU modules",
    ),
    "synchronised batch norm on a CPU": ({"sync_batchnorm": True}, "SyncBatchNorm layers only work with GPU modules"),
    "learned ranges that freeze": (
        {"learn_scales": True, "freeze_ranges_epoch": 1, "strategy": "ddp"},
        "freeze_ranges_epoch: DDP waits for the gradients of learned ranges",
    ),
}
# What becomes of a case that ends a start.
UNFINISHED = {
    "stops-2": {"method": "max", "stops": True, "processes": 2},
    "hangs-2": {"method": "max", "hangs": True, "patience": 3, "processes": 2},
}
# On a CPU: they run together, as a start of Python costs more than a case.
CASES = {
    **{f"{method}-{n}": {"method": method, "processes": n} for method in ("max", "entropy") for n in (1, 2)},
    **UNFINISHED,
    "learned-2": {**LEARNED, "processes": 2},
    "fails-2": {"method": "max", "fails": True, "processes": 2},
    **{f"{name}-2": {"method": "max", "refused": True, "processes": 2, **settings} for name, (settings, _) in REFUSED.items()},
    "forked-2": {"method": "max", "forked": True, "processes": 2},
    "forked, prepared-2": {"method": "max", "forked": True, "prepared": True, "processes": 2},
}
SLOW_CASES = {
    **{f"{method}-{n}": {"method": method, "processes": n} for method in SLOW for n in (1, 2)},
    **{f"{method}-4": {"method": method, "processes": 4} for method in ("max", "entropy", *SLOW)},
}


def start(folder, cases, patience=540):
    """Run the cases; the folder with what each left, and what was said."""
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "ddp_run.py"), str(folder)]
    with (folder / "stderr.txt").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # With the processes that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return folder


def finished(folder, name, processes):
    """What each process left behind at the end of a case: ``None``, a refusal, or a number."""
    errors = "".join(path.read_text(encoding="utf-8")[-3000:] for path in sorted((folder / name).glob("error-*.txt")))
    done = [folder / name / f"done-{rank}.json" for rank in range(processes)]
    said = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
    assert all(path.exists() for path in done), f"{name} did not end in every process\n{errors or said}"
    return [json.loads(path.read_text(encoding="utf-8")) for path in done]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder where a case of a CPU left its files."""

    @functools.cache
    def started(slow):
        return start(tmp_path_factory.mktemp("ddp"), SLOW_CASES if slow else CASES)

    return lambda name: started(name in SLOW_CASES)


def results(folder, name, processes):
    """Ranges at the start of training and states at its end, one of each process."""
    assert finished(folder, name, processes) == [None] * processes
    return [
        [torch.load(folder / name / f"{kind}-{rank}.pt", map_location="cpu", weights_only=True) for rank in range(processes)]
        for kind in ("ranges", "state")
    ]


@pytest.fixture
def run(together):
    return lambda processes, name: results(together(f"{name}-{processes}"), f"{name}-{processes}", processes)


@pytest.fixture(scope="module")
def run_on_gpus(tmp_path_factory):
    """As ``run``, by settings."""

    @functools.cache
    def run(processes, settings):
        case = {"accelerator": "gpu", "processes": processes, **json.loads(settings)}
        return results(start(tmp_path_factory.mktemp("ddp"), {"gpu": case}), "gpu", processes)

    return lambda processes, **settings: run(processes, json.dumps(settings))


def equal(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    ["max", "entropy", *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)],
)
def test_ranges_are_those_of_one_process_on_all_the_data(run, method, processes):
    (alone,), _ = run(1, method)
    found, states = run(processes, method)
    assert all(equal(ranges, alone) for ranges in found)
    assert all(ranges > 0 for ranges in (value.min() for value in alone.values()))
    moving = {"model.2.bn.running_mean", "model.2.bn.running_var"}  # torch's own, of each process until the next forward
    for state in states[1:]:
        assert [name for name in state if not torch.equal(state[name], states[0][name])] == [
            name for name in state if name in moving
        ]


def test_learned_ranges_and_layers_that_no_loss_reaches(run):
    (before, _), states = run(2, "learned")
    assert equal(states[0], states[1])
    moved = [path for path, amax in before.items() if not torch.equal(states[0][f"{path}.amax"], amax)]
    assert moved
    assert not any("0.runs" in path for path in moved)


def test_a_process_that_cannot_look_at_its_batch_keeps_no_other_waiting(run):
    """For clip rates the module runs on the last batch of each process, and all log the same values."""
    _, states = run(2, "fails")
    _, expected = run(2, "max")
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
def test_ranges_are_equal_on_two_gpus(run_on_gpus, method, precision):
    """And near those of one GPU: with batches of another size, cuDNN adds up in another order."""
    options = {"method": method, "precision": precision}
    (alone,), _ = run_on_gpus(1, **options)
    found, states = run_on_gpus(2, **options)
    assert equal(found[0], found[1])
    assert all(bool((value > 0).all()) for value in found[0].values())
    # A step of half precision in the values that a range is made of, or of its histogram's 2048 bins.
    tolerance = 1e-3 if precision == "32-true" else 1e-2
    for path, value in alone.items():
        torch.testing.assert_close(found[0][path], value, rtol=tolerance, atol=0)
    assert equal(*({k: v for k, v in state.items() if "running" not in k} for state in states))


@pytest.mark.parametrize("learned", [pytest.param(value, marks=gpus) for value in (False, True)])
def test_synchronised_batch_norm_on_two_gpus_has_the_statistics_of_all_the_data(run_on_gpus, learned):
    """Weights stay as they are: in six steps that learn ranges, differences of 1e-4 (TF32) grow to those looked for here.

    Both statistics are moving averages, so that the order of the images matters, too.
    """
    options = {"method": "max", "learn_scales": learned, "rate": 0.0}
    _, (alone,) = run_on_gpus(1, **options)
    _, (synchronised, other) = run_on_gpus(2, **options, sync_batchnorm=True)
    _, (apart, _) = run_on_gpus(2, **options)
    assert equal(synchronised, other)
    for name in ("model.2.bn.running_mean", "model.2.bn.running_var"):
        assert (synchronised[name] - alone[name]).norm() < 0.2 * (apart[name] - alone[name]).norm()


def test_forked_training_says_that_the_ranges_stay_in_its_processes(together):
    """Unless the model was prepared before: then those of its six quantizers come back."""
    warning = "the process that called fit gets the weights, but no ranges"
    found = {}
    for name in ("forked-2", "forked, prepared-2"):
        folder = together(name)
        (count,) = finished(folder, name, 1)
        found[name] = (warning in (folder / name / "stderr.txt").read_text(encoding="utf-8"), count)
    assert found == {"forked-2": (True, 0), "forked, prepared-2": (False, 6)}


def test_processes_that_lightning_forks_train_as_those_that_it_finds(run, together):
    found, states = run(2, "max")
    folder = together("forked-2") / "forked-2"
    for kind, expected in (("ranges", found), ("state", states)):
        forked = [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert all(equal(*pair) for pair in zip(forked, expected, strict=True))


@pytest.mark.parametrize(("name", "message"), [(name, message) for name, (_, message) in REFUSED.items()], ids=REFUSED)
def test_what_ddp_cannot_do_is_refused_at_the_start(name, message, together):
    folder = together(f"{name}-2")
    for refusal in finished(folder, f"{name}-2", 2):
        assert refusal is not None
        assert message in refusal
    assert {path.name for path in (folder / f"{name}-2").iterdir()} == {"done-0.json", "done-1.json"}, "training began"


@pytest.mark.parametrize(("name", "words"), [("stops-2", "calibration ends on this process"), ("hangs-2", "")])
def test_a_case_that_fails_in_one_process_or_hangs_is_named_and_hides_no_other(name, words, together):
    """Those behind it have ended: their own tests say so."""
    assert list(CASES)[-1] not in UNFINISHED
    with pytest.raises(AssertionError, match=rf"{name} did not end in every process[\s\S]*{words}"):
        finished(together(name), name, 2)
