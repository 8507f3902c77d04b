"""Losses that train language models on preferences and rewards, and value heads on rewards.

Each is a small function of log-probs or values, wherever these come from. It gives one loss for
each pair (or row) and does not reduce them: means, sums and weights are up to the caller. A
log-prob is a natural logarithm, summed over the tokens of a response. In the formulas ``s`` is the
log-ratio ``log pi - log pi_ref`` of a response, ``delta`` is ``s_chosen - s_rejected``, and ``l``
is the mean log-prob of the tokens of a response.

Inputs may be float32, float64, bfloat16 or float16. Losses are computed and returned in float32, or
in float64 if an input is float64. Log-probs should be summed in float32: losses are about small
differences of large sums, and a bfloat16 sum has rounded these away. No gradient goes to
references, rewards or KL estimates.

A wrong hyperparameter, or a tensor of a wrong type, dtype, shape or device, is a TypeError or a
ValueError that names the argument, what it was and what it must be. The numbers inside of tensors
are not checked.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import batches, pairs, policy_gradient, preferences, responses, values
from .batches import *  # noqa: F403
from .pairs import *  # noqa: F403
from .policy_gradient import *  # noqa: F403
from .preferences import *  # noqa: F403
from .responses import *  # noqa: F403
from .values import *  # noqa: F403

# The losses that take pairs and numbers alone, by the names that TRL has for them. A file of
# settings names its loss, so that no code comes out of a file.
PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        preferences.sigmoid,
        preferences.sigmoid_norm,
        preferences.ipo,
        preferences.hinge,
        preferences.robust,
        preferences.discopop,
        preferences.apo_zero,
        preferences.apo_down,
        preferences.nca_pair,
        preferences.exo_pair,
        preferences.sppo_hard,
        batches.bco_pair,
        batches.aot,
        batches.aot_unpaired,
        preferences.orpo,
        preferences.simpo,
    )
}

__all__ = [
    "PAIR_LOSSES",
    *batches.__all__,
    *pairs.__all__,
    *policy_gradient.__all__,
    *preferences.__all__,
    *responses.__all__,
    *values.__all__,
]


def __dir__() -> list[str]:
    return sorted(__all__)
