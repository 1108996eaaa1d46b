"""Training that is killed at random points, while calibrating and while writing checkpoints too, and resumed."""

import json
import subprocess
import sys
from pathlib import Path

KILLS = 20


def test_every_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "kill_run.py"), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"].values()) == KILLS
    assert {"calibration", "step", "validation", "saving"} <= found["kills"].keys()
    assert found["finished"] > 0
    assert found["differing"] == []
    assert len(set(found["losses"])) == len(found["losses"]) == 4, "nothing was trained"
