"""A prompt whose own tokens are scored."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from ...blends.blend import Blend
from ..scoring import score
from .worker import Worker


@dataclass(frozen=True)
class PromptScores:
    """The log-probs of a prompt's tokens under a blend.

    Attributes:
        ids: the tokens.
        logprobs: of each after those before it, nats; None for the first one.
        top_logprobs: for each token the most likely ones in its place, the best first; empty for
            the first one.
    """

    ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


class Scoring:
    """Scores that a session's thread will find: await them, or ask for `result`."""

    def __init__(
        self, ids: list[int], worker: Worker, blend: Blend, tokenizer: Any, tops: int
    ) -> None:
        def find() -> PromptScores:
            if len(ids) < 2:
                return PromptScores(ids, [None] * len(ids), [{}] * len(ids))
            of = score(blend, [ids[:1]], [ids[1:]], tokenizer=tokenizer, top_logprobs=tops)
            best: list[dict[int, float]] = [{} for _ in ids]
            if of.top_tokens is not None and of.top_logprobs is not None:
                each = zip(of.top_tokens[0].tolist(), of.top_logprobs[0].tolist(), strict=True)
                best[1:] = [dict(zip(tokens, log_p, strict=True)) for tokens, log_p in each]
            return PromptScores(ids, [None, *of.logprobs[0].tolist()], best)

        self._future = worker.call(find)

    def result(self, timeout: float | None = None) -> PromptScores:
        """The scores, once they are found.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Let nobody read the prompt any more, if that has not begun."""
        self._future.cancel()

    def __await__(self) -> Generator[Any, None, PromptScores]:
        return asyncio.wrap_future(self._future).__await__()
