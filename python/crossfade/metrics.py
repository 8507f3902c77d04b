"""Figures about sets of texts: a gold reward, diversity, perplexity, a mean with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .extras import require


def sentiment(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, from -1 for bitter to 1 for enthusiastic texts.

    VADER is a list of words with rules, which needs no network and is the same everywhere. It
    serves as a gold reward in small runs, and can be gamed, as any reward can. Needs the extra
    "metrics".
    """
    analyzer = require("vaderSentiment.vaderSentiment", "metrics").SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """The number of different n-grams of words over the number of all, in all texts together.

    Words are split at white space and lower-cased. The figure falls as there is more text, so only
    sets of one size can be compared. It is NaN if no text has n words.

    Source: Li et al., arXiv:1510.03055.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    grams = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else math.nan


def edit_distance(a: str, b: str) -> float:
    """How far two texts are apart, from 0 for the same words to 1 where none of them stays.

    It is the Levenshtein distance in words, the least number of words to insert, delete or replace,
    over the number of words of the longer text. Words are split at white space.
    """
    first, second = a.split(), b.split()
    longest = max(len(first), len(second))
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    row = list(range(len(second) + 1))  # from the words of `first` so far to each start of `second`
    for i, word in enumerate(first, 1):
        before, row = row, [i]
        for j, other in enumerate(second, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
    return row[-1] / longest if longest else 0.0


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by the normal approximation.

    The second is ``1.96 * values.std() / sqrt(len(values))``, and NaN for a single value.
    """
    if not values:
        raise ValueError("values is empty; it must have at least one number")
    if len(values) == 1:
        return float(values[0]), math.nan
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def perplexity(logprobs: float, tokens: int) -> float:
    """``exp(-logprobs / tokens)`` of a sum of natural log-probs over `tokens`; NaN for 0 tokens.

    It is infinite where a float cannot hold it, which steep blends reach.
    """
    try:
        return math.exp(-logprobs / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


def perplexity_interval(logprobs: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """The perplexity of several texts together, and half of its 95 % interval.

    The interval takes the texts, not the tokens, for independent draws: it is that of a ratio of
    two sums, by the delta method. It is NaN for a single text, and both are NaN without tokens.

    Args:
        logprobs: for each text, the sum of the natural log-probs of its tokens.
        tokens: for each text, how many tokens it has.
    """
    if len(logprobs) != len(tokens):
        raise ValueError(f"tokens are of {len(tokens)} texts; logprobs are of {len(logprobs)}")
    all_tokens, texts = sum(tokens), len(tokens)
    found = perplexity(math.fsum(logprobs), all_tokens)
    if not all_tokens or texts < 2:
        return found, math.nan
    mean = math.fsum(logprobs) / all_tokens
    squares = math.fsum((p - mean * n) ** 2 for p, n in zip(logprobs, tokens, strict=True))
    deviation = math.sqrt(squares * texts / (texts - 1)) / all_tokens  # of the mean log-prob
    return found, 1.96 * deviation * found
