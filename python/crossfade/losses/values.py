"""Losses that train value heads: of the values at the tokens of a response, and its reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, check_dtype, check_place, check_rows, constant, wide

__all__ = ["cd_q", "expected_value", "fudge"]


def fudge(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """CD-FUDGE: ``sum_t (V_t - r)^2 / 2`` of a response that the base wrote.

    ``V_t`` is the value of the first t tokens of the response and r the reward of all of it. The
    loss is least when the value of every beginning is the mean reward of the responses that the
    base makes of it.

    Args:
        values: ``[rows, T]``: entry t is the value of the response up to token t, token t included.
        rewards: ``[rows]``, one for each response.
        lengths: int64 or int32 ``[rows]``, how many tokens each response has, within [1, T]. Values
            past a response's length are padding.

    Returns:
        ``[rows]``.

    Source: FUDGE is Yang and Klein's, arXiv:2104.05218; with squares, CD-FUDGE of Mudgal et al.,
    arXiv:2310.17022.
    """
    _check_values(values, rewards, lengths)
    return _half_squares(wide(values), constant(rewards)[:, None], lengths)


def cd_q(values: Tensor, expected: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """CD-Q: ``sum_t (V_t - target_t)^2 / 2``: a value learns from the value one token later.

    The target is what the base can expect of its next token,
    ``target_t = sum_z p_base(z | y_1 .. y_t) V(y_1 .. y_t, z)``. At the last token, which is EOS,
    it is the reward. No gradient goes to targets.

    Args:
        values, rewards, lengths: as in `fudge`, of responses that ended by themselves.
        expected: ``[rows, T]``: the targets of the tokens before the last one, either from
            `expected_value` of a Q-head or the value after the next token that was sampled. Entries
            from the last token on are not read.

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
    """``sum_z softmax(logits)[z] q[z]``: the mean of q over the next tokens of the base.

    Args:
        logits: ``[..., V]`` of the base. A token with -inf is left out, whatever its value.
        q: ``[..., V]``, the values that the Q-head gives at the same position.

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
    # padding may be NaN, so it is masked before the square and not after it
    return 0.5 * (values - target).masked_fill(~inside, 0.0).square().sum(dim=1)


def _check_values(values: Any, rewards: Any, lengths: Any) -> None:
    check_dtype("values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(
            f"values has shape {list(values.shape)}; it must be [rows, T], T at least 1"
        )
    check_rows("rewards", rewards, like=values[:, 0])
    check_rows("lengths", lengths, INTEGERS, like=values[:, 0])
