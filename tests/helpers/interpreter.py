"""Triton decides when it is imported whether to interpret: tests of kernels without a GPU run in a process of their own."""

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file, chosen):
    """The tests of ``file`` that ``-k chosen`` selects pass in Triton's interpreter, and there are some."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
