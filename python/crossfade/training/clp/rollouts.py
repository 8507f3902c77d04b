"""Responses of a policy that were just sampled, with all that its loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .packing import packed


@dataclass(frozen=True)
class Rollouts:
    """Responses to prompts, n to each, which stay together.

    Attributes:
        read: the ids that the policy reads of each prompt.
        plain: those that the reference reads: the same, but of a `PromptedPolicy`, which is told
            the weights in the prompt.
        responses: the ids of each response, EOS included.
        mixes: ``[prompts, adapters]``: how much of each adapter the policy has.
        kl: ``[prompts]``: the KL weights.
        weights: ``[prompts, rewards]``.
        scores: ``[responses, rewards]``: what each reward says of a response.
        finished: bool ``[responses]``: whether it ended by itself.
    """

    read: Sequence[list[int]]
    plain: Sequence[list[int]]
    responses: Sequence[list[int]]
    mixes: Tensor
    kl: Tensor
    weights: Tensor
    scores: Tensor
    finished: Tensor

    @property
    def n(self) -> int:
        """How many responses a prompt has."""
        return len(self.responses) // len(self.read)

    @property
    def rewards(self) -> Tensor:
        """``[responses]``: ``sum_k weights[k] scores[k]``."""
        return (self.weights.repeat_interleave(self.n, 0) * self.scores).sum(dim=1)

    def part(self, start: int, end: int) -> Rollouts:
        """Those of some prompts."""
        prompts, rows = slice(start, end), slice(start * self.n, end * self.n)
        return Rollouts(
            self.read[prompts],
            self.plain[prompts],
            self.responses[rows],
            self.mixes[prompts],
            self.kl[prompts],
            self.weights[prompts],
            self.scores[rows],
            self.finished[rows],
        )

    def batch(self, shares: bool, device: Any) -> dict[str, Tensor]:
        """The arguments of `Learner.forward` for the policy.

        Args:
            shares: whether the responses to a prompt share a row.
        """
        mixes = self.mixes if shares else self.mixes.repeat_interleave(self.n, 0)
        return {**self._batch(self.read, shares, device), "mixes": mixes.to(device)}

    def reference_batch(self, shares: bool, device: Any) -> dict[str, Tensor]:
        """The same for the reference, which has no part of any adapter."""
        rows = self.mixes if shares else self.mixes.repeat_interleave(self.n, 0)
        mixes = torch.zeros_like(rows)
        return {**self._batch(self.plain, shares, device), "mixes": mixes.to(device)}

    def _batch(self, prompts: Sequence[list[int]], shares: bool, device: Any) -> dict[str, Tensor]:
        n = self.n
        own = [self.responses[i : i + n] for i in range(0, len(self.responses), n)]
        if not shares:
            prompts = [ids for ids in prompts for _ in range(n)]
            own = [[response] for response in self.responses]
        return {name: x.to(device) for name, x in packed(prompts, own).items()}

    def figures(self, log_ratios: Tensor) -> Tensor:
        """``[responses, 5 + rewards]``: return, reward, KL, length, finished, and each reward."""
        kl = self.kl.repeat_interleave(self.n)
        rewards, ratios = self.rewards, log_ratios.to(self.scores)
        lengths = torch.tensor([float(len(ids)) for ids in self.responses])
        each = ((1 - kl) * rewards - kl * ratios, rewards, ratios, lengths, self.finished.float())
        return torch.cat([torch.stack(each, 1), self.scores], 1)
