"""What is measured of steered texts, for the benches that compare ways to steer.

Of KL(decoded || base) of a response an upper bound is given: the mean log-ratio of the blend and
the base on the texts, and of the choice what it can add at most: ``log n - (n - 1) / n`` for best
of n; ``log(W N) + (C - 1) log N`` for a search of C chunks, since a text is among N continuations
of each of its beginnings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import crossfade as cf
import numpy as np
from crossfade import metrics


def choice_kl(search: cf.ChunkBeamSearch | None, new: int) -> float:
    """What choosing adds at most to the divergence, nats a response of `new` tokens."""
    if search is None:
        return 0.0
    if search.chunk_length is None:
        return math.log(search.rows) - 1 + 1 / search.rows
    chunks = -(-new // search.chunk_length)
    return math.log(search.rows) + (chunks - 1) * math.log(search.samples)


def figures(
    out: Any, base: Any, prompts: list[Any], search: cf.ChunkBeamSearch | None, new: int
) -> dict[str, Any]:
    """Of what a call wrote, but for rewards: time, divergence, perplexity, distinct-2, texts."""
    texts = [text.strip() for text in out.text]
    own = cf.score(base, prompts, out.responses).totals.double()
    ratios = (out.logprobs.double().sum(dim=1) - own).tolist()
    kl, kl_interval = metrics.mean_interval(ratios)
    return {
        "seconds": round(out.stats.seconds / len(prompts), 3),
        "kl": kl + choice_kl(search, new),
        "kl_interval": kl_interval,
        "of_it_choice": choice_kl(search, new),
        "perplexity": metrics.perplexity(float(own.sum()), int(out.lengths.sum())),
        "distinct_2": metrics.distinct_n(texts, 2),
        "texts": texts,
    }


def between(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The reward at a divergence between ``(kl, reward)`` that were measured; None: beyond them."""
    points = sorted(points)
    if not points or not points[0][0] <= kl <= points[-1][0]:
        return None
    return float(np.interp(kl, *zip(*points, strict=True)))
