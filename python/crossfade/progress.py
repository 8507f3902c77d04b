"""Progress of decoding, for whoever waits at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm import tqdm

DELAY = 1.0  # seconds before a bar is shown: none for what is over, or has failed, by then


def progress_bar(total: int, unit: str) -> Any:
    """A tqdm bar on stderr, which in a log file does not write a line at every step."""
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
    """A streamer, as `generate` takes one, that only counts: `function` is called at each step."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.prompt = True

    def put(self, tokens: Tensor) -> None:
        if not self.prompt:  # the first call brings the prompt
            self.function()
        self.prompt = False

    def end(self) -> None:
        self.prompt = True
