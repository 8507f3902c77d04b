"""Six gold rewards of an opinion, by the names of the objectives that they measure.

An aligner is trained on three of them; the others are never seen in training. All but one need no
model: VADER's sentiment, words counted, the Automated Readability Index of textstat, how common
words are by wordfreq, and the share of different words. Relevance is a cosine of MiniLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import minilm
import opinions
import reviews
from crossfade import metrics


def relevance(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The cosine of the embeddings of the question and the answer, within [-1, 1]."""
    questions = minilm.embed([prompt[-1]["content"] for prompt in prompts])
    return (questions * minilm.embed(responses)).sum(dim=-1).tolist()


def diversity(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The number of different words over the number of all, within [0, 1]. A text without a word
    has 0. Short texts repeat themselves less, so brevity alone raises it."""
    return [metrics.distinct_n([text], 1) if text.split() else 0.0 for text in responses]


TRAINED: dict[str, Callable[[Sequence[Any], Sequence[str]], list[float]]] = {
    "positivity": reviews.sentiment,
    "brevity": reviews.brevity,
    "readability": opinions.readability,
}
UNSEEN: dict[str, Callable[[Sequence[Any], Sequence[str]], list[float]]] = {
    "plain_words": opinions.plainness,
    "relevance": relevance,
    "diversity": diversity,
}
REWARDS = {**TRAINED, **UNSEEN}
