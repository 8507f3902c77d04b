"""Losses of pairs of responses to the same prompt, one of which is preferred to the other.

The loss of a pair depends on this pair alone; `batches` has losses of which that is not so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check_dtype, check_place, constant, not_negative, positive, smoothing
from .pairs import Pairs

__all__ = [
    "apo_down",
    "apo_zero",
    "discopop",
    "exo_pair",
    "hinge",
    "ipo",
    "modpo",
    "nca_pair",
    "orpo",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
]


def sigmoid(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: ``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``.

    Args:
        beta: the strength of the KL penalty that keeps the policy near the reference.
        label_smoothing: eps, the share of labels that are assumed to be flipped, within [0, 0.5).

    Source: Rafailov et al., arXiv:2305.18290, eq. 7; the smoothing is Mitchell's conservative DPO.
    """
    eps = smoothing(label_smoothing)
    x = positive("beta", beta) * pairs.delta
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def sigmoid_norm(pairs: Pairs, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: ``-log sigmoid(beta (m_chosen - m_rejected))``.

    ``m = s / length`` is the mean log-ratio of a token, so that no response gains by being long.

    Args:
        beta: the scale of the mean log-ratios. It is larger than in DPO, because means are smaller
            than sums; 5 is the paper's.

    Source: Lambert et al. (Tulu 3), arXiv:2411.15124, section 5.
    """
    beta = positive("beta", beta)
    chosen, rejected = pairs.mean_log_ratios
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """IPO: ``(s_chosen / len_chosen - s_rejected / len_rejected - 1 / (2 beta))^2``.

    Log-ratios are divided by lengths, as implementations of IPO do; with all lengths 1 the loss is
    the paper's. It aims at a margin that is finite, so probabilities are not pushed to 0 even where
    labels never disagree.

    Args:
        beta: the strength of the KL penalty, the paper's tau. The margin is ``1 / (2 beta)``.

    Source: Azar et al., arXiv:2310.12036, eq. 17.
    """
    margin = 1 / (2 * positive("beta", beta))
    chosen, rejected = pairs.mean_log_ratios
    return (chosen - rejected - margin).square()


def hinge(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Hinge: ``max(0, 1 - beta delta)``. At the kink the gradient is 0.

    Args:
        beta: a pair no longer counts once its delta is ``1 / beta`` or more.

    Source: SLiC-HF, Zhao et al., arXiv:2305.10425; on log-ratios, Liu et al., arXiv:2309.06657.
    """
    return F.relu(1 - positive("beta", beta) * pairs.delta)


def robust(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: ``((1 - eps) f(delta) - eps f(-delta)) / (1 - 2 eps)``, with f as below.

    ``f(x) = -log sigmoid(beta x)`` is the loss of DPO. If a share eps of the labels is flipped at
    random, the expected loss is that of DPO on the true labels. The loss of a single pair has no
    lower bound.

    Args:
        beta: the strength of the KL penalty that keeps the policy near the reference.
        label_smoothing: eps, the share of labels that are flipped, within [0, 0.5).

    Source: Chowdhury et al., arXiv:2403.00409.
    """
    eps = smoothing(label_smoothing)
    x = positive("beta", beta) * pairs.delta
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


def discopop(pairs: Pairs, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """DiscoPOP: ``(1 - m) (-log sigmoid(x)) + m exp(-x)``, with ``x = beta delta``.

    The share ``m = sigmoid(x / tau)`` leads from DPO's loss, of pairs that the policy has wrong, to
    an exponential one, of pairs that it has right. The loss was found by a search over programs;
    near x = 0 it is not convex.

    Args:
        beta: the strength of the KL penalty that keeps the policy near the reference.
        tau: over which range of x the share changes, within (0, 1]. Above 1 the exponential would
            outgrow the share, and the loss of a wrong pair would have no bound that floats hold.

    Source: Lu et al., arXiv:2406.08414, eq. 5.
    """
    x = positive("beta", beta) * pairs.delta
    tau = positive("tau", tau)
    if tau > 1:
        raise ValueError(f"tau is {tau}; it must be within (0, 1]")
    # m exp(-x) is one exponential, because exp(-x) alone is infinite where m is 0
    exponential = torch.exp(F.logsigmoid(x / tau) - x)
    return -torch.sigmoid(-x / tau) * F.logsigmoid(x) + exponential


def apo_zero(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-zero: ``1 - sigmoid(beta s_chosen) + sigmoid(beta s_rejected)``.

    It is meant for chosen responses that are better than what the policy writes: it makes them more
    likely, and the rejected ones less likely.

    Args:
        beta: the larger it is, the smaller the log-ratio at which the loss saturates.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 7.
    """
    beta = positive("beta", beta)
    chosen, rejected = pairs.log_ratios
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-down: ``sigmoid(beta s_chosen) + 1 - sigmoid(beta delta)``.

    It is meant for chosen responses that are worse than what the policy writes: it makes both less
    likely, the rejected ones more so.

    Args:
        beta: the larger it is, the smaller the log-ratio at which the loss saturates.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 8.
    """
    beta = positive("beta", beta)
    return torch.sigmoid(beta * pairs.log_ratios[0]) + torch.sigmoid(-beta * pairs.delta)


def nca_pair(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """NCA: ``-log sigmoid(a) - (log sigmoid(-a) + log sigmoid(-b)) / 2``, a and b as below.

    ``a = beta s_chosen`` and ``b = beta s_rejected``. It aims at ``sigmoid(a) = 2/3``, so that the
    chosen response does not become less likely along with the rejected one.

    Args:
        beta: the scale of the rewards, the paper's temperature alpha.

    Source: Chen et al., arXiv:2402.05369.
    """
    beta = positive("beta", beta)
    a, b = (beta * s for s in pairs.log_ratios)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def exo_pair(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: the reverse KL divergence of ``(q, 1 - q)`` from the labels' ``(1 - eps, eps)``.

    That is ``q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps)``, where q stands for
    ``sigmoid(beta delta)``.

    Args:
        beta: the strength of the KL penalty that keeps the policy near the reference.
        label_smoothing: eps, the share of labels that are assumed to be flipped, within (0, 0.5).
            At 0 the divergence would be infinite: TRL reads 0 as 1e-3, here it is an error.

    Source: Ji et al., arXiv:2402.00856, eq. 16.
    """
    eps = smoothing(label_smoothing)
    if eps == 0:
        raise ValueError("label_smoothing is 0.0; it must be above 0, and below 0.5")
    x = positive("beta", beta) * pairs.delta
    # q and 1 - q are written as exp(log q), because then gradients are precise even where one of
    # the two rounds to 1
    log_q, log_not_q = F.logsigmoid(x), F.logsigmoid(-x)
    flipped = log_not_q.exp() * (log_not_q - math.log(eps))
    return log_q.exp() * (log_q - math.log1p(-eps)) + flipped


def sppo_hard(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels: ``(s_chosen - 1 / (2 beta))^2 + (s_rejected + 1 / (2 beta))^2``.

    The reference is the policy of the iteration before.

    Args:
        beta: one over the paper's step size eta.

    Source: Wu et al., arXiv:2405.00675.
    """
    margin = 1 / (2 * positive("beta", beta))
    chosen, rejected = pairs.log_ratios
    return (chosen - margin).square() + (rejected + margin).square()


def orpo(pairs: Pairs, lam: float = 0.1) -> Tensor:
    """ORPO: ``-l_chosen - lam log sigmoid(o_chosen - o_rejected)``, ``o = l - log(1 - e^l)``.

    The first part makes the chosen response likely, the second makes its odds larger than those of
    the rejected one. There is no reference. Both parts are of mean log-probs of responses, as in
    the paper; in TRL the first part counts the prompt's tokens too, and `lam` is called beta. Where
    ``1 - e^l`` would round to 0, the odds stop growing.

    Args:
        lam: the weight of the second part.

    Source: Hong et al., arXiv:2403.07691, eq. 6.
    """
    lam = positive("lam", lam)
    chosen, rejected = pairs.means
    return -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean: Tensor) -> Tensor:
    # expm1 is precise near l = 0. Far below 0 log(1 - e^l) is not, but too small to matter.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: ``-log sigmoid(beta (l_chosen - l_rejected) - gamma)``. There is no reference.

    Args:
        beta: the scale of the mean log-probs. It is larger than in DPO, because means are smaller
            than sums.
        gamma: the margin by which the chosen response should lead, 0 or more.

    Source: Meng et al., arXiv:2405.14734, eq. 6.
    """
    beta, gamma = positive("beta", beta), not_negative("gamma", gamma)
    chosen, rejected = pairs.means
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def modpo(
    pairs: Pairs,
    margins: Tensor,
    weight: float,
    other_weights: Sequence[float],
    beta: float = 0.1,
) -> Tensor:
    """MODPO: ``-log sigmoid((beta delta - sum_i other_weights[i] margins[:, i]) / weight)``.

    It is DPO on the preferences of one objective, with the rewards of other objectives traded off
    against it. With weight 1 and no other objectives it is DPO.

    Args:
        margins: ``[pairs, others]``: how much higher the reward of each other objective is for the
            chosen response than for the rejected one.
        weight: the weight of the objective that the preferences are of, above 0.
        other_weights: the weights of the other objectives, 0 or more. In the paper they sum to 1
            together with `weight`.
        beta: the strength of the KL penalty that keeps the policy near the reference.

    Source: Zhou et al., arXiv:2310.03708.
    """
    beta, weight = positive("beta", beta), positive("weight", weight)
    if not isinstance(other_weights, (list, tuple)):
        raise TypeError(f"other_weights is a {type(other_weights).__name__}; it must be a list")
    others = [not_negative(f"other_weights[{i}]", w) for i, w in enumerate(other_weights)]
    check_dtype("margins", margins, FLOATS)
    check_place("margins", margins, (len(pairs.chosen), len(others)), pairs.chosen)
    x = beta * pairs.delta
    for w, margin in zip(others, constant(margins).unbind(1), strict=True):
        x = x - w * margin
    return -F.logsigmoid(x / weight)
