"""Progress bars, for whoever waits at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm import tqdm

DELAY = 1.0  # seconds before a bar is shown, so that short work, and work that fails, shows none


def progress_bar(total: int, unit: str) -> Any:
    """A tqdm bar on stderr. Where that is a file, such as a log, the bar writes rarely."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        unit=unit,
        file=sys.stderr,
        mininterval=interval,
        dynamic_ncols=True,
        delay=DELAY,
    )


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
