"""Four rewards of an opinion, and their standardised mean: the annotator of `self_judge`.

They need no network and no model: VADER's sentiment, brevity, the Automated Readability Index of
textstat, and how common the words are in English by wordfreq.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import reviews
import textstat
import wordfreq

HARDEST, PLAINEST = 20.0, 8.0  # years of school; Zipf's scale of words


def readability(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """How few years of school a text needs by the Automated Readability Index, within [0, 1]: 0
    from 20 years on. A text without a letter has 0."""
    years = [
        textstat.automated_readability_index(text) if any(map(str.isalpha, text)) else HARDEST
        for text in responses
    ]
    return [1 - min(max(x, 0.0), HARDEST) / HARDEST for x in years]


def plainness(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The mean frequency of the words in English, within [0, 1]: Zipf's scale over 8. A text
    without a word has 0."""
    found = []
    for text in responses:
        words = wordfreq.tokenize(text, "en")
        each = [wordfreq.zipf_frequency(word, "en") for word in words]
        found.append(statistics.fmean(each) / PLAINEST if each else 0.0)
    return found


REWARDS = {**reviews.REWARDS, "readability": readability, "plainness": plainness}


class Annotator:
    """The mean of all rewards, each less its mean and over its standard deviation in some texts."""

    def __init__(self, scores: Sequence[Mapping[str, float]]) -> None:
        each = {name: [s[name] for s in scores] for name in scores[0]}
        self.means = {name: statistics.fmean(of) for name, of in each.items()}
        self.deviations = {name: statistics.pstdev(of) or 1.0 for name, of in each.items()}

    def total(self, score: Mapping[str, float]) -> float:
        return statistics.fmean(
            (score[name] - mean) / self.deviations[name] for name, mean in self.means.items()
        )
