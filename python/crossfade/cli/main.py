"""The command line: ``crossfade demo | generate | score | train | inspect | bench | info``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import bench, demo, generate, info, inspect, score, train

COMMANDS = (demo, generate, score, train, inspect, bench, info)  # as --help lists them


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after a mistake, which one line on stderr explains."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"crossfade {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from ..decoding.memory import is_out_of_memory

        if arguments.traceback or not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or "memory ran out"
        print(f"crossfade {arguments.command}: error: {said}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="crossfade", description="Decode with several language models at once."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        added.add_argument("--traceback", action="store_true", help="show where an error came from")
        added.set_defaults(run=command.run)
        command.add_options(added)
    return top


class _Version(argparse.Action):
    """The version is looked up when it is asked for: that takes as long as all else of a start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import crossfade

        print(f"{parser.prog} {crossfade.__version__}")
        parser.exit()
