"""Judges for the tests of tournaments, and a base whose every row has a text of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import crossfade as cf
from crossfade.decoding.stats import ModelStats
from tiny_models import VOCAB, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# All rows are cut at one length, so that all requests play at once.
EVEN: dict[str, Any] = {
    "max_new_tokens": 6,
    "temperature": 1.2,
    "seed": 5,
    "eos_token_id": None,
}


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """Every token is a word, so that other tokens are another text."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@functools.cache
def writer() -> cf.Model:
    return cf.Model(make("llama"), tokenizer=words())


class Judge:
    """Prefers by a function of context, first and second; keeps what it was asked.

    It takes its arguments apart, which are its own.
    """

    def __init__(self, prob: Callable[[Any, str, str], float] | None = None) -> None:
        self.prob = prob or (lambda context, a, b: float((context, a) > (context, b)))
        self.calls: list[list[tuple[Any, str, str]]] = []

    def prefer(
        self, contexts: list[Any], firsts: list[str], seconds: list[str]
    ) -> Sequence[float] | Any:
        self.calls.append(list(zip(contexts, firsts, seconds, strict=True)))
        found = [self.prob(*pair) for pair in self.calls[-1]]
        for each in (contexts, firsts, seconds):
            each.clear()
        return found

    @property
    def matches(self) -> int:
        return sum(map(len, self.calls))


class Keeper(Judge):
    """A judge that keeps what it has read, and says what it did."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: list[str] = []

    @contextmanager
    def keeping(self) -> Iterator[Kept]:
        self.events.append("begin")
        try:
            yield Kept(self)
        finally:
            self.events.append("end")


class Kept:
    def __init__(self, judge: Keeper) -> None:
        self.judge, self.read = judge, 0

    def prefer(self, *arguments: Any) -> Any:
        self.judge.events.append("prefer")
        self.read += len(arguments[0])
        return self.judge.prefer(*arguments)

    @property
    def stats(self) -> list[ModelStats]:
        return [ModelStats(("llama",), 1, 2 * self.read)]
