"""``crossfade COMMAND``: which commands there are, and what their errors look like.

The file of a command has `HELP`, which is one sentence about it, `add_options(parser)`, and
`run(arguments)`, which gives the exit status. It may have a short `USAGE`, and `EXAMPLES` for the
end of its --help. These files import torch, transformers and the rest
of crossfade inside functions only, so that ``crossfade --help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from . import (
    bench,
    chat,
    correct,
    demo,
    dynamics,
    generate,
    info,
    inspect,
    judge,
    pareto,
    score,
    serve,
    train,
)
from .usage import Formatter, Parser

# in the order of --help
COMMANDS = (
    demo,
    generate,
    chat,
    score,
    judge,
    correct,
    pareto,
    dynamics,
    train,
    serve,
    inspect,
    bench,
    info,
)
EXAMPLES = """\
examples:
  crossfade generate "Why is the sky blue?" --model smollm2 --stream
  crossfade chat --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "base + w * (kind - base)" --fader w=0.8

smollm2 is a small model that is downloaded when it is first used. Each command
has a --help. The exit status is 0, 2 after a mistake, 130 after Ctrl-C, and 1
if the reader of a pipe has left.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` asks for, by default the arguments of the process.

    Returns:
        The exit status: 0 if all went well, 2 after a mistake, which a line on stderr explains, 130
        after Ctrl-C, and 1 if whoever reads stdout has closed it.
    """
    arguments = parser().parse_args(argv)
    if arguments.command != "bench":  # which measures threads as they are
        share_cores()
    with _open_streams(), warnings.catch_warnings():
        warnings.showwarning = partial(_show, arguments.command)
        return _run(arguments)


def share_cores() -> None:
    """Let threads that wait for others sleep, where torch, which starts them, is not loaded yet.

    By default OpenMP's threads keep their core busy while they wait. Two processes on the same
    cores then hold up each other at every layer, and both come to a crawl.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """Let printing work where stdout or stderr is closed, as by ``>&-``: what is printed is lost.

    Characters that the encoding of stdout does not have are escaped, as they are on stderr.
    """
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        yield


def _run(arguments: argparse.Namespace) -> int:
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


def _show(command: str, message: Warning | str, *_: Any) -> None:
    """Print a warning as a line, which shares none with a progress bar."""
    from ..progress import print_line

    print_line(f"crossfade {command}: warning: {message}", sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="crossfade",
        description="Decode with several language models at once.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
    )
    top.add_argument(
        "--version", action=_Version, nargs=0, help="show the version of crossfade and exit"
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        usage = getattr(command, "USAGE", None)
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            usage=usage and f"crossfade {name} {usage}",
            epilog=getattr(command, "EXAMPLES", None),
            formatter_class=Formatter,
        )
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
