"""One process of the rows of the matrix that run in several: ``matrix_run.py FOLDER ROW ...``.

Lightning starts the other processes with the same command. Each writes the states of the modules of a row into the
folder of its name.
"""

import sys
from pathlib import Path

import torch
from matrix_features import FEATURES


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    for name in names:
        for method, state in FEATURES[name].run_here(folder / name).items():
            torch.save(state, folder / name / f"{method}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
