"""The sampling noise in short torch: Philox's words, Gumbel's distribution, and the race of two
levels, as csrc/blend_math.h has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = -float("inf")
GROUP = 256  # tokens that share the noise of the upper level


def philox(counter: Tensor, step: Tensor, stream: Tensor, seed: Tensor) -> list[Tensor]:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words: four words for each counter.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    c = [counter & low, step & low, stream & low, (stream >> 32) & low]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # wraps modulo 2^64; the bits are right
        c = [((b >> 32) & low) ^ c[1] ^ k0, b & low, ((a >> 32) & low) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


@dataclass(frozen=True)
class Noise:
    """Gumbel noise of rows, each of which has a seed, a stream and a step: int64 `[B]`.

    Tokens and groups are counted from `first_token` of the vocabulary on, and from its group.
    """

    seed: Tensor
    stream: Tensor
    step: Tensor
    first_token: int = 0

    def of_tokens(self, group: Tensor) -> Tensor:
        """For the tokens of each row's group `[B]`: `[B, GROUP]`.

        Token v has word v % 4 of counter (v // 4, step, stream low, stream high).
        """
        return self._of_indices(group[:, None] * GROUP + self.first_token, GROUP)

    def of_groups(self, groups: int) -> Tensor:
        """For the first `groups` groups of all rows: `[B, groups]`.

        Group j has word j % 4 of counter (2^31 | j // 4, step, stream low, stream high).
        """
        first = self.seed.new_full((1, 1), self.first_token // GROUP)
        return self._of_indices(first, groups, level=2**31)

    def _of_indices(self, first: Tensor, count: int, level: int = 0) -> Tensor:
        """Of the `count` indices of a level from each row's `first` on: the words of counters."""
        skipped = int(first[0, 0]) % 4 if len(first) else 0  # the same in all rows
        nth = torch.arange((skipped + count + 3) // 4, device=first.device)
        counters = level + first // 4 + nth
        ids = (x[:, None] for x in (self.step, self.stream, self.seed))
        words = philox(counters, *ids)
        h = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1).double()
        x = (h + 0.5) / 2**32
        e = torch.where(x <= 0.5, -x.log(), -torch.log1p(-(2**32 - 1 - h + 0.5) / 2**32))
        return (-e.log())[:, skipped : skipped + count]


class Race(NamedTuple):
    """What won the race of groups, and that of the winner's tokens: each `[B]`."""

    token: Tensor  # its index among the row's
    group_mass: Tensor  # the log of the group's
    group_noise: Tensor
    token_noise: Tensor


def gumbel_max(x: Tensor, noise: Noise) -> Race:
    """Tokens drawn from softmax(x), x `[B, V]` with -inf for removed tokens.

    Gumbel-max on two levels: first a group by its mass, then a token of that group. It is exact, as
    Pr[v] = Pr[group] Pr[v | group], and their noises are independent. Ties go to the lower index.
    """
    x = F.pad(x, (0, -x.shape[1] % GROUP), value=NEG_INF).unflatten(1, (-1, GROUP))
    mass = x.logsumexp(dim=-1)  # [B, groups]: the log of each group's
    of_groups = noise.of_groups(mass.shape[1]).expand_as(mass)
    group = (mass + of_groups).argmax(dim=-1)
    of_group = x[torch.arange(len(x), device=x.device), group]
    of_tokens = noise.of_tokens(group)
    nth = (of_group + of_tokens).argmax(dim=-1)
    at = group[:, None], nth[:, None]
    won = mass.gather(1, at[0]), of_groups.gather(1, at[0]), of_tokens.gather(1, at[1])
    return Race(group * GROUP + nth, *(x[:, 0] for x in won))
