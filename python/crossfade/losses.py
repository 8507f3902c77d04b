"""Losses: of preferences, small functions of log-probs wherever these come from, and of values.

Each gives one loss a pair (or a row), not reduced, so that means, sums and weights are the
caller's. Log-probs are natural, summed over the tokens of a response. Below, ``s`` is the log-ratio
``log pi - log pi_ref`` of a response, ``delta = s_chosen - s_rejected``, and ``l`` is the mean
log-prob of a response's tokens.

Inputs may be float32, float64, bfloat16 or float16. All is computed in float32, or in float64 where
an input has it, and so is the result. A sum of log-probs in bfloat16 has lost most of what a loss
is after: sum in float32. No gradient goes to references, rewards or KL estimates.

Hyperparameters are checked: a wrong one is a TypeError or a ValueError that names it, what it was
and what it must be, and so is a tensor that does not fit. Contents of tensors are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import check_number

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of responses: what the policy and the reference make of them.

    Args:
        chosen, rejected: ``[pairs]`` log-probs under the policy.
        ref_chosen, ref_rejected: ``[pairs]`` log-probs under the reference. Losses without one
            (`orpo`, `simpo`) do not need them.
        chosen_lengths, rejected_lengths: int64 or int32 ``[pairs]``, tokens of the responses, at
            least 1. Losses of means (`ipo`, `orpo`, `simpo`) need them.

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
        _check_rows("chosen", self.chosen)
        _check_rows("rejected", self.rejected, like=self.chosen)
        for name in ("ref_chosen", "ref_rejected"):
            if getattr(self, name) is not None:
                _check_rows(name, getattr(self, name), like=self.chosen)
        for name in ("chosen_lengths", "rejected_lengths"):
            if getattr(self, name) is not None:
                _check_rows(name, getattr(self, name), INTEGERS, like=self.chosen)

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``s`` of the chosen and of the rejected responses, ``[pairs]`` each."""
        chosen = _wide(self.chosen) - _constant(self._needed("ref_chosen"))
        rejected = _wide(self.rejected) - _constant(self._needed("ref_rejected"))
        return chosen, rejected

    @property
    def delta(self) -> Tensor:
        """How much more than the reference the policy prefers the chosen response, ``[pairs]``."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """``l`` of the chosen and of the rejected responses, ``[pairs]`` each."""
        chosen_lengths, rejected_lengths = self.lengths
        return _wide(self.chosen) / chosen_lengths, _wide(self.rejected) / rejected_lengths

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Both lengths, for losses that must have them."""
        return self._needed("chosen_lengths"), self._needed("rejected_lengths")

    def _needed(self, name: str) -> Tensor:
        if getattr(self, name) is None:
            raise ValueError(f"{name} is None; it must be given for this loss")
        return getattr(self, name)


def sigmoid(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: ``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``.

    Args:
        beta: strength of the KL penalty towards the reference.
        label_smoothing: eps, the share of labels taken to be flipped, within [0, 0.5).

    Source: Rafailov et al., arXiv:2305.18290, eq. 7; the smoothing is Mitchell's conservative DPO.
    """
    eps = _smoothing(label_smoothing)
    x = _positive("beta", beta) * pairs.delta
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def ipo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """IPO: ``(s_chosen / len_chosen - s_rejected / len_rejected - 1 / (2 beta))^2``.

    Per token, as its implementations have it; the paper's sums are lengths of 1. The margin that it
    aims at is finite, so it does not push probabilities to 0 where labels never disagree.

    Args:
        beta: strength of the KL penalty, the paper's tau: the margin is ``1 / (2 beta)``.

    Source: Azar et al., arXiv:2310.12036, eq. 17.
    """
    margin = 1 / (2 * _positive("beta", beta))
    (chosen, rejected), (chosen_lengths, rejected_lengths) = pairs.log_ratios, pairs.lengths
    return (chosen / chosen_lengths - rejected / rejected_lengths - margin).square()


def hinge(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Hinge: ``max(0, 1 - beta delta)``. At the kink the gradient is 0.

    Args:
        beta: one over the margin at which a pair no longer counts.

    Source: SLiC-HF, Zhao et al., arXiv:2305.10425; on log-ratios, Liu et al., arXiv:2309.06657.
    """
    return F.relu(1 - _positive("beta", beta) * pairs.delta)


def robust(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: ``((1 - eps) f(delta) - eps f(-delta)) / (1 - 2 eps)``, with f as below.

    ``f(x) = -log sigmoid(beta x)`` is DPO's. Where labels are flipped at a rate of eps, the mean is
    DPO's on the true ones. One pair's loss has no lower bound.

    Args:
        beta: strength of the KL penalty towards the reference.
        label_smoothing: eps, the rate of flipped labels, within [0, 0.5).

    Source: Chowdhury et al., arXiv:2403.00409.
    """
    eps = _smoothing(label_smoothing)
    x = _positive("beta", beta) * pairs.delta
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


def apo_zero(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-zero: ``1 - sigmoid(beta s_chosen) + sigmoid(beta s_rejected)``.

    For chosen responses better than the policy's own: they go up, the rejected ones down.

    Args:
        beta: how soon a log-ratio saturates.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 7.
    """
    beta = _positive("beta", beta)
    chosen, rejected = pairs.log_ratios
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-down: ``sigmoid(beta s_chosen) + 1 - sigmoid(beta delta)``.

    For chosen responses worse than the policy's own: both go down, the rejected ones further.

    Args:
        beta: how soon a log-ratio saturates.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 8.
    """
    beta = _positive("beta", beta)
    return torch.sigmoid(beta * pairs.log_ratios[0]) + torch.sigmoid(-beta * pairs.delta)


def nca_pair(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """NCA: ``-log sigmoid(a) - (log sigmoid(-a) + log sigmoid(-b)) / 2``, a and b as below.

    ``a = beta s_chosen`` and ``b = beta s_rejected``. It aims at ``sigmoid(a) = 2/3``, which keeps
    the chosen response's likelihood from falling along with the rejected one's.

    Args:
        beta: scale of the rewards, the paper's temperature alpha.

    Source: Chen et al., arXiv:2402.05369.
    """
    beta = _positive("beta", beta)
    a, b = (beta * s for s in pairs.log_ratios)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def exo_pair(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: the reverse KL divergence of ``(q, 1 - q)`` from the labels' ``(1 - eps, eps)``.

    ``q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps)``, ``q = sigmoid(beta delta)``.

    Args:
        beta: strength of the KL penalty towards the reference.
        label_smoothing: eps, the share of labels taken to be flipped, within (0, 0.5): at 0 the
            divergence is infinite. TRL takes 0 for 1e-3; here it is an error.

    Source: Ji et al., arXiv:2402.00856, eq. 16.
    """
    eps = _smoothing(label_smoothing)
    if eps == 0:
        raise ValueError("label_smoothing is 0.0; it must be above 0, and below 0.5")
    x = _positive("beta", beta) * pairs.delta
    # as exp(log q), q and 1 - q have gradients that keep their digits where they round to 1
    log_q, log_not_q = F.logsigmoid(x), F.logsigmoid(-x)
    flipped = log_not_q.exp() * (log_not_q - math.log(eps))
    return log_q.exp() * (log_q - math.log1p(-eps)) + flipped


def sppo_hard(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels: ``(s_chosen - 1 / (2 beta))^2 + (s_rejected + 1 / (2 beta))^2``.

    Args:
        beta: one over the paper's step size eta; the reference is the last iteration's policy.

    Source: Wu et al., arXiv:2405.00675.
    """
    margin = 1 / (2 * _positive("beta", beta))
    chosen, rejected = pairs.log_ratios
    return (chosen - margin).square() + (rejected + margin).square()


def orpo(pairs: Pairs, lam: float = 0.1) -> Tensor:
    """ORPO: ``-l_chosen - lam log sigmoid(o_chosen - o_rejected)``, ``o = l - log(1 - e^l)``.

    The likelihood of the chosen response and, without a reference, the log odds ratio of the two.
    Both are of a response's mean log-prob, as in the paper; TRL's likelihood counts the prompt too,
    and its name for `lam` is beta. Odds stop where ``1 - e^l`` is within rounding of 0.

    Args:
        lam: weight of the odds ratio.

    Source: Hong et al., arXiv:2403.07691, eq. 6.
    """
    lam = _positive("lam", lam)
    chosen, rejected = pairs.means
    return -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean: Tensor) -> Tensor:
    # expm1 has the digits near 0; far below it, log(1 - e^l) may lose its own beside a large l
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: ``-log sigmoid(beta (l_chosen - l_rejected) - gamma)``. No reference.

    Args:
        beta: scale of the mean log-probs; larger than DPO's, as these are not sums.
        gamma: the margin that the chosen response must have, 0 or more.

    Source: Meng et al., arXiv:2405.14734, eq. 6.
    """
    beta, gamma = _positive("beta", beta), _not_negative("gamma", gamma)
    chosen, rejected = pairs.means
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# Of pairs and numbers alone, by TRL's names: settings hold a loss's name, never its code.
PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        ipo,
        hinge,
        robust,
        apo_zero,
        apo_down,
        nca_pair,
        exo_pair,
        sppo_hard,
        orpo,
        simpo,
    )
}


def modpo(
    pairs: Pairs,
    margins: Tensor,
    weight: float,
    other_weights: Sequence[float],
    beta: float = 0.1,
) -> Tensor:
    """MODPO: ``-log sigmoid((beta delta - sum_i other_weights[i] margins[:, i]) / weight)``.

    DPO on the preferences of one objective, in which rewards of the others are traded off. Weight 1
    and no others is DPO.

    Args:
        margins: ``[pairs, others]``, by how much each other objective's reward is higher for the
            chosen response than for the rejected one.
        weight: of the objective whose preferences the pairs are, above 0.
        other_weights: of the others, 0 or more. The paper's weights sum to 1 with `weight`.
        beta: strength of the KL penalty towards the reference.

    Source: Zhou et al., arXiv:2310.03708.
    """
    beta, weight = _positive("beta", beta), _positive("weight", weight)
    if not isinstance(other_weights, (list, tuple)):
        raise TypeError(f"other_weights is a {type(other_weights).__name__}; it must be a list")
    others = [_not_negative(f"other_weights[{i}]", w) for i, w in enumerate(other_weights)]
    _check_dtype("margins", margins, FLOATS)
    _check_place("margins", margins, (len(pairs.chosen), len(others)), pairs.chosen)
    x = beta * pairs.delta
    for w, margin in zip(others, _constant(margins).unbind(1), strict=True):
        x = x - w * margin
    return -F.logsigmoid(x / weight)


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

    ``desirable_weight (1 - sigmoid(beta (s - z0)))`` where the label is True, else
    ``undesirable_weight (1 - sigmoid(beta (z0 - s)))``.

    Args:
        log_probs, ref_log_probs: ``[rows]`` under the policy and under the reference.
        labels: bool ``[rows]``, whether the response is desirable.
        z0: the estimate of the KL divergence that `kto_z0` makes, or 0 to leave it out.
        beta: how soon a log-ratio saturates, in both directions: the aversion to risk.
        desirable_weight, undesirable_weight: set them so that ``weight * rows`` of the two labels
            is about equal.

    Returns:
        ``[rows]``.

    Source: Ethayarajh et al., arXiv:2402.01306.
    """
    _check_rows("log_probs", log_probs)
    _check_rows("ref_log_probs", ref_log_probs, like=log_probs)
    _check_rows("labels", labels, (torch.bool,), like=log_probs)
    beta = _positive("beta", beta)
    desirable = _positive("desirable_weight", desirable_weight)
    undesirable = _positive("undesirable_weight", undesirable_weight)
    if isinstance(z0, Tensor):
        _check_dtype("z0", z0, FLOATS)
        _check_place("z0", z0, (), log_probs)
        z0 = _constant(z0)
    else:
        z0 = _not_negative("z0", z0)
    x = beta * (_wide(log_probs) - _constant(ref_log_probs) - z0)
    return torch.where(labels, desirable * torch.sigmoid(-x), undesirable * torch.sigmoid(x))


def kto_z0(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KTO's estimate of the KL divergence from the reference: ``max(0, mean(s))``, no gradient.

    Args:
        log_probs, ref_log_probs: ``[rows]`` of mismatched pairs, prompts with the responses to
            other prompts, at least one. Rows of all processes, gathered: the mean comes first.

    Returns:
        ``[]``.

    Source: Ethayarajh et al., arXiv:2402.01306.
    """
    _check_rows("log_probs", log_probs)
    _check_rows("ref_log_probs", ref_log_probs, like=log_probs)
    if len(log_probs) == 0:
        raise ValueError("log_probs has shape [0]; it must have at least 1 row")
    return (_constant(log_probs) - _constant(ref_log_probs)).mean().clamp(min=0)


def sft(log_probs: Tensor) -> Tensor:
    """Supervised fine-tuning: ``-log pi``, the negative log-likelihood of each response.

    The token-mean cross-entropy of a batch is ``sft(log_probs).sum() / lengths.sum()``.

    Args:
        log_probs: ``[rows]`` under the policy.

    Returns:
        ``[rows]``.
    """
    _check_rows("log_probs", log_probs)
    return -_wide(log_probs)


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
    return _half_squares(_wide(values), _constant(rewards)[:, None], lengths)


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
    _check_dtype("expected", expected, FLOATS)
    _check_place("expected", expected, tuple(values.shape), values)
    at = torch.arange(values.shape[1], device=values.device)
    target = torch.where(
        at < lengths[:, None] - 1, _constant(expected), _constant(rewards)[:, None]
    )
    return _half_squares(_wide(values), target, lengths)


def expected_value(logits: Tensor, q: Tensor) -> Tensor:
    """``sum_z softmax(logits)[z] q[z]``: what a Q-head expects of the next token.

    Args:
        logits: ``[..., V]`` of the base; -inf removes a token, whatever its value.
        q: ``[..., V]`` of the Q-head at the same position.

    Returns:
        ``[...]``.
    """
    _check_dtype("logits", logits, FLOATS)
    _check_dtype("q", q, FLOATS)
    if q.dim() == 0:
        raise ValueError("q has shape []; it must have at least 1 dimension")
    _check_place("logits", logits, tuple(q.shape), q)
    p = _wide(logits).softmax(dim=-1)
    return (p * _wide(q).masked_fill(p == 0, 0.0)).sum(dim=-1)


def _half_squares(values: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    # before the square: padding may be NaN, and has no gradient
    return 0.5 * (values - target).masked_fill(~inside, 0.0).square().sum(dim=1)


def _check_values(values: Any, rewards: Any, lengths: Any) -> None:
    _check_dtype("values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(
            f"values has shape {list(values.shape)}; it must be [rows, T], T at least 1"
        )
    _check_rows("rewards", rewards, like=values[:, 0])
    _check_rows("lengths", lengths, INTEGERS, like=values[:, 0])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _constant(x: Tensor) -> Tensor:
    return _wide(x.detach())


def _positive(name: str, x: Any) -> float:
    number = check_number(name, x)
    if number <= 0:
        raise ValueError(f"{name} is {number}; it must be above 0")
    return number


def _not_negative(name: str, x: Any) -> float:
    number = check_number(name, x)
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    return number


def _smoothing(x: Any) -> float:
    number = check_number("label_smoothing", x)
    if not 0 <= number < 0.5:
        raise ValueError(f"label_smoothing is {number}; it must be within [0, 0.5)")
    return number


def _check_rows(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, like: Tensor | None = None
) -> None:
    _check_dtype(name, x, dtypes)
    if like is not None:
        _check_place(name, x, tuple(like.shape), like)
    elif x.dim() != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have 1 dimension")


def _check_dtype(name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {names}")


def _check_place(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}")
