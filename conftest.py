"""Test processes that run side by side share the cores.

Each would start a thread for every core otherwise, and threads that wait for a core of another process take several times as
long: on two cores, two test files side by side took four to six times as long as with one thread each.
"""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Read when PyTorch is imported, and by the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
