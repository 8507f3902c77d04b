"""Losses of preferences that look at all pairs of a batch together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number
from .checks import FLOATS, check_dtype, check_place, constant, positive, smoothing, wide
from .pairs import Pairs

__all__ = ["aot", "aot_unpaired", "bco_pair", "bco_shift"]


def aot(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT of pairs: DPO's loss, as `sigmoid` has it, of quantiles in the place of pairs.

    Its ``delta_i`` is the i-th smallest ``log pi(chosen) - log pi(rejected)`` of the batch less the
    i-th smallest of the reference's. So the policy's margins should exceed the reference's as
    distributions (stochastic dominance), and not pair by pair.

    Args:
        beta: the strength of the KL penalty that keeps the policy near the reference.
        label_smoothing: eps, the share of labels that are assumed to be flipped, within [0, 0.5).

    Returns:
        ``[pairs]``: entry i is of the i-th quantile, and of no pair alone. A batch should hold many
        pairs: with one, the loss is that of `sigmoid`.

    Source: Melnyk et al., arXiv:2406.05882.
    """
    ref_chosen, ref_rejected = pairs.references
    margins = wide(pairs.chosen) - wide(pairs.rejected)
    return _of_quantiles(margins, ref_chosen - ref_rejected, beta, label_smoothing)


def aot_unpaired(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT of single responses: as `aot`, with the i-th smallest ``s`` of either kind.

    Its ``delta_i`` is the i-th smallest ``s_chosen`` of the batch less the i-th smallest
    ``s_rejected``. Which chosen response belongs to which rejected one makes no difference.

    Args:
        beta, label_smoothing: as in `aot`.

    Returns:
        ``[pairs]``: entry i is of the i-th quantile, and of no pair alone.

    Source: Melnyk et al., arXiv:2406.05882.
    """
    return _of_quantiles(*pairs.log_ratios, beta, label_smoothing)


def _of_quantiles(high: Tensor, low: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss of ``delta_i``, the i-th smallest of `high` less the i-th smallest of `low`."""
    eps = smoothing(label_smoothing)
    x = positive("beta", beta) * (high.sort().values - low.sort().values)
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def bco_pair(pairs: Pairs, beta: float = 0.1, shift: Tensor | float = 0.0) -> Tensor:
    """BCO of pairs: ``-log sigmoid(beta s_chosen - shift) - log sigmoid(shift - beta s_rejected)``.

    A classifier learns which responses are good by their rewards, ``beta s``. The shift is where it
    separates the two kinds.

    Args:
        beta: the scale of the rewards.
        shift: the mean reward, a number or ``[]``. In the paper it is a moving average over batches
            of what `bco_shift` gives, which the caller keeps: ``shift = 0.9 * shift + 0.1 *
            bco_shift(pairs)``, say. No gradient goes to it. At 0 nothing is shifted.

    Source: Jung et al., arXiv:2404.04656.
    """
    beta = positive("beta", beta)
    if isinstance(shift, Tensor):
        check_dtype("shift", shift, FLOATS)
        check_place("shift", shift, (), pairs.chosen)
        shift = constant(shift)
    else:
        shift = check_number("shift", shift)
    chosen, rejected = pairs.log_ratios
    return -F.logsigmoid(beta * chosen - shift) - F.logsigmoid(shift - beta * rejected)


def bco_shift(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """BCO's shift by one batch: the mean reward of its responses, ``beta s``. It has no gradient.

    Args:
        beta: the scale of the rewards, as in `bco_pair`.

    Returns:
        ``[]``.

    Raises:
        ValueError: there are no pairs.

    Source: Jung et al., arXiv:2404.04656.
    """
    if len(pairs.chosen) == 0:
        raise ValueError("chosen has shape [0]; it must have at least 1 row")
    return positive("beta", beta) * torch.cat(pairs.log_ratios).detach().mean()
