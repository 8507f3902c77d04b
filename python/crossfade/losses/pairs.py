"""Pairs of responses, which losses of preferences are computed of, and what a pair weighs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import INTEGERS, check_rows, constant, wide

__all__ = ["Pairs", "wpo_weights"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of responses: how likely the policy and the reference find each.

    Args:
        chosen, rejected: ``[pairs]`` log-probs of the responses under the policy.
        ref_chosen, ref_rejected: ``[pairs]`` log-probs of the responses under the reference. Losses
            that have no reference (`orpo`, `simpo`) do not need them.
        chosen_lengths, rejected_lengths: int64 or int32 ``[pairs]``, how many tokens each response
            has, at least 1. Only losses of means over tokens (`ipo`, `sigmoid_norm`, `orpo`,
            `simpo`) and `wpo_weights` need them.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        check_rows("chosen", self.chosen)
        check_rows("rejected", self.rejected, like=self.chosen)
        for name in ("ref_chosen", "ref_rejected"):
            if getattr(self, name) is not None:
                check_rows(name, getattr(self, name), like=self.chosen)
        for name in ("chosen_lengths", "rejected_lengths"):
            if getattr(self, name) is not None:
                check_rows(name, getattr(self, name), INTEGERS, like=self.chosen)

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of the chosen and of the rejected responses, no gradient."""
        return constant(self._needed("ref_chosen")), constant(self._needed("ref_rejected"))

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``s`` of the chosen and of the rejected responses, ``[pairs]`` each."""
        ref_chosen, ref_rejected = self.references
        return wide(self.chosen) - ref_chosen, wide(self.rejected) - ref_rejected

    @property
    def delta(self) -> Tensor:
        """How much more than the reference the policy prefers the chosen response, ``[pairs]``."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def mean_log_ratios(self) -> tuple[Tensor, Tensor]:
        """``s`` over the tokens of each response, ``[pairs]`` each."""
        (chosen, rejected), (chosen_lengths, rejected_lengths) = self.log_ratios, self.lengths
        return chosen / chosen_lengths, rejected / rejected_lengths

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """``l`` of the chosen and of the rejected responses, ``[pairs]`` each."""
        chosen_lengths, rejected_lengths = self.lengths
        return wide(self.chosen) / chosen_lengths, wide(self.rejected) / rejected_lengths

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Lengths of the chosen and of the rejected responses, ``[pairs]`` each."""
        return self._needed("chosen_lengths"), self._needed("rejected_lengths")

    def _needed(self, name: str) -> Tensor:
        if getattr(self, name) is None:
            raise ValueError(f"{name} is None; it must be given for this loss")
        return getattr(self, name)


def wpo_weights(
    pairs: Pairs, chosen_level: Tensor | None = None, rejected_level: Tensor | None = None
) -> Tensor:
    """WPO: how much each pair counts, ``w(chosen) w(rejected)``. Multiply the losses by it.

    ``w = exp((log pi - level) / length)`` is the mean likelihood of a token under the policy of
    now, beside what the policy gives to tokens that it draws itself. Pairs that the policy would
    hardly write count little, so that training on responses of another model comes near to
    training on the policy's own. No gradient goes to the weights.

    Args:
        pairs: with `chosen_lengths` and `rejected_lengths`.
        chosen_level, rejected_level: ``[pairs]``: the sum, over the tokens of each response, of the
            log of what a token's likelihood is measured by. It is ``log sum_v pi(v)^2``, the
            expected likelihood of a draw, in the paper's sampled alignment, and ``log max_v pi(v)``
            in its greedy one. Without them it is 0: weights are likelihoods alone.

    Returns:
        ``[pairs]``. They may be used with any loss of a pair, but not with `aot` and
        `aot_unpaired`, whose entries are not of one pair.

    Source: Zhou et al., arXiv:2406.11827, eq. 2 and section 3.
    """
    log_weight = torch.zeros_like(constant(pairs.chosen))
    for name, level, mean, length in zip(
        ("chosen_level", "rejected_level"),
        (chosen_level, rejected_level),
        pairs.means,
        pairs.lengths,
        strict=True,
    ):
        log_weight = log_weight + mean.detach()
        if level is not None:
            check_rows(name, level, like=pairs.chosen)
            log_weight = log_weight - constant(level) / length
    return log_weight.exp()
