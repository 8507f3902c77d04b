"""A Hugging Face streamer, as a call of several tries tells it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Stream:
    """Puts the prompts, then every step's tokens, into a streamer: each once, in order.

    Where a step is decoded again, because the engine could not go on and the simple path did,
    its tokens are those that were put before.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.told = 0  # how often the streamer was told something: the prompts, then each step

    def put(self, step: int, tokens: Tensor) -> None:
        """The prompts ``[rows, length]`` as step 0; from step 1 on a token a row."""
        if step == self.told:
            self.told += 1
            self.streamer.put(tokens.cpu())

    def end(self) -> None:
        self.streamer.end()
