"""One command of ``qat``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

OK, FOUND, INVALID = 0, 1, 2


class Command:
    """A command, its options and what it does.

    Args:
        name: First word of the command line.
        text: Its help, a phrase that begins with a verb.
        examples: Arguments that it may be called with, one or more.
        arguments: Add the options to a parser.
        run: Do the work; returns the exit status.
    """

    def __init__(
        self,
        name: str,
        text: str,
        *examples: str,
        arguments: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
    ) -> None:
        self.name = name
        self.text = text
        self.examples = examples
        self.arguments = arguments
        self.run = run

    def add_to(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add the command to those of a parser."""
        parser = commands.add_parser(
            self.name,
            help=self.text,
            description=self.text[0].upper() + self.text[1:] + ".",
            epilog="\n".join(["examples:", *(f"  qat {self.name} {example}" for example in self.examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=self.run)
        self.arguments(parser)
