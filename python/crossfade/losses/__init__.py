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

from . import preferences, responses, values
from .preferences import *  # noqa: F403
from .responses import *  # noqa: F403
from .values import *  # noqa: F403

__all__ = [*preferences.__all__, *responses.__all__, *values.__all__]


def __dir__() -> list[str]:
    return sorted(__all__)
