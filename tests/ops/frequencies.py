"""Draws against the probabilities they should have: chi-square, and the rows that are drawn from.

bench/exact.py draws from the same rows, a million times each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import INF, normal
from numpy_noise import GROUP
from scipy.stats import chi2
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# ---- Chi-square ----------------------------------------------------------------------------------


def statistic(seen: np.ndarray, probability: np.ndarray) -> tuple[float, int]:
    """Chi-square and its degrees of freedom; infinite if something impossible was seen.

    Every bin expects five draws or more, and what is rarer is pooled into one.
    """
    expected = probability * seen.sum()
    if seen[expected == 0].any():
        return np.inf, 1
    seen, expected = seen[expected > 0], expected[expected > 0]
    order = np.argsort(-expected)
    whole = int((expected >= 5).sum())
    seen, expected = (np.append(x[order[:whole]], x[order[whole:]].sum()) for x in (seen, expected))
    if expected[-1] < 5 and whole:  # the tail is too rare for a bin of its own
        seen[-2], expected[-2] = seen[-2:].sum(), expected[-2:].sum()
        seen, expected = seen[:-1], expected[:-1]
    if len(seen) == 1:
        return 0.0, 0
    return float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1


def p_of(found: tuple[float, int]) -> float:
    """The p-value of a chi-square; 1 where it has no freedom."""
    return float(chi2.sf(*found)) if found[1] else 1.0


def p_value(drawn: Tensor, probability: Tensor) -> float:
    """The p-value of the frequencies under `probability`; 0 if an impossible token was drawn."""
    seen = np.bincount(drawn.cpu().numpy(), minlength=len(probability)).astype(float)
    return p_of(statistic(seen, probability.numpy()))


def p_values(seen: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Of counts `[V]`: tokens, groups, tokens given their group, and places within groups.

    The third is the sum over groups of the chi-square of their tokens, given how many draws the
    group has. The fourth adds up all groups' tokens of the same place.
    """
    short = -len(seen) % GROUP
    seen, probability = (np.pad(x, (0, short)).reshape(-1, GROUP) for x in (seen, probability))
    mass = probability.sum(axis=1)
    given = [statistic(n, p / m) for n, p, m in zip(seen, probability, mass, strict=True) if m > 0]
    return {
        "tokens": p_of(statistic(seen.ravel(), probability.ravel())),
        "groups": p_of(statistic(seen.sum(axis=1), mass)),
        "within": p_of((sum(x for x, _ in given), sum(freedom for _, freedom in given))),
        "places": p_of(statistic(seen.sum(axis=0), probability.sum(axis=0))),
    }


# ---- Rows ----------------------------------------------------------------------------------------

CUTS = ("plain", "temperature", "hot", "top_k", "top_p", "min_p", "all")
VOCABULARIES = (7, 255, 256, 257, 50_257, 151_936)  # one group and more, whole ones and parts


def cut_of(name: str, tokens: int) -> dict[str, Any]:
    """The settings of a truncation that bites where `tokens` are left."""
    cuts: dict[str, dict[str, Any]] = {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "hot": {"temperature": 2.0},
        "top_k": {"top_k": max(3, tokens // 4)},
        "top_p": {"top_p": 0.85},
        "min_p": {"min_p": 0.05},
        "all": {"temperature": 1.3, "top_k": max(5, tokens // 2), "top_p": 0.9, "min_p": 0.03},
    }
    return cuts[name]


def truncated(log_p: Tensor, cut: dict[str, Any]) -> Tensor:
    """Probabilities after Hugging Face's processors, for one row of float64 log-probs."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    score = log_p[None]
    if "temperature" in cut:
        score = TemperatureLogitsWarper(cut["temperature"])(ids, score)
    if "top_k" in cut:
        score = TopKLogitsWarper(cut["top_k"])(ids, score)
    if "top_p" in cut:
        score = TopPLogitsWarper(cut["top_p"])(ids, score)
    if "min_p" in cut:
        score = MinPLogitsWarper(cut["min_p"])(ids, score)
    return score.softmax(dim=-1)[0]


@dataclass(frozen=True)
class Row:
    """One row of logits `[1, V]`, how it is drawn from, and the probabilities `[V]` of its draws.

    `options`: the mask, if any, and the truncation's settings.
    """

    logits: Tensor
    options: dict[str, Any]
    probability: Tensor


def row(vocab: int, cut: str) -> Row:
    """Normal logits, in large vocabularies of some 300 tokens that are spread over 40 groups.

    The last group, whole or not, is one of them, and so is the last token. The other tokens are
    masked if the vocabulary is odd, and then would be the likeliest; else their logits are -inf.
    """
    logits = normal(1, vocab, vocab, scale=1.5)
    left = torch.ones(vocab, dtype=torch.bool)
    if vocab > 2 * GROUP:
        generator = torch.Generator().manual_seed(vocab)
        left.zero_()
        for group in torch.linspace(0, (vocab - 1) // GROUP, 40).long().tolist():
            tokens = torch.arange(group * GROUP, min((group + 1) * GROUP, vocab))
            left[tokens[torch.randperm(len(tokens), generator=generator)[:8]]] = True
        left[-1] = True
    logits[0, -1] = 2.0  # of 257 tokens the last is a group of its own
    options = cut_of(cut, int(left.sum()))
    probability = truncated(logits[0].double().masked_fill(~left, -INF).log_softmax(-1), options)
    if vocab % 2:
        logits = logits.masked_fill(~left, 5.0)
        options["mask"] = left
    else:
        logits = logits.masked_fill(~left, -INF)
    return Row(logits, options, probability)


def zipf(vocab: int) -> Row:
    """Zipf's law over the whole row: all groups have mass, and most of the tokens are rare."""
    logits = -torch.arange(1.0, vocab + 1).log()[None]
    return Row(logits, {}, logits[0].double().softmax(dim=-1))


def flat(vocab: int) -> Row:
    """All tokens alike, so that each group, each counter and each of its words comes as often."""
    return Row(torch.zeros(1, vocab), {}, torch.full((vocab,), 1 / vocab, dtype=torch.float64))


def lattice(groups: int, places: int) -> Row:
    """Equal scores on the first `places` tokens of each group, the last group being cut there.

    Draws from it are pairs of numbers, group and place, which the two levels' noises decide alone.
    """
    vocab = (groups - 1) * GROUP + places
    left = torch.arange(vocab) % GROUP < places
    logits = torch.zeros(1, vocab).masked_fill(~left, -INF)
    return Row(logits, {}, logits[0].double().softmax(dim=-1))
