"""Figures about sets of texts: gold reward, diversity, and a mean with its spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .extras import require


def sentiment(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, within [-1, 1]: from bitter to enthusiastic.

    It is a word list with rules, offline and the same everywhere: a gold reward for small runs,
    and, as any reward, one that can be gamed. Needs the extra "demo".
    """
    analyzer = require("vaderSentiment.vaderSentiment", "demo").SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams of words in all texts (1510.03055).

    Words are split at white space and lower-cased. It falls as there is more text, so compare sets
    of one size. NaN if no text has n words.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    grams = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else math.nan


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % interval, by the normal approximation.

    `1.96 * values.std() / sqrt(len(values))`; the half-width is NaN for fewer than two values.
    """
    if not values:
        raise ValueError("values is empty; it must have at least one number")
    if len(values) == 1:
        return float(values[0]), math.nan
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def perplexity(logprobs: float, tokens: int) -> float:
    """`exp(-logprobs / tokens)`, of a sum of natural log-probs over some tokens; NaN for none."""
    return math.exp(-logprobs / tokens) if tokens else math.nan
