"""How the command line says what is wrong with an option: the usage of the command, and a hint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..checks import did_you_mean


class Parser(argparse.ArgumentParser):
    """Refuses what it does not know by itself, with its own usage, and says what was meant.

    argparse lets the parser of all commands refuse the options that a command does not know.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return found, unknown

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End with an error about arguments that were not recognized."""
        name = next((x for x in unknown if x.startswith("-")), unknown[0])
        name = name.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{name!r} is one argument too many; texts with spaces need quotes")
        known = [x for x in self._option_string_actions if x.startswith("--") and x != "--help"]
        self.error(f"there is no option {name}{did_you_mean(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action,
                f"{value!r} is none of {', '.join(known)}{did_you_mean(value, known)}",
            )

    def error(self, message: str) -> NoReturn:
        more = "" if message.endswith("?") else f"; see {self.prog} --help"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}{more}\n")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and leaves room for the options' names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)
