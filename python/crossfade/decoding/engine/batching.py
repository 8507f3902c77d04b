"""Which texts share a forward, so that what it holds in memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

# The most tokens of one forward, padding included. This bounds the memory of activations.
MAX_TOKENS = {"cpu": 1024, "cuda": 8192}
# The most numbers where the logits of many tokens are held at once.
MAX_LOGITS = 1 << 25


class Cost(NamedTuple):
    """What each text costs, such as its tokens, and the most that a batch may cost.

    As a batch is padded, each of its texts costs as much as the dearest of them.
    """

    each: Sequence[int]
    most: float


def max_tokens(device: torch.device) -> int:
    return MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"])


def batches(*costs: Cost) -> Iterator[list[int]]:
    """Cut texts into batches, none of which costs more than it may, unless it is one text.

    Texts of about one length come together, the longest first: the first of `costs` is the length.

    Yields:
        Which texts share a batch, as indices in ascending order.
    """
    each = list(zip(*(cost.each for cost in costs), strict=True))
    batch: list[int] = []
    dearest = [0] * len(costs)
    for i in sorted(range(len(each)), key=lambda i: each[i], reverse=True):
        together = list(map(max, dearest, each[i]))
        fits = all((len(batch) + 1) * x <= c.most for x, c in zip(together, costs, strict=True))
        if batch and not fits:
            yield sorted(batch)
            batch, together = [], list(each[i])
        batch.append(i)
        dearest = together
    if batch:
        yield sorted(batch)
