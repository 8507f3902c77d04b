"""Draws come as often as they should, and independently along steps, streams and seeds.

Chi-square, every bin expecting five draws or more and the rare tokens pooled into one: a comparison
of the large probabilities misses a bug in the tail. Seeds are fixed, so that a result repeats; with
fresh ones a correct sampler would fail a test with the probability LEVEL.
"""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Backend, normal
from scipy.stats import chi2, chi2_contingency
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LEVEL = 1e-4
VOCAB = 24
WEIGHTS = (1.0, 0.6, -0.6)


def p_value(drawn: Tensor, probability: Tensor) -> float:
    """The p-value of the frequencies under `probability`; 0 if an impossible token was drawn."""
    count = len(drawn)
    seen = np.bincount(drawn.cpu().numpy(), minlength=len(probability)).astype(float)
    expected = probability.numpy() * count
    if seen[expected == 0].any():
        return 0.0
    seen, expected = seen[expected > 0], expected[expected > 0]
    order = np.argsort(-expected)
    whole = int((expected >= 5).sum())
    seen, expected = (np.append(x[order[:whole]], x[order[whole:]].sum()) for x in (seen, expected))
    if expected[-1] < 5 and whole:  # the tail is too rare for a bin of its own
        seen[-2], expected[-2] = seen[-2:].sum(), expected[-2:].sum()
        seen, expected = seen[:-1], expected[:-1]
    if len(seen) == 1:
        return 1.0
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, len(seen) - 1))


def test_p_value_sees_a_small_fault() -> None:
    """It refuses draws of which half a per cent are moved into the tail, and accepts the others."""
    probability = (0.5 ** torch.arange(1.0, 25)).double()
    probability /= probability.sum()
    generator = torch.Generator().manual_seed(0)
    drawn = probability.multinomial(50_000, replacement=True, generator=generator)
    assert p_value(drawn, probability) > LEVEL
    drawn[:250] = 11
    assert p_value(drawn, probability) < LEVEL
    drawn[0] = 23
    impossible = probability.clone()
    impossible[23] = 0
    assert p_value(drawn, impossible) == 0


CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "min_p": 0.03},
}


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


def draw(backend: Backend, z: list[Tensor], weights: Any, count: int, **settings: Any) -> Tensor:
    """`count` tokens, drawn from one row of logits that is expanded to as many."""
    if backend.interpreted:
        pytest.skip("too slow; its draws are compared with the reference's one by one")
    logits = [t.to(backend.device).expand(count, -1) for t in z]
    settings = {"seed": 12, "stream": 3, "step": 5, **settings}
    settings[settings.pop("axis", "step")] = torch.arange(count, device=backend.device)
    return backend.blend_sample(logits, weights, **settings).tokens


ALONG = [(cut, "step") for cut in CUTS]
ALONG += [(cut, axis) for cut in ("plain", "all") for axis in ("stream", "seed")]


@pytest.mark.parametrize(("cut", "axis"), ALONG)
def test_geometric_blend(backend: Backend, cut: str, axis: str) -> None:
    z = [normal(1, VOCAB, k, scale=1.5) for k in range(3)]
    log_p = sum(w * t.double() for w, t in zip(WEIGHTS, z, strict=True))
    assert isinstance(log_p, Tensor)
    probability = truncated(log_p[0].log_softmax(dim=-1), CUTS[cut])
    drawn = draw(backend, z, WEIGHTS, 50_000, axis=axis, **CUTS[cut])
    assert p_value(drawn, probability) > LEVEL


@pytest.mark.parametrize("cut", ["plain", "all"])
def test_mixture(backend: Backend, cut: str) -> None:
    z = [normal(1, VOCAB, k, scale=1.5) for k in range(2)]
    p = [t[0].double().softmax(dim=-1) for t in z]
    probability = truncated((0.3 * p[0] + 0.7 * p[1]).log(), CUTS[cut])
    drawn = draw(backend, z, [0.3, 0.7], 50_000, power=1.0, **CUTS[cut])
    assert p_value(drawn, probability) > LEVEL


def test_long_tail(backend: Backend) -> None:
    """Zipf's law over a row of many words, where most of the bins are rare."""
    vocab = 300
    z = -torch.arange(1.0, vocab + 1).log()[None]
    drawn = draw(backend, [z], [1.0], 10_000)
    assert p_value(drawn, z[0].double().softmax(dim=-1)) > LEVEL


def test_every_word_of_a_counter(backend: Backend) -> None:
    """Equal scores: each place within a counter and each counter wins alike."""
    drawn = draw(backend, [torch.zeros(1, 20)], [1.0], 20_000)
    assert p_value(drawn, torch.full((20,), 0.05, dtype=torch.float64)) > LEVEL


PAIRS: dict[str, list[dict[str, Any]]] = {  # draws along the steps, but for the first two
    "steps": [{"axis": "stream", "step": 5}, {"axis": "stream", "step": 6}],
    "streams of many seeds": [{"axis": "seed", "stream": 0}, {"axis": "seed", "stream": 1}],
    "streams": [{"stream": 0}, {"stream": 1}],
    "seeds": [{"seed": 0}, {"seed": 1}],
    "high words of streams": [{"stream": 0}, {"stream": 2**32}],
    "high words of seeds": [{"seed": 0}, {"seed": 2**32}],
    "stream for seed": [{"stream": 1, "seed": 0}, {"stream": 0, "seed": 1}],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_are_independent(backend: Backend, pair: str) -> None:
    """A contingency table of one draw against the one beside it, along each part of the counter."""
    count, vocab = 20_000, 6
    z = [torch.zeros(1, vocab)]
    pairs = [draw(backend, z, [1.0], count, **shift).cpu().numpy() for shift in PAIRS[pair]]
    table = np.zeros((vocab, vocab))
    np.add.at(table, tuple(pairs), 1)
    assert chi2_contingency(table).pvalue > LEVEL


@pytest.mark.parametrize("axis", ["step", "stream", "seed"])
@pytest.mark.parametrize("lag", [1, 4])
def test_draws_do_not_remember(backend: Backend, axis: str, lag: int) -> None:
    """A contingency table of each draw against the one `lag` before it."""
    drawn = draw(backend, [torch.zeros(1, 6)], [1.0], 20_000, axis=axis).cpu().numpy()
    table = np.zeros((6, 6))
    np.add.at(table, (drawn[:-lag], drawn[lag:]), 1)
    assert chi2_contingency(table).pvalue > LEVEL
