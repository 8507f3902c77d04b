"""Losses of single responses, which are labelled good or bad, or are simply imitated."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    check_dtype,
    check_place,
    check_rows,
    constant,
    not_negative,
    positive,
    wide,
)

__all__ = ["kto", "kto_z0", "sft"]


def kto(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    labels: Tensor,
    z0: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, a loss of single responses that are labelled good or bad.

    It is ``desirable_weight (1 - sigmoid(beta (s - z0)))`` where the label is True, and
    ``undesirable_weight (1 - sigmoid(beta (z0 - s)))`` where it is False.

    Args:
        log_probs, ref_log_probs: ``[rows]`` log-probs under the policy and under the reference.
        labels: bool ``[rows]``, whether the response is desirable.
        z0: the estimate of the KL divergence that `kto_z0` makes, or 0 to leave it out.
        beta: the larger it is, the smaller the log-ratio at which the loss saturates in either
            direction. The paper reads it as an aversion to risk.
        desirable_weight, undesirable_weight: should be set so that ``weight * rows`` is about equal
            for the two labels.

    Returns:
        ``[rows]``.

    Source: Ethayarajh et al., arXiv:2402.01306.
    """
    check_rows("log_probs", log_probs)
    check_rows("ref_log_probs", ref_log_probs, like=log_probs)
    check_rows("labels", labels, (torch.bool,), like=log_probs)
    beta = positive("beta", beta)
    desirable = positive("desirable_weight", desirable_weight)
    undesirable = positive("undesirable_weight", undesirable_weight)
    if isinstance(z0, Tensor):
        check_dtype("z0", z0, FLOATS)
        check_place("z0", z0, (), log_probs)
        z0 = constant(z0)
    else:
        z0 = not_negative("z0", z0)
    x = beta * (wide(log_probs) - constant(ref_log_probs) - z0)
    return torch.where(labels, desirable * torch.sigmoid(-x), undesirable * torch.sigmoid(x))


def kto_z0(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KTO's estimate of the KL divergence from the reference: ``max(0, mean(s))``, no gradient.

    Args:
        log_probs, ref_log_probs: ``[rows]`` log-probs of mismatched pairs, each a prompt with a
            response to another prompt. There must be at least one. Where several processes train,
            the rows of all should be gathered first, as the mean comes before the maximum.

    Returns:
        ``[]``.

    Source: Ethayarajh et al., arXiv:2402.01306.
    """
    check_rows("log_probs", log_probs)
    check_rows("ref_log_probs", ref_log_probs, like=log_probs)
    if len(log_probs) == 0:
        raise ValueError("log_probs has shape [0]; it must have at least 1 row")
    return (constant(log_probs) - constant(ref_log_probs)).mean().clamp(min=0)


def sft(log_probs: Tensor) -> Tensor:
    """Supervised fine-tuning: ``-log pi``, the negative log-likelihood of each response.

    The token-mean cross-entropy of a batch is ``sft(log_probs).sum() / lengths.sum()``.

    Args:
        log_probs: ``[rows]`` log-probs under the policy.

    Returns:
        ``[rows]``.
    """
    check_rows("log_probs", log_probs)
    return -wide(log_probs)
