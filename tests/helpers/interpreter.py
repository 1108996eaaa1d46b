"""Triton decides when it is imported whether to interpret: tests of kernels without a GPU run in a process of their own."""

import itertools
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file, chosen, *, every=False):
    """The tests of ``file`` that ``-k chosen`` selects pass in Triton's interpreter, and there are some.

    The slow ones are among them if ``every``.
    """
    marks = "not gpu" if every else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "-k", chosen, file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def crossed(values, *others, slow=()):
    """Every value with every combination of ``others``, as parameters; most of them are slow.

    In a default run the first value meets all combinations, and each further value one, the next value the next one. That is
    for values such as memory layouts: the kernels go over the memory of a tensor whatever its layout. Values in ``slow`` are
    slow with all.
    """
    first, *further = (value for value in values if value not in slow)
    combinations = list(itertools.product(*others))
    default = {(first, *combination) for combination in combinations}
    default |= {(value, *combinations[i % len(combinations)]) for i, value in enumerate(further)}
    cases = itertools.product([first, *further, *slow], *others)
    return [pytest.param(*case, marks=() if case in default else pytest.mark.slow) for case in cases]
