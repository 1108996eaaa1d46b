"""``qat``: the functions of the package from the shell.

Exit status: 0 if all is well, 1 for findings or a mismatch, 2 for input that cannot be worked with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import QATError
from . import bench, build, check, inspect, report, run, simplify, verify
from .command import INVALID, OK

_COMMANDS = tuple(module.COMMAND for module in (check, simplify, build, run, bench, inspect, verify, report))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status.
    """
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except QATError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return INVALID
    except ModuleNotFoundError as error:
        # Deployment machines have no more than they need.
        if error.name is None or error.name.startswith("qat"):
            raise
        print(f"error: this command needs {error.name}, which is not installed here", file=sys.stderr)
        return INVALID
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("error: interrupted, nothing is written", file=sys.stderr)
        return 128 + 2


def make_parser() -> argparse.ArgumentParser:
    """The command line; imports neither torch nor onnx nor TensorRT."""
    parser = argparse.ArgumentParser(
        prog="qat",
        description="From a Q/DQ ONNX file to a measured, verified INT8 engine.",
        epilog="Exit status: 0 all is well, 1 findings or a mismatch, 2 invalid input.",
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
