"""Draws come as often as they should, and independently along steps, streams and seeds.

Chi-square with pooled tails, as a comparison of the large probabilities misses a bug in the tail;
also of groups alone, and of tokens given their group. Seeds are fixed, so that a result repeats;
with fresh ones a correct sampler would fail a test with the probability LEVEL, or a few times that.
"""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Backend, normal
from frequencies import (
    CUTS,
    VOCABULARIES,
    Row,
    cut_of,
    flat,
    lattice,
    p_value,
    p_values,
    row,
    truncated,
    zipf,
)
from numpy_noise import GROUP
from scipy.stats import chi2_contingency
from sweeps import product
from torch import Tensor

LEVEL = 1e-4
VOCAB = 24
WEIGHTS = (1.0, 0.6, -0.6)


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


def test_p_values_tell_the_levels_apart() -> None:
    """A fault of groups is not one within them, nor the reverse; an impossible token is both."""
    r = row(50_257, "plain")
    probability = r.probability.numpy()
    seen = np.random.default_rng(0).multinomial(50_000, probability).astype(float)
    assert min(p_values(seen, probability).values()) > LEVEL

    groups = seen.copy()
    groups[: 20 * GROUP] = np.floor(groups[: 20 * GROUP] * 0.9)  # fewer draws of many groups
    found = p_values(groups, probability)
    assert found["groups"] < LEVEL < found["within"]

    within = np.zeros_like(seen)  # all groups as often as they should be, their first token most
    for first in range(0, len(seen), GROUP):
        part = probability[first : first + GROUP]
        if part.any():
            tokens = np.flatnonzero(part) + first
            within[tokens] = seen[tokens]
            moved = np.floor(seen[tokens[1:]] * 0.1)
            within[tokens[1:]] -= moved
            within[tokens[0]] += moved.sum()
    found = p_values(within, probability)
    assert found["within"] < LEVEL < found["groups"]

    seen[np.flatnonzero(probability == 0)[0]] += 1
    found = p_values(seen, probability)
    assert (found["tokens"], found["within"]) == (0, 0)


def draw(backend: Backend, z: list[Tensor], weights: Any, count: int, **settings: Any) -> Tensor:
    """`count` tokens, drawn from one row of logits that is expanded to as many."""
    if backend.interpreted:
        pytest.skip("too slow; its draws are compared with the reference's one by one")
    logits = [t.to(backend.device).expand(count, -1) for t in z]
    settings = {"seed": 12, "stream": 3, "step": 5, **settings}
    settings[settings.pop("axis", "step")] = torch.arange(count, device=backend.device)
    return backend.blend_sample(logits, weights, **settings).tokens


def draws(backend: Backend, count: int) -> int:
    """As many draws, or an eighth with the reference, which makes noise for whole groups slowly."""
    return count // 8 if backend.name == "reference" else count


def draw_row(backend: Backend, r: Row, count: int, **settings: Any) -> Tensor:
    options = {**r.options, **settings}
    if "mask" in options:
        options["mask"] = options["mask"].to(backend.device)
    return draw(backend, [r.logits], [1.0], draws(backend, count), **options)


ALONG = [(cut, "step") for cut in CUTS]
ALONG += [(cut, axis) for cut in ("plain", "all") for axis in ("stream", "seed")]


@pytest.mark.parametrize(("cut", "axis"), ALONG)
def test_geometric_blend(backend: Backend, cut: str, axis: str) -> None:
    z = [normal(1, VOCAB, k, scale=1.5) for k in range(3)]
    log_p = sum(w * t.double() for w, t in zip(WEIGHTS, z, strict=True))
    assert isinstance(log_p, Tensor)
    chosen = cut_of(cut, VOCAB)
    probability = truncated(log_p[0].log_softmax(dim=-1), chosen)
    drawn = draw(backend, z, WEIGHTS, draws(backend, 50_000), axis=axis, **chosen)
    assert p_value(drawn, probability) > LEVEL


@pytest.mark.parametrize("cut", ["plain", "all"])
def test_mixture(backend: Backend, cut: str) -> None:
    z = [normal(1, VOCAB, k, scale=1.5) for k in range(2)]
    p = [t[0].double().softmax(dim=-1) for t in z]
    chosen = cut_of(cut, VOCAB)
    probability = truncated((0.3 * p[0] + 0.7 * p[1]).log(), chosen)
    drawn = draw(backend, z, [0.3, 0.7], draws(backend, 50_000), power=1.0, **chosen)
    assert p_value(drawn, probability) > LEVEL


def assert_exact(backend: Backend, r: Row, count: int) -> None:
    if backend.name == "reference" and r.logits.shape[1] > 2000:
        pytest.skip("too slow; what kernels draw is compared with it one by one")
    drawn = draw_row(backend, r, count).cpu().numpy()
    seen = np.bincount(drawn, minlength=len(r.probability)).astype(float)
    found = p_values(seen, r.probability.numpy())
    assert min(found.values()) > LEVEL, found


@pytest.mark.parametrize(("vocab", "cut"), product(VOCABULARIES, CUTS, together=1))
def test_groups_and_their_tokens(backend: Backend, vocab: int, cut: str) -> None:
    """Over one group, over two of which one is a single token, and over hundreds."""
    assert_exact(backend, row(vocab, cut), 30_000 if vocab < 2000 else 4000)


@pytest.mark.parametrize("shape", [zipf, flat])
@pytest.mark.parametrize("vocab", [300, 50_257])
def test_whole_rows(backend: Backend, vocab: int, shape: Any) -> None:
    assert_exact(backend, shape(vocab), 20_000 if vocab < 2000 else 5000)


# ---- Independence --------------------------------------------------------------------------------


def assert_independent(one: np.ndarray, other: np.ndarray) -> None:
    """By a contingency table, whose rows and columns are what was drawn at all."""
    (_, i), (_, j) = (np.unique(x, return_inverse=True) for x in (one, other))
    table = np.zeros((i.max() + 1, j.max() + 1))
    np.add.at(table, (i, j), 1)
    assert min(table.shape) > 1
    assert chi2_contingency(table).pvalue > LEVEL


@pytest.mark.parametrize("axis", ["step", "stream", "seed"])
def test_tokens_do_not_depend_on_groups(backend: Backend, axis: str) -> None:
    """Which place within its group a token has says nothing of its group, and all come as often.

    Group j must not have the noise of token j, nor that of its own first token.
    """
    r = lattice(6, 6)
    drawn = draw_row(backend, r, 20_000, axis=axis).cpu().numpy()
    assert_independent(drawn // GROUP, drawn % GROUP)
    found = p_values(np.bincount(drawn, minlength=len(r.probability)), r.probability.numpy())
    assert min(found.values()) > LEVEL, found


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
    """A draw says nothing of the one beside it, along each part of the counter."""
    r = lattice(5, 3)
    one, other = (draw_row(backend, r, 20_000, **shift).cpu().numpy() for shift in PAIRS[pair])
    assert_independent(one // GROUP, other // GROUP)
    assert_independent(one % GROUP, other % GROUP)
    assert_independent(one, other)


@pytest.mark.parametrize("axis", ["step", "stream", "seed"])
def test_draws_do_not_remember(backend: Backend, axis: str) -> None:
    """A draw says nothing of the next, nor of the fourth after it."""
    drawn = draw_row(backend, lattice(5, 3), 20_000, axis=axis).cpu().numpy()
    for lag in (1, 4):
        assert_independent(drawn[:-lag] // GROUP, drawn[lag:] // GROUP)
        assert_independent(drawn[:-lag] % GROUP, drawn[lag:] % GROUP)
        assert_independent(drawn[:-lag], drawn[lag:])
