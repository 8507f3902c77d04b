"""What is asked of texts that begin alike: prompts without repetition, and what follows each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..forms import Ids
from .tree import Lengths, shared

Text = list[list[int]]  # the ids that each model reads of a prompt before logits are wanted


class Branch(NamedTuple):
    """What is read at the end of a prompt, for the responses that go on from it.

    Attributes:
        prompt: for each model.
        start: how many of its tokens the slot's rows hold.
        ids: a response without its last token.
    """

    slot: int
    prompt: tuple[Ids, ...]
    start: Lengths
    ids: Ids
    requests: list[int]


class Asked:
    """Prompts, each with its responses.

    Args:
        prompts: the prompt of each request, for each model: ``prompts[i][k]``.
        responses: the response of each request.

    Attributes:
        prompts: without repetition, sorted: those that begin alike come one after the other.
        requests: of each of these prompts, which requests are of it.
        texts: these prompts without their last tokens, which are read with the responses.
        longest: tokens of the longest prompt that each model reads.
        limit: tokens of the longest response.
    """

    def __init__(self, prompts: Sequence[tuple[Ids, ...]], responses: Sequence[Ids]) -> None:
        self.responses = responses
        each: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            each.setdefault(tuple(map(tuple, prompt)), []).append(i)
        self.prompts = sorted(each)
        self.requests = [each[prompt] for prompt in self.prompts]
        self.texts: list[Text] = [[list(ids[:-1]) for ids in prompt] for prompt in self.prompts]
        self.longest = [max(map(len, ids)) for ids in zip(*self.prompts, strict=True)]
        self.limit = max(map(len, responses))

    @property
    def saved(self) -> float:
        """The part of all tokens that need not be read."""
        whole = least = 0
        before: Text = [[] for _ in self.longest]
        for text, requests in zip(self.texts, self.requests, strict=True):
            once = sum(map(len, text))
            whole += sum(once + len(self.responses[i]) * len(text) for i in requests)
            ends = {tuple(self.responses[i][:-1]) for i in requests}
            least += sum(len(ids) + 1 for ids in ends) * len(text)
            least += once - sum(shared(before, text))
            before = text
        return 1 - least / whole

    def branches(self, i: int, slot: int, start: Lengths) -> list[Branch]:
        """What is read at the end of prompt i, the longest first: this also reads what is before.

        The last token of a response is not read, so that those which differ in it alone share a
        branch: so do all responses of one token.

        Args:
            slot: where the prompt is read.
            start: how many of its tokens the slot's rows hold.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for request in self.requests[i]:
            found.setdefault(tuple(self.responses[request][:-1]), []).append(request)
        prompt, whole = self.prompts[i], tuple(map(len, self.texts[i]))
        return [
            Branch(slot, prompt, whole if turn else start, ids, found[ids])
            for turn, ids in enumerate(sorted(found, key=len, reverse=True))
        ]
