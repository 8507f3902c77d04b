"""What the ops take and return besides tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Support:
    """The tokens that one term of a blend allows, cut from its own distribution at temperature 1.

    Tokens outside are removed before blending; truncation of the blend itself comes after. The
    cuts mean what Hugging Face's processors of the same names mean and apply in the same order;
    ties with the threshold are kept.

    Args:
        term: index of the term among the blend's log-prob terms.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of the most probable tokens with mass `top_p`; 1.0 keeps all.
        min_p: keep tokens with at least `min_p` times the largest probability; 0.0 keeps all.

    Raises:
        ValueError: a setting is out of range.

    Source: contrastive decoding's plausible tokens are ``Support(min_p=alpha)`` (Li et al.,
    arXiv:2210.15097, eq. 3); ARGS and PAD use ``Support(top_k=k)`` (arXiv:2402.01694).
    """

    term: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("term", int), ("top_k", int), ("top_p", float), ("min_p", float)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(
                    f"Support.{name} is {value!r} ({type(value).__name__}); it must be "
                    f"{'an int' if kind is int else 'a float'}"
                )
        if self.term < 0:
            raise ValueError(f"Support.term is {self.term}; it must be 0 or more")
        if not 0 <= self.top_k < 2**63:
            raise ValueError(
                f"Support.top_k is {self.top_k}; it must be 0 (off) or more, and below 2^63"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"Support.top_p is {self.top_p}; it must be within [0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"Support.min_p is {self.min_p}; it must be within [0, 1]")


class BlendSample(NamedTuple):
    """The tokens drawn from a blend. A row that cannot be sampled has token -1 and NaN log-probs.

    Attributes:
        tokens: ``[B]`` int64.
        logprobs: ``[B]`` float32, nats: of the token under the blend at temperature 1, before
            truncation.
        sampled_logprobs: ``[B]`` float32, nats: of the token under the distribution that was
            sampled, after temperature and truncation; 0 where decoding is greedy.
        term_logprobs: ``[B, K]`` float32, nats: of the token under each term alone, or None.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampled_logprobs: torch.Tensor
    term_logprobs: torch.Tensor | None


class LinearLogp(NamedTuple):
    """Log-probs of a linear head's tokens: float32, or float64 of float64 arguments.

    Attributes:
        logp: ``[...]``, nats: of the targets; 0 where a target is ignored.
        lse: ``[...]``: log of the sum of the logits' exponentials.
        entropy: ``[...]``, nats, or None.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
