"""Progress bars, for whoever waits at a terminal."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

DELAY = 1.0  # seconds before a bar is shown, so that short work, and work that fails, shows none


def progress_bar(total: int | None, unit: str, *, prints: bool = False) -> Any:
    """A tqdm bar on stderr. Where that is a file, such as a log, the bar writes rarely.

    A single thing has no bar.

    Args:
        total: how many there are; None: it is not known.
        prints: whether lines go to stdout meanwhile, by `print_line`. If that is a pipe, there is
            no bar on a terminal, where whoever reads the pipe may print too.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        unit=unit,
        file=sys.stderr,
        mininterval=interval,
        dynamic_ncols=True,
        delay=DELAY,
        disable=(total is not None and total < 2)
        or (prints and sys.stderr.isatty() and _is_pipe(sys.stdout)),
    )


def _is_pipe(file: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):  # It is no file of the system.
        return False


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line, by default on stdout, at once. A bar on the same terminal makes room for it."""
    file = sys.stdout if file is None else file
    shared = file.isatty() and sys.stderr.isatty()
    with tqdm.external_write_mode(file=file) if shared else contextlib.nullcontext():
        print(text, file=file, flush=True)


class OnStep:
    """A streamer for `generate` that does nothing but call `function` at each step."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.prompt = True

    def put(self, tokens: Tensor) -> None:
        if not self.prompt:  # `generate` puts the prompt first
            self.function()
        self.prompt = False

    def end(self) -> None:
        self.prompt = True
