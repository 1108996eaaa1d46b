"""QATCallback in several processes (DDP with gloo): the same ranges everywhere, and those of one process on the same data."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ranges at the start of training and states at its end, one of each process."""

    @functools.cache
    def run(processes, settings):
        folder = tmp_path_factory.mktemp("ddp")
        command = [sys.executable, str(Path(__file__).with_name("ddp_run.py")), str(folder), str(processes), settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return [
            [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(processes)]
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
