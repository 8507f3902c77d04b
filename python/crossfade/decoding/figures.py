"""What a blend and its references say of responses, from the logits of all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blends.blend import Blend
from .forms import Ids
from .inputs import left_pad
from .members import Members
from .mixer import Mixer

# The most numbers of each model's logits that are blended at once.
MAX_MIXED = {"cpu": 1 << 20, "cuda": 1 << 24}


class Figures(NamedTuple):
    """What is found of the n tokens of one response: the rows of `Scores`, without padding.

    What was not asked for is ``[n, 0]``.
    """

    logprobs: Tensor
    ranks: Tensor
    term_logprobs: Tensor
    kl: Tensor


class Mixing:
    """What a blend and its references make of the logits of all models.

    Args:
        requests: how many the call has.
        terms: whether the log-probs under each term are wanted.
    """

    def __init__(
        self, blend: Blend, members: Members, requests: int, device: torch.device, terms: bool
    ) -> None:
        self.vocabulary, self.device, self.terms = members.vocabulary, device, terms
        self.places = [r.places for r in members.references]
        self.blends = [
            (
                x,
                x.row_weights(requests, device),
                x.row_value_weights(requests, device),
                x.row_part_weights(requests, device),
            )
            for x in (blend, *(r.blend for r in members.references))
        ]

    def figures(
        self, requests: Sequence[int], logits: Sequence[Tensor], responses: Sequence[Ids]
    ) -> Iterator[Figures]:
        """The figures of each request's response."""
        tokens = left_pad(responses).ids.to(self.device)
        shape, flat = tokens.shape, [z.flatten(0, 1) for z in logits]
        request_of = torch.tensor(requests, device=self.device).repeat_interleave(shape[1])
        most = max(1, MAX_MIXED.get(self.device.type, MAX_MIXED["cuda"]) // self.vocabulary)
        parts = []
        for at in range(0, len(request_of), most):
            some = slice(at, at + most)
            here = [z[some].to(self.device) for z in flat]
            parts.append(self._of_tokens(request_of[some], here, tokens.flatten()[some]))
        whole = [torch.cat(x).unflatten(0, shape) for x in zip(*parts, strict=True)]
        for i, response in enumerate(responses):
            yield Figures(*(x[i, shape[1] - len(response) :] for x in whole))

    def _of_tokens(
        self, requests: Tensor, logits: Sequence[Tensor], tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """What `figures` gives, of tokens ``[n]``, each with its request and logits before it."""
        mixer, *references = (
            Mixer(
                blend,
                _rows(w, requests),
                _rows(v, requests),
                self.vocabulary,
                part_weights=_rows(p, requests),
            )
            for blend, w, v, p in self.blends
        )
        mixer.references = list(zip(references, self.places, strict=True))
        at = tokens[:, None]
        all_log_p = mixer.log_probs(logits)
        log_p = all_log_p.gather(1, at)
        terms, kl = log_p[:, :0], log_p[:, :0]
        if self.terms:
            terms = torch.cat([p.gather(1, at) for p in mixer.term_log_probs(logits)], dim=1)
        if references:
            (kl,) = mixer.divergences(logits).unbind(1)
        return log_p[:, 0], _ranks(all_log_p, at), terms, kl


def _ranks(log_p: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens come before each of ``tokens [n, 1]`` in ``log_p [n, V]``; -1 at NaN."""
    own = log_p.gather(1, tokens)
    lower = torch.arange(log_p.shape[1], device=log_p.device) < tokens
    before = (log_p > own) | ((log_p == own) & lower)
    return before.sum(dim=1).masked_fill(own[:, 0].isnan(), -1)


def _rows(weights: Any, requests: Tensor) -> Any:
    """The weights of tokens, each of its request."""
    return weights[requests] if isinstance(weights, Tensor) else weights
