"""``crossfade COMMAND``: which commands there are, and what their errors look like.

The file of a command has `HELP`, which is one sentence about it, `add_options(parser)`, and
`run(arguments)`, which gives the exit status. These files import torch, transformers and the rest
of crossfade inside functions only, so that ``crossfade --help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import bench, demo, generate, info, inspect, score, train

COMMANDS = (demo, generate, score, train, inspect, bench, info)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` asks for, by default the arguments of the process.

    Returns:
        The exit status: 0 if all went well, 2 after a mistake, which a line on stderr explains, 130
        after Ctrl-C, and 1 if whoever reads stdout has closed it.
    """
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        # Python flushes stdout once more as it ends, which must not fail again.
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
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="crossfade", description="Decode with several language models at once."
    )
    top.add_argument(
        "--version", action=_Version, nargs=0, help="show the version of crossfade and exit"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        added.add_argument(
            "--traceback",
            action="store_true",
            help="after an error, show where in the code it happened",
        )
        added.set_defaults(run=command.run)
        command.add_options(added)
    return top


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes half the time of a start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import crossfade

        print(f"{parser.prog} {crossfade.__version__}")
        parser.exit()
