"""Notices a blend whose tokens none of its terms would write: its weights reach too far.

``base + 20 * (a - b)`` is a distribution like any other, but its best token is often one that every
term finds nearly impossible, as what the terms differ in there is noise. What is measured is how
far the blend's own log-prob of a token is above that of the term that likes it best. The mean of
this is at most ``KL(blend || term)`` of the nearest term. Between its terms a blend stays below one
nat, and blends that write sense stay below two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blends.blend import Blend
from ..checks import warn
from .mixer import rows_of
from .rows import Slots

FAR = 3.0  # nats: on average the blend's tokens are twenty times as likely as under any term
MOST = 10.0  # of one token, so that a few alone do not count as many
ENOUGH = 8  # tokens that are judged together
NEAR, FEW = 1.0, 3  # nats: a few tokens whose mean is below this are looked at no further
AT_FIRST, LATER = 2, 64  # steps from one look to the next: until there are enough, and from then on


class Strays:
    """Looks at a few tokens of a call, and warns once if these are far from all terms.

    Args:
        vocabulary: how many columns of the logits count.

    Attributes:
        possible: whether the blend can be far from its terms at all.
    """

    def __init__(self, blend: Blend, vocabulary: int) -> None:
        self.blend, self.vocabulary = blend, vocabulary
        self.possible, self.warned = _reaches(blend), False
        self.steps = self.next = 0
        self.far, self.tokens = 0.0, 0

    def due(self, steps: int) -> bool:
        """Whether the tokens of a step are to be looked at, after so many more steps."""
        self.steps += steps
        return not self.warned and self.steps >= self.next

    def look(self, logits: Sequence[Tensor], slots: Slots, fed: Tensor | None = None) -> None:
        """Look at the tokens of a step.

        Args:
            logits: of each model alone, ``[slots, V]``, from which the tokens were drawn. Those of
                the terms come first.
            fed: the slots that these are of; None: all.
        """
        at = rows_of(slots.tokens, fed)[:, None]
        each = [z[:, : self.vocabulary].float() for z in logits[: len(self.blend.terms)]]
        best = torch.stack([z.gather(1, at)[:, 0] - z.logsumexp(dim=1) for z in each]).amax(dim=0)
        last = (slots.new - 1).clamp(min=0)[:, None]
        far = rows_of(slots.written["logprobs"].gather(1, last)[:, 0], fed) - best
        far, wrote = far.nan_to_num(0.0).clamp(-MOST, MOST), rows_of(slots.wrote, fed)
        sums = torch.stack([(far * wrote).sum(), wrote.sum()])
        far_in_all, tokens = sums.tolist()
        self.far += far_in_all
        self.tokens += int(tokens)
        near = self.tokens >= FEW and self.far < NEAR * self.tokens
        enough = near or self.tokens >= ENOUGH
        self.next = self.steps + (LATER if enough else AT_FIRST)
        if enough:
            self._judge(self.far / self.tokens)
            self.far, self.tokens = 0.0, 0

    def _judge(self, far: float) -> None:
        if far < FAR:
            return
        self.warned = True
        warn(
            f"{self.blend} has left what its terms would write: its tokens are "
            f"{math.exp(far):.0f} times as likely under it as under any term (the mean of "
            f"{self.tokens} tokens); make its weights smaller, or keep it to tokens that a term "
            "finds likely: blend.within(crossfade.Support(min_p=0.1))",
        )


def _reaches(blend: Blend) -> bool:
    """Whether a blend can leave its terms: not where its weights put it between them, and not far
    where a support keeps it to the likely tokens of one."""
    if blend.power != 0 or blend.support is not None:
        return False
    if blend.values or blend.parts or blend.classifiers:
        return True
    if len(blend.terms) < 2:
        return False
    each = [torch.as_tensor(w, dtype=torch.float32, device="cpu") for w in blend.weights]
    w = torch.stack(torch.broadcast_tensors(*each), dim=-1)
    return bool(((w < 0).any(-1) | (w.sum(-1) > 1.001)).any())
