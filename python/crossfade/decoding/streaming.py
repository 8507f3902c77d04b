"""What a call tells a Hugging Face streamer, also where it decodes some steps twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Stream:
    """Puts the prompts, then every step's tokens, into a streamer: each once, in order.

    Where the engine cannot go on, the simple path begins anew. The steps that it repeats give the
    tokens that were put before, and are not put again.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.told = 0  # how often something was put: the prompts, then each step

    def put(self, step: int, tokens: Tensor) -> None:
        """The prompts ``[rows, length]`` as step 0; from step 1 on a token a row."""
        if step == self.told:
            self.told += 1
            self.streamer.put(tokens.cpu())

    def end(self) -> None:
        self.streamer.end()


def check_streamer(streamer: Any, search: Any, name: str = "streamer") -> None:
    """Refuse, by `name`, what is no streamer, and a streamer for a search.

    Raises:
        TypeError: it lacks a method of Hugging Face's streamers.
        NotImplementedError: a search cannot tell it anything before its end.
    """
    if streamer is None:
        return
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            f"{name} is a {type(streamer).__name__}; it must have put and end, as Hugging Face's: "
            "transformers.TextStreamer(tokenizer)"
        )
    if search is not None:
        raise NotImplementedError(f"{name} is set; a search knows its rows at the end alone")
