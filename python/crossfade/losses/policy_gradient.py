"""Losses by which a policy learns from rewards of its own samples."""

from __future__ import annotations

from torch import Tensor

from .checks import FLOATS, check_dtype, check_place, check_rows, constant, wide

__all__ = ["clp", "leave_one_out"]


def leave_one_out(returns: Tensor) -> Tensor:
    """How far each sample's return is above the mean of its prompt's other samples.

    The same in torch: ``returns - (returns.sum(1, keepdim=True) - returns) / (n - 1)``. The others
    say nothing of a sample, so that as a baseline they leave the gradient's mean as it is.

    Args:
        returns: ``[prompts, n]`` with n of at least 2.

    Returns:
        ``[prompts, n]``, no gradient.

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """
    check_dtype("returns", returns, FLOATS)
    if returns.dim() != 2 or returns.shape[1] < 2:
        raise ValueError(
            f"returns has shape {list(returns.shape)}; it must be [prompts, n], n at least 2"
        )
    found = constant(returns)
    n = found.shape[1]
    return (found - found.mean(dim=1, keepdim=True)) * (n / (n - 1))


def clp(log_probs: Tensor, ref_log_probs: Tensor, rewards: Tensor, kl: Tensor) -> Tensor:
    """The policy gradient of a conditioned language policy, with the KL in the reward.

    A sample's return is ``G = (1 - kl) r - kl (log pi - log pi_ref)``, and its loss is ``-A log
    pi``, where A is the return less the mean of those of its prompt's other samples. The mean of
    the loss's gradient over samples is that of ``-((1 - kl) E[r] - kl KL(pi || pi_ref))``.

    Args:
        log_probs, ref_log_probs: ``[prompts, n]`` log-probs of samples under the policy that wrote
            them, at the prompt's weights of rewards, and under the reference.
        rewards: ``[prompts, n]``: of each sample, ``sum_k weights[k] R_k``.
        kl: ``[prompts]``: the KL weight of each prompt, within [0, 1].

    Returns:
        ``[prompts, n]``.

    Source: Wang et al., arXiv:2407.15762, with the baseline of `leave_one_out`.
    """
    check_dtype("log_probs", log_probs, FLOATS)
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs has shape {list(log_probs.shape)}; it must be [prompts, n]")
    for name, x in (("ref_log_probs", ref_log_probs), ("rewards", rewards)):
        check_dtype(name, x, FLOATS)
        check_place(name, x, tuple(log_probs.shape), log_probs)
    check_rows("kl", kl, like=log_probs[:, 0])
    weight = constant(kl)[:, None]
    log_ratios = constant(log_probs) - constant(ref_log_probs)
    returns = (1 - weight) * constant(rewards) - weight * log_ratios
    return -leave_one_out(returns) * wide(log_probs)
