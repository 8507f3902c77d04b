"""Losses that train value heads, of the values of a response's tokens and its reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, check_dtype, check_place, check_rows, constant, wide

__all__ = ["cd_q", "expected_value", "fudge"]


def fudge(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """CD-FUDGE: ``sum_t (V_t - r)^2 / 2`` of a response that the base wrote.

    ``V_t`` is the value of its first t tokens and r the reward of all of it. The values of a
    beginning that go with the least loss are the mean reward of what the base makes of it.

    Args:
        values: ``[rows, T]``, of each token's beginning, the token itself included.
        rewards: ``[rows]``.
        lengths: int64 or int32 ``[rows]``, within [1, T]: later values are padding.

    Returns:
        ``[rows]``.

    Source: FUDGE is Yang and Klein's, arXiv:2104.05218; with squares, CD-FUDGE of Mudgal et al.,
    arXiv:2310.17022.
    """
    _check_values(values, rewards, lengths)
    return _half_squares(wide(values), constant(rewards)[:, None], lengths)


def cd_q(values: Tensor, expected: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """CD-Q: ``sum_t (V_t - target_t)^2 / 2``, the target the value of one more token of the base.

    ``target_t = sum_z p_base(z | y_1 .. y_t) V(y_1 .. y_t, z)``, and the reward at the last token,
    which is EOS. No gradient goes to targets.

    Args:
        values, rewards, lengths: as in `fudge`, of responses that ended.
        expected: ``[rows, T]``: the targets before the last token, by `expected_value` of a Q-head,
            or the value after a sampled next token. Those from the last token on are not read.

    Returns:
        ``[rows]``.

    Source: Mudgal et al., arXiv:2310.17022.
    """
    _check_values(values, rewards, lengths)
    check_dtype("expected", expected, FLOATS)
    check_place("expected", expected, tuple(values.shape), values)
    at = torch.arange(values.shape[1], device=values.device)
    target = torch.where(at < lengths[:, None] - 1, constant(expected), constant(rewards)[:, None])
    return _half_squares(wide(values), target, lengths)


def expected_value(logits: Tensor, q: Tensor) -> Tensor:
    """``sum_z softmax(logits)[z] q[z]``: what a Q-head expects of the next token.

    Args:
        logits: ``[..., V]`` of the base; -inf removes a token, whatever its value.
        q: ``[..., V]`` of the Q-head at the same position.

    Returns:
        ``[...]``.
    """
    check_dtype("logits", logits, FLOATS)
    check_dtype("q", q, FLOATS)
    if q.dim() == 0:
        raise ValueError("q has shape []; it must have at least 1 dimension")
    check_place("logits", logits, tuple(q.shape), q)
    p = wide(logits).softmax(dim=-1)
    return (p * wide(q).masked_fill(p == 0, 0.0)).sum(dim=-1)


def _half_squares(values: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    # before the square: padding may be NaN, and has no gradient
    return 0.5 * (values - target).masked_fill(~inside, 0.0).square().sum(dim=1)


def _check_values(values: Any, rewards: Any, lengths: Any) -> None:
    check_dtype("values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(
            f"values has shape {list(values.shape)}; it must be [rows, T], T at least 1"
        )
    check_rows("rewards", rewards, like=values[:, 0])
    check_rows("lengths", lengths, INTEGERS, like=values[:, 0])
