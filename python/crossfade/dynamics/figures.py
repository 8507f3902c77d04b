"""What is told of a behaviour in training: its figures, and when it is warned of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from .moments import Z
from .readings import Reading

# A behaviour counts as learnt once the odds of its chosen responses have doubled, and a likelihood
# as lost once it has halved.
DOUBLED = math.log(2)
STARVED = 1 / 4  # of how much another behaviour grew: one that grew by less is starved
NAMES = (
    *("loss", "accuracy", "plain_accuracy", "margin", "growth", "growth_error"),
    *("chosen", "rejected", "argmax", "entropy"),
)
FEWEST = 5  # pairs without which a behaviour's mean says too little to warn of


class Change(NamedTuple):
    """By how much a figure of pairs changed: the mean, and the reach of its 95 % interval."""

    mean: float
    error: float

    @property
    def low(self) -> float:
        return self.mean - self.error

    @property
    def high(self) -> float:
        return self.mean + self.error

    @classmethod
    def of(cls, differences: Tensor) -> Change:
        """That of independent pairs, ``[pairs]``; one alone says nothing of its spread."""
        n = len(differences)
        if n < 2:
            return cls(float(differences.mean()), math.inf)
        return cls(float(differences.mean()), student(n - 1) * float(differences.std()) / n**0.5)


def student(freedom: int) -> float:
    """Within how many standard errors 95 % of means are: Student's t.

    From the normal distribution's by Cornish and Fisher's expansion, whose three terms are right to
    0.3 % from 4 degrees of freedom on (Abramowitz and Stegun, 26.7.5). Below, where means are of
    fewer than `FEWEST` pairs, it is too small.
    """
    z, v = Z, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def of(now: Reading, start: Reading, beta: float) -> dict[str, float | None]:
    """The figures of one behaviour's pairs, `NAMES`, as `Watch` describes them."""
    margins, growth = now.margins, now.margins - start.margins
    change = Change.of(growth)
    found = (
        float(softplus(-beta * growth).mean()),
        share_above_zero(growth),
        share_above_zero(margins),
        float(margins.mean()),
        change.mean,
        change.error if math.isfinite(change.error) else None,
        *(float(getattr(now, name).mean()) for name in NAMES[-4:]),
    )
    return dict(zip(NAMES, found, strict=True))


def share_above_zero(x: Tensor) -> float:
    """The share of numbers above 0; those that are 0 count by half."""
    return float((x > 0).double().mean() + (x == 0).double().mean() / 2)


class Warned(NamedTuple):
    """What a behaviour is warned of."""

    kind: str
    behaviour: str
    text: str


def warnings(readings: Mapping[str, tuple[Reading, Reading]]) -> Iterator[Warned]:
    """Behaviours that another one starves, and those whose responses likelihood leaves.

    Both rules are of 95 % intervals of the mean change since the start, over a behaviour's pairs:

    * a starves b where the log-odds of a's chosen responses over its rejected ones grew by log 2 or
      more, and those of b by less than a quarter of that: b's upper end is below a quarter of a's
      lower end;
    * likelihood leaves both responses where chosen and rejected ones have each lost half of it, and
      the most likely tokens gained: the upper ends of both changes are below -log 2, and the lower
      end of that of `argmax` is above 0 (Ren and Sutherland, arXiv:2407.10490).

    Args:
        readings: of each behaviour's pairs, now and at the start.
    """
    enough = {b: both for b, both in readings.items() if len(both[0].chosen) >= FEWEST}
    grown = {b: Change.of(now.margins - start.margins) for b, (now, start) in enough.items()}
    if grown:
        most = max(grown, key=lambda b: grown[b].low)
        reach = grown[most].low
        for b, own in grown.items():
            if b != most and reach >= DOUBLED and own.high < STARVED * reach:
                yield Warned(
                    "starved",
                    b,
                    f"{most!r} starves {b!r}: the log-odds of chosen over rejected responses grew "
                    f"by {grown[most].mean:.2f} ± {grown[most].error:.2f} for the one, and by "
                    f"{own.mean:.2f} ± {own.error:.2f} for the other",
                )
    for b, (now, start) in enough.items():
        chosen, rejected, argmax = (
            Change.of(getattr(now, name) - getattr(start, name))
            for name in ("chosen", "rejected", "argmax")
        )
        if max(chosen.high, rejected.high) < -DOUBLED and argmax.low > 0:
            yield Warned(
                "squeezed",
                b,
                f"likelihood leaves both responses of {b!r}: log-probs of chosen ones fell by "
                f"{-chosen.mean:.2f} and of rejected ones by {-rejected.mean:.2f}, and those of "
                f"the most likely tokens rose by {argmax.mean:.2f} a token",
            )
