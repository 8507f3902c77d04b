"""How often a guess is accepted, against the closed forms of coupling by common noise.

With one level of noise a token ``v`` is both the target's and the draft's with the probability
``1 / sum_u max(p_u / p_v, q_u / q_v)`` (Daliri et al., arXiv:2408.07978). Noise on two levels, of
groups of 256 tokens and of the tokens of a group, is that on each.
"""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import ops
from drafted import SAMPLED
from sweeps import product
from tiny_models import VOCAB, make
from torch import Tensor
from transformers import PreTrainedModel

GROUP = 256
DRAWS = 20_000


def near(apart: float) -> PreTrainedModel:
    """A model that is like all others of these, and differs from them."""
    found, generator = make("llama", 1), torch.Generator().manual_seed(3)
    with torch.no_grad():
        found.lm_head.weight += apart * torch.randn(VOCAB, 16, generator=generator)
    return found


def coupled(p: Tensor, q: Tensor) -> float:
    """The chance that one noise draws the same of two distributions ``[V]``, on one level."""
    on = (p > 0) & (q > 0)
    ratios = torch.maximum(p[None] / p[on][:, None], q[None] / q[on][:, None])
    return float((1 / ratios.sum(dim=1)).sum())


def coupled_in_groups(p: Tensor, q: Tensor) -> float:
    """The same on two levels: of a group, then of a token in it."""
    pad = -len(p) % GROUP
    p, q = (torch.nn.functional.pad(x, (0, pad)).view(-1, GROUP) for x in (p, q))
    masses, others = p.sum(dim=1), q.sum(dim=1)
    total = 0.0
    for j in range(len(p)):
        if masses[j] > 0 and others[j] > 0:
            of_group = 1 / torch.maximum(masses / masses[j], others / others[j]).sum()
            total += float(of_group) * coupled(p[j] / masses[j], q[j] / others[j])
    return total


def within(hits: int, draws: int, chance: float) -> bool:
    """Whether a count is within 4.5 standard deviations of a binomial's mean."""
    return abs(hits - draws * chance) <= 4.5 * max(draws * chance * (1 - chance), 1.0) ** 0.5


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """``[V]`` float64 after temperature, top-k and top-p."""
    x = logits.double() / temperature
    if top_k:
        x = x.masked_fill(x < x.topk(top_k).values[-1], -torch.inf)
    p = x.softmax(0)
    ordered, at = p.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    p = torch.zeros_like(p).scatter(0, at[kept], ordered[kept])
    return p / p.sum()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "cold": {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    "few": {"temperature": 1.3, "top_k": 12, "top_p": 1.0},
    "likely": {"temperature": 1.0, "top_k": 0, "top_p": 0.8},
}


@pytest.mark.parametrize(
    ("settings", "vocabulary", "apart"),
    product([*SETTINGS], [61, 700], [0.5, 1.0, 2.0], together=1),
)
def test_draws_of_two_distributions(settings: str, vocabulary: int, apart: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    z = torch.randn(vocabulary, generator=generator) * 2
    y = z + apart * torch.randn(vocabulary, generator=generator)
    how = SETTINGS[settings]
    steps = torch.arange(DRAWS)
    drawn = [
        ops.blend_sample(
            [x.expand(DRAWS, -1).contiguous()], [1.0], **how, seed=7, step=steps
        ).tokens
        for x in (z, y)
    ]
    p, q = (distribution(x, **how) for x in (z, y))
    chance = coupled_in_groups(p, q)
    if vocabulary <= GROUP:
        assert chance == pytest.approx(coupled(p, q))
        distance = 0.5 * float((p - q).abs().sum())
        assert (1 - distance) / (1 + distance) - 1e-9 <= chance <= 1 - distance + 1e-9
    assert within(int((drawn[0] == drawn[1]).sum()), DRAWS, chance)
    for tokens, wanted in zip(drawn, (p, q), strict=True):  # Each alone is drawn as ever.
        counts = torch.bincount(tokens, minlength=vocabulary).double()
        expected = wanted * DRAWS
        many = expected >= 5
        chi_square = float(((counts - expected)[many] ** 2 / expected[many]).sum())
        freedom = int(many.sum())
        assert chi_square <= freedom + 4.5 * (2 * freedom) ** 0.5 + 5
        assert counts[wanted == 0].sum() == 0


@pytest.mark.parametrize(
    ("kind", "temperature"), product(["a term", "a model"], [1.0, 2.0], together=1)
)
def test_guesses_of_models(kind: str, temperature: float) -> None:
    """The share of first guesses that were drawn, over rows with seeds of their own."""
    target, other = near(0.0), near(0.3)
    rows = 1500
    first = cf.Model(target) + 0.5 * cf.Model(other) if kind == "a term" else cf.Model(target)
    draft = cf.Draft(cf.Model(other), length=1)
    how = {**SAMPLED, "seed": list(range(rows)), "temperature": temperature, "max_batch": rows}
    prompt = [1, 3, 2]
    out = cf.generate(first, [prompt] * rows, draft=draft, max_new_tokens=2, **how)
    with torch.no_grad():
        z, y = (m(torch.tensor([prompt])).logits[0, -1].double() for m in (target, other))
    blended = z + 0.5 * y if kind == "a term" else z
    p, q = ((x / temperature).softmax(0) for x in (blended, y))
    assert out.stats.guessed == rows
    assert within(out.stats.right, rows, coupled(p, q))
    assert out.stats.right == int(out.tokens_by_draft.sum())


def test_tokens_with_a_draft_are_draws_of_the_target() -> None:
    """A draft that is often wrong biases nothing: second tokens have the blend's distribution."""
    target, other = near(0.0), near(0.3)
    rows, prompt = 3000, [1, 3, 2]
    how = {**SAMPLED, "seed": 3, "max_batch": rows}
    out = cf.generate(
        target, [prompt] * rows, draft=cf.Draft(other, length=2), max_new_tokens=3, **how
    )
    counts: dict[int, list[int]] = {}
    for first, second, _ in out.responses:
        counts.setdefault(first, []).append(second)
    for first, seconds in counts.items():
        with torch.no_grad():
            p = target(torch.tensor([[*prompt, first]])).logits[0, -1].double().softmax(0)
        for token, chance in enumerate(p.tolist()):
            assert within(seconds.count(token), len(seconds), chance)
    assert 0.1 < out.stats.acceptance < 0.95
