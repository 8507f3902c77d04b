"""What a blend and its references say of responses, from the logits of all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blends.blend import Blend
from .classifiers import OneClassifier, Said, classifiers_of, dense
from .engine.options import Engine
from .forms import Ids
from .inputs import left_pad
from .job import Classified
from .members import Members
from .mixer import Mixer, row_weights

# The most numbers of each model's logits that are blended at once.
MAX_MIXED = {"cpu": 1 << 20, "cuda": 1 << 24}
MOST_READ = 8  # the responses about which classifiers are asked at a time


class Figures(NamedTuple):
    """What is found of the n tokens of one response: the rows of `Scores`, without padding.

    What was not asked for is ``[n, 0]``.
    """

    logprobs: Tensor
    ranks: Tensor
    term_logprobs: Tensor
    kl: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, eq=False)
class Scored:
    """A response that is scored, as `classifiers.Reads` has it."""

    request: int
    classified: Classified

    def __str__(self) -> str:
        return f"response {self.request}"


class Mixing:
    """What a blend and its references make of the logits of all models.

    Args:
        requests: how many the call has.
        terms: whether the log-probs under each term are wanted.
        classified: what classifiers read of the requests; None if there are none.
        limit: how many tokens a response has at most.
        tops: how many of the best tokens at each place are wanted.
    """

    def __init__(
        self,
        blend: Blend,
        members: Members,
        requests: int,
        device: torch.device,
        terms: bool,
        classified: Classified | None = None,
        limit: int = 1,
        tops: int = 0,
    ) -> None:
        self.vocabulary, self.device, self.terms = members.vocabulary, device, terms
        self.tops = min(tops, self.vocabulary)
        own = tuple(range(len(blend.terms) + len(blend.values)))
        self.places = [own, *(r.places for r in members.references)]
        self.blends = [
            (x, row_weights(x, requests, device))
            for x in (blend, *(r.blend for r in members.references))
        ]
        self.classified, engine = classified, Engine()
        places = min(requests, MOST_READ)
        self.classifiers = [
            classifiers_of(x, places, limit, engine, "kl_to." if k else "")
            for k, (x, _) in enumerate(self.blends)
        ]

    @property
    def each_classifier(self) -> list[OneClassifier]:
        return [c for some in self.classifiers for c in some]

    def figures(
        self, requests: Sequence[int], logits: Sequence[Tensor], responses: Sequence[Ids]
    ) -> Iterator[Figures]:
        """The figures of each request's response."""
        said = self._said(requests, logits, responses)
        tokens = left_pad(responses).ids.to(self.device)
        shape, flat = tokens.shape, [z.flatten(0, 1) for z in logits]
        request_of = torch.tensor(requests, device=self.device).repeat_interleave(shape[1])
        most = max(1, MAX_MIXED.get(self.device.type, MAX_MIXED["cuda"]) // self.vocabulary)
        parts = []
        for at in range(0, len(request_of), most):
            some = slice(at, at + most)
            here = [z[some].to(self.device) for z in flat]
            now = [[c[some] for c in of_blend] for of_blend in said]
            parts.append(self._of_tokens(request_of[some], here, tokens.flatten()[some], now))
        whole = [torch.cat(x).unflatten(0, shape) for x in zip(*parts, strict=True)]
        for i, response in enumerate(responses):
            yield Figures(*(x[i, shape[1] - len(response) :] for x in whole))

    def _said(
        self, requests: Sequence[int], logits: Sequence[Tensor], responses: Sequence[Ids]
    ) -> list[list[list[Said | None]]]:
        """What each classifier of each blend says before each token, as `figures` counts them.

        Tokens are taken one after the other, as they were written: what is said of them may be kept
        for some steps.
        """
        longest = max(map(len, responses))
        found: list[list[list[Said | None]]] = [
            [[None] * (len(responses) * longest) for _ in some] for some in self.classifiers
        ]
        if self.classified is None:
            return found
        rows = [Scored(r, self.classified) for r in requests]
        for first in range(0, len(rows), MOST_READ):
            some = range(first, min(first + MOST_READ, len(rows)))
            for t in range(max(len(responses[i]) for i in some)):
                now = [i for i in some if t < len(responses[i])]
                at = [longest - len(responses[i]) + t for i in now]
                of_rows = torch.tensor([requests[i] for i in now], device=self.device)
                z = [x[now, at].to(self.device) for x in logits]
                slots = [i - first for i in now]
                reads = {s: rows[i] for s, i in zip(slots, now, strict=True)}
                written = {s: responses[i][:t] for s, i in zip(slots, now, strict=True)}
                for k, (blend, weights) in enumerate(self.blends):
                    if not blend.classifiers:
                        continue
                    mixer = Mixer(blend, [_rows(w, of_rows) for w in weights], self.vocabulary)
                    log_p = mixer.log_probs([z[p] for p in self.places[k]])
                    by_slot = log_p.new_zeros(MOST_READ, log_p.shape[1])
                    by_slot[slots] = log_p
                    for c, classifier in enumerate(self.classifiers[k]):
                        said = classifier.said_of(by_slot, reads, written, slots)
                        for i, column, of_row in zip(now, at, said, strict=True):
                            found[k][c][i * longest + column] = of_row
        return found

    def _of_tokens(
        self,
        requests: Tensor,
        logits: Sequence[Tensor],
        tokens: Tensor,
        said: Sequence[Sequence[Sequence[Said | None]]],
    ) -> tuple[Tensor, ...]:
        """What `figures` gives, of tokens ``[n]``, each with its request and logits before it.

        Args:
            said: of each blend and its classifiers, what is said before each token.
        """
        mixers = [
            Mixer(blend, [_rows(w, requests) for w in weights], self.vocabulary)
            for blend, weights in self.blends
        ]
        for each, of_blend in zip(mixers, said, strict=True):
            each.said = [self._dense(c) for c in of_blend]
        mixer, *references = mixers
        mixer.references = list(zip(references, self.places[1:], strict=True))
        at = tokens[:, None]
        all_log_p = mixer.log_probs(logits)
        log_p = all_log_p.gather(1, at)
        terms, kl = log_p[:, :0], log_p[:, :0]
        if self.terms:
            terms = torch.cat([p.gather(1, at) for p in mixer.term_log_probs(logits)], dim=1)
        if references:
            (kl,) = mixer.divergences(logits).unbind(1)
        best = all_log_p.topk(self.tops)
        return log_p[:, 0], _ranks(all_log_p, at), terms, kl, best.indices, best.values

    def _dense(self, said: Sequence[Said | None]) -> Tensor:
        rows = [i for i, x in enumerate(said) if x is not None]
        known = [x for x in said if x is not None]
        return dense(known, rows, (len(said), self.vocabulary)).to(self.device)


def _ranks(log_p: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens come before each of ``tokens [n, 1]`` in ``log_p [n, V]``; -1 at NaN."""
    own = log_p.gather(1, tokens)
    lower = torch.arange(log_p.shape[1], device=log_p.device) < tokens
    before = (log_p > own) | ((log_p == own) & lower)
    return before.sum(dim=1).masked_fill(own[:, 0].isnan(), -1)


def _rows(weights: Any, requests: Tensor) -> Any:
    """The weights of tokens, each of its request."""
    return weights[requests] if isinstance(weights, Tensor) else weights
