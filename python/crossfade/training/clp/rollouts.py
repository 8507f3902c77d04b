"""Responses of a policy that were just sampled, with all that its loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...decoding.inputs import right_pad
from ..fused_head import IGNORED


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

    def batch(self, device: Any) -> dict[str, Tensor]:
        """The arguments of `Learner.forward` for the policy."""
        return self._batch(self.read, device) | {
            "mixes": self.mixes.repeat_interleave(self.n, 0).to(device)
        }

    def reference_batch(self, device: Any) -> dict[str, Tensor]:
        """The same for the reference, without the mixes."""
        return self._batch(self.plain, device)

    def _batch(self, prompts: Sequence[list[int]], device: Any) -> dict[str, Tensor]:
        each = [ids for ids in prompts for _ in range(self.n)]
        rows = [[*ids, *own] for ids, own in zip(each, self.responses, strict=True)]
        input_ids, attention_mask = right_pad(rows)
        labels = right_pad(self.responses, IGNORED)[0]
        found = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        found["starts"] = torch.tensor([len(ids) for ids in each])
        return {name: x.to(device) for name, x in found.items()}

    def figures(self, log_ratios: Tensor) -> Tensor:
        """``[responses, 5 + rewards]``: return, reward, KL, length, finished, and each reward."""
        kl = self.kl.repeat_interleave(self.n)
        rewards, ratios = self.rewards, log_ratios.to(self.scores)
        lengths = torch.tensor([float(len(ids)) for ids in self.responses])
        each = ((1 - kl) * rewards - kl * ratios, rewards, ratios, lengths, self.finished.float())
        return torch.cat([torch.stack(each, 1), self.scores], 1)
