"""Responses that follow the same prompts, or prompts that begin alike, read without repetition.

Harnesses ask for several responses to one prompt, and give many prompts the same examples to begin
with. The engine's caches keep what a row has read: a prompt is read once for all its responses,
which take turns in the place after it, and the next prompt in the row goes on from what the two
begin with alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..forms import Ids
from ..simple.term_model import TermModel
from .batching import Cost, batches, max_tokens
from .group import common
from .options import Engine
from .prefill import over_caches
from .runner import EngineRunner

ROWS = 32  # how many prompts are in the caches at a time, at most
# The most tokens that the caches of a model have places for. This bounds their memory.
MAX_CACHED = {"cpu": 1 << 13, "cuda": 1 << 14}


class Branches:
    """Prompts, each with its responses, for models that read them over caches.

    Args:
        prompts: the prompt of each request, for each model: ``prompts[i][k]``.
        responses: the response of each request.
        max_batch: how many rows share a forward, at most; None: as many as memory is meant for.

    Attributes:
        saved: the part of all tokens that need not be read.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        prompts: Sequence[tuple[Ids, ...]],
        responses: Sequence[Ids],
        max_batch: int | None = None,
    ) -> None:
        self.models, self.responses, self.max_batch = models, responses, max_batch
        each: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            each.setdefault(tuple(map(tuple, prompt)), []).append(i)
        # In this order, prompts that begin alike come one after the other.
        self.prompts = sorted(each)
        self.requests = [each[prompt] for prompt in self.prompts]
        whole = sum(
            len(ids) - 1 + len(r) for p, r in zip(prompts, responses, strict=True) for ids in p
        )
        self.saved = 1 - sum(self._unread()) / whole

    def _unread(self) -> Iterator[int]:
        """How many tokens all models read for each prompt and its responses."""
        before: tuple[Ids, ...] = ((),) * len(self.models)
        for prompt, requests in zip(self.prompts, self.requests, strict=True):
            alike = sum(common(a, b[:-1]) for a, b in zip(before, prompt, strict=True))
            own = sum(len(ids) + 1 for ids in {tuple(self.responses[i][:-1]) for i in requests})
            yield sum(map(len, prompt)) - len(prompt) - alike + own * len(prompt)
            before = prompt

    @torch.no_grad()
    def read(self, most_logits: int) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Read all texts.

        Args:
            most_logits: how many numbers of logits are given at a time, of all models together,
                unless one request has more. As many are held besides, where requests share them.

        Yields:
            Some requests, in any order, and each model's logits ``[requests, tokens, V]`` before
            each token of their responses, padded on the left.

        Raises:
            Unsupported: the engine cannot run a model.
        """
        longest = [max(len(prompt[k]) for prompt in self.prompts) for k in range(len(self.models))]
        limit = max(map(len, self.responses))
        device = self.models[0].device
        most = MAX_CACHED.get(device.type, MAX_CACHED["cuda"]) // (max(longest) + limit)
        slots = max(1, min(most, ROWS, self.max_batch or ROWS, len(self.prompts)))
        runner = EngineRunner(self.models, longest, slots, limit, Engine())
        # Each slot takes its prompts from one stretch of the list, so that what follows in a slot
        # is what begins most like the one before.
        stretch = math.ceil(len(self.prompts) / slots)
        self._read_beginning(runner)
        for turn in range(stretch):
            at = range(turn, len(self.prompts), stretch)
            runner.join(range(len(at)), [self.prompts[p] for p in at], [limit] * len(at))
            while runner.joining:
                runner.read()
            waiting = [self._branches(slot, p) for slot, p in enumerate(at)]
            for reading in zip_longest(*waiting):  # one branch of each prompt that has more
                found = [x for x in reading if x is not None]
                for some in self._batches(found, most_logits):
                    yield from _of_requests(some, self._logits(runner, some), most_logits)

    def _branches(self, slot: int, prompt: int) -> list[_Branch]:
        """What is read after a prompt, the longest first.

        The last token of a response is not read, so that those which differ in it alone share a
        branch: so do all responses of one token.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for i in self.requests[prompt]:
            found.setdefault(tuple(self.responses[i][:-1]), []).append(i)
        longest = sorted(found, key=len, reverse=True)
        return [_Branch(slot, self.prompts[prompt], ids, found[ids]) for ids in longest]

    def _read_beginning(self, runner: EngineRunner) -> None:
        """Let all slots begin with what all prompts begin with, which the first slot reads."""
        first = self.prompts[0]
        alike = [
            first[k][: min(common(first[k], prompt[k]) for prompt in self.prompts)]
            for k in range(len(self.models))
        ]
        if runner.slots == 1 or not all(alike):
            return
        runner.join([0], [alike], [0])
        while runner.joining:
            runner.read()
        runner.fork([0] * runner.slots, [0] * runner.slots)

    def _batches(self, reading: Sequence[_Branch], most_logits: int) -> Iterator[list[_Branch]]:
        lengths = [len(branch.ids) + 1 for branch in reading]
        columns = sum(m.vocabulary or 1 for m in self.models)
        numbers = [n * columns for n in lengths]
        for some in batches(
            Cost(lengths, max_tokens(self.models[0].device)),
            Cost(numbers, most_logits),
            Cost([1] * len(lengths), self.max_batch or math.inf),
        ):
            yield [reading[j] for j in some]

    def _logits(self, runner: EngineRunner, some: Sequence[_Branch]) -> list[Tensor]:
        """Each model's logits ``[branches, tokens, V]``, padded on the left."""
        most = max(len(branch.ids) for branch in some) + 1
        found: dict[int, Tensor] = {}
        for group in runner.groups:
            each = [(m, k, branch) for m, k in enumerate(group.terms) for branch in some]
            rows = [m * runner.slots + branch.slot for m, _, branch in each]
            starts = [len(branch.prompt[k]) - 1 for _, k, branch in each]
            ids = [[branch.prompt[k][-1], *branch.ids] for _, k, branch in each]
            pieces: list[list[Tensor]] = [[] for _ in each]
            for j, z in over_caches(group, rows, starts, ids):
                pieces[j].append(z)
            whole = [torch.cat(z) for z in pieces]
            padded = torch.stack([pad(z, (0, 0, most - len(z), 0)) for z in whole])
            found |= zip(group.terms, padded.unflatten(0, (len(group.terms), -1)), strict=True)
        return [found[k] for k in range(len(self.models))]


class _Branch(NamedTuple):
    """Tokens that are read after a prompt in a slot, for the responses that go on from them.

    Attributes:
        prompt: for each model.
        ids: a response without its last token.
    """

    slot: int
    prompt: tuple[Ids, ...]
    ids: Ids
    requests: list[int]


def _of_requests(
    some: Sequence[_Branch], logits: list[Tensor], most_logits: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The requests of these branches, and for each its branch's logits, so many at a time."""
    each = [(j, i) for j, branch in enumerate(some) for i in branch.requests]
    if len(each) == len(some):
        yield [i for _, i in each], logits
        return
    size = max(1, most_logits // sum(z[0].numel() for z in logits))
    for start in range(0, len(each), size):
        at, requests = zip(*each[start : start + size], strict=True)
        yield [*requests], [z[[*at]] for z in logits]
