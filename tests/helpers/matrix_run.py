"""One process of a row of the matrix that runs in several: ``matrix_run.py FEATURE FOLDER``.

Lightning starts the other processes with the same command. Each writes the states of its modules.
"""

import sys
from pathlib import Path

import torch
from matrix_features import FEATURES


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    for method, state in FEATURES[name].run_here(folder).items():
        torch.save(state, folder / f"{method}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
