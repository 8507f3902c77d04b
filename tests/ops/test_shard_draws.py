"""What a shard of a vocabulary tells of a draw, on every backend and in the emulated CUDA kernels.

The columns of a shard begin with any token of the vocabulary. Their scores are blended as those of
the whole vocabulary are, with its normalisers, and drawn with its noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import INF, NAN, Backend, Problem, mean_weights, normal, problem
from crossfade.ops import Draw, Inputs, Part, Support, reference
from crossfade.ops.types import ShardDraw
from emulated_cuda import EmulatedCuda
from numpy_noise import GROUP, group_words, gumbel, noise_words
from sweeps import product
from torch import Tensor

Blender = Backend | EmulatedCuda

FIRST_TOKENS = [0, 256, 300, 25129]
VOCABULARIES = [1, 3, 256, 257, 1000]
MAX, LOG_SUM, LOG_MASS, GROUP_MASS, GROUP_NOISE, BELOW, TOKEN_NOISE = range(7)
CLOSE = {"atol": 5e-5, "rtol": 0.0, "equal_nan": True}  # scores are some 20, and divided by 1/2


def inputs_of(p: Problem, log_z: Tensor | None = None) -> Inputs:
    inputs = Inputs(*p.args, **p.options)
    inputs.log_z = log_z
    return inputs


def normalisers(p: Problem) -> Tensor:
    return torch.stack([z.logsumexp(dim=-1) for z in p.logits], dim=1)


def ids(rows: int, device: str) -> dict[str, Any]:
    count = torch.arange(rows, device=device)
    return {"seed": 2**63 - 1 - count, "stream": count << 33, "step": 7 + count}


def temperatures(*each: float, device: str) -> Tensor:
    return torch.tensor(each, device=device)


def assert_agrees(blender: Blender, inputs: Inputs, draw: Draw) -> ShardDraw:
    """Checks a backend's draw against the reference's, and returns it."""
    got, want = blender.draw_shard(inputs, draw), reference.draw_shard(inputs, draw)
    assert got.tokens.dtype == torch.int64
    assert got.tokens.tolist() == want.tokens.tolist()
    assert (got.facts.dtype, got.facts.shape) == (torch.float32, (inputs.rows, 7))
    torch.testing.assert_close(got.facts, want.facts, **CLOSE)
    return got


def assert_scores_agree(blender: Blender, inputs: Inputs) -> Tensor:
    """The same of scores that are not normalised."""
    got, want = blender.raw_scores(inputs), reference.blend(inputs, raw=True)
    assert (got.dtype, got.shape) == (torch.float32, (inputs.rows, inputs.vocab_size))
    torch.testing.assert_close(got, want, **CLOSE)
    return got


# ---- Draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "first_token"), product(VOCABULARIES, FIRST_TOKENS, together=1), ids=str
)
def test_vocabularies(blender: Blender, vocab: int, first_token: int) -> None:
    """Rows that are sampled, greedy, without tokens, and bad, each with its own settings."""
    device = blender.device
    p = problem(blender, vocab=vocab, rows=6, values=1)
    p.logits[0][3] = -INF
    p.logits[1][4, vocab // 2] = NAN
    t = temperatures(0.5, 0.0, 1.0, 1.0, 1.0, 1.7, device=device)
    draw = Draw(inputs := inputs_of(p), t, first_token=first_token, **ids(6, device))
    got = assert_agrees(blender, inputs, draw)
    drawn = got.tokens[[0, 1, 2, 5]]
    assert bool(((drawn >= first_token) & (drawn < first_token + vocab)).all())
    assert got.tokens[3:5].tolist() == [-1, -1]
    assert got.facts[3].tolist() == [-INF, -INF, -INF, -INF, 0.0, -INF, 0.0]
    assert got.facts[4].isnan().all()
    assert got.facts[1, GROUP_MASS:].tolist() == [0.0, 0.0, 0.0, 0.0]  # that of the best token


@pytest.mark.parametrize("first_token", FIRST_TOKENS)
def test_noise(blender: Blender, first_token: int) -> None:
    """A second implementation, in numpy: a group by its mass, then one of its tokens."""
    vocab, rows, t = 1000, 3 if blender == Backend("triton", "cpu") else 12, 1.5
    row = normal(1, vocab, 5, scale=1.0)
    inputs = Inputs([row.expand(rows, -1).to(blender.device)], [1.0])
    stream = torch.arange(rows, device=blender.device)
    draw = Draw(inputs, t, seed=3, stream=stream, step=9, first_token=first_token)
    got = blender.draw_shard(inputs, draw)

    score = row[0].double().numpy()
    top, groups = score.max(), range(0, vocab, GROUP)
    x = (score - top) / t
    mass = np.array([np.logaddexp.reduce(x[j : j + GROUP]) for j in groups])
    skipped, streams = first_token // GROUP, np.arange(rows)
    of_groups = gumbel(group_words(3, streams, 9, skipped + len(mass)))[:, skipped:]
    of_tokens = gumbel(noise_words(3, streams, 9, first_token + vocab))[:, first_token:]
    for b in range(rows):
        group = int((mass + of_groups[b]).argmax())
        noisy = np.where(np.arange(vocab) // GROUP == group, x + of_tokens[b], -np.inf)
        v = int(noisy.argmax())
        assert int(got.tokens[b]) == first_token + v
        log_sum, log_mass = np.logaddexp.reduce(score - top), np.logaddexp.reduce(x)
        won = mass[group], of_groups[b, group], score[v] - top, of_tokens[b, v]
        want = torch.tensor([top, log_sum, log_mass, *won], dtype=torch.float32)
        torch.testing.assert_close(got.facts[b].cpu(), want, **CLOSE)


def test_a_shard_of_all_tokens_draws_as_blend_sample(blender: Blender) -> None:
    """To the last bit of its tokens, and log-probs follow from the facts."""
    p = problem(blender, vocab=700, rows=3)
    t = temperatures(0.0, 0.7, 2.0, device=blender.device)
    settings = ids(3, blender.device)
    out = blender.blend_sample(*p.args, **p.options, temperature=t, **settings)
    got = blender.draw_shard(inputs := inputs_of(p), Draw(inputs, t, **settings))
    facts = got.facts
    assert torch.equal(got.tokens, out.tokens)
    torch.testing.assert_close(facts[:, BELOW] - facts[:, LOG_SUM], out.logprobs, **CLOSE)
    sampled = facts[:, BELOW] / t - facts[:, LOG_MASS]
    torch.testing.assert_close(sampled[1:], out.sampled_logprobs[1:], **CLOSE)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"temperature": 0.0}, {}], ids=str)
def test_settings_of_all_rows(blender: Blender, settings: dict[str, Any]) -> None:
    p = problem(blender, vocab=300, rows=3)
    p.logits[0][1] = -INF
    inputs = inputs_of(p)
    draw = Draw(inputs, **settings, seed=2**64 - 5, stream=2**63, step=2**31, first_token=301)
    assert_agrees(blender, inputs, draw)


def test_bad_settings_spoil_their_row(blender: Blender) -> None:
    """Also one in which no token is left."""
    p = problem(blender, vocab=64, rows=4)
    p.logits[0][2:] = -INF
    t = temperatures(1.0, NAN, -1.0, 1.0, device=blender.device)
    got = assert_agrees(blender, inputs := inputs_of(p), Draw(inputs, t, seed=1, step=0))
    assert got.facts[:, MAX].isnan().tolist() == [False, True, True, False]


def test_ties_go_to_the_lowest_token(blender: Blender) -> None:
    p = problem(blender, terms=1, vocab=1000, rows=3)
    p.weights = [1.0]
    p.logits[0][0, [700, 999, 301]] = 50.0
    p.logits[0][1, [256, 255]] = 50.0
    p.logits[0][2] = 0.0
    draw = Draw(inputs := inputs_of(p), 0.0, seed=1, step=0, first_token=7)
    assert assert_agrees(blender, inputs, draw).tokens.tolist() == [308, 262, 7]


def test_no_rows(blender: Blender) -> None:
    p = problem(blender, vocab=8, rows=0)
    draw = Draw(inputs := inputs_of(p), seed=1, step=0, first_token=3)
    assert blender.draw_shard(inputs, draw).facts.shape == (0, 7)
    assert blender.raw_scores(inputs).shape == (0, 8)


# ---- Blends --------------------------------------------------------------------------------------

WIDTH = 250  # tokens: numpy would warn of a whole group of NaN
PARTS = [Part([0.5, -0.5, 0.0], min=-2.0, max=1.0), Part([0.25, 0.25, 0.5], -INF)]


def kinds(device: str) -> dict[str, dict[str, Any]]:
    """Options of a problem of three terms and four rows."""
    mask = normal(4, WIDTH, 5) > -2.0
    mask[2] = False  # no token is left
    return {
        "mask": {"mask": mask.to(device), "values": 2},
        "mixture": {"power": 1.0, "values": 1},
        "harmonic": {"power": -1.0, "mask": mask.to(device)},
        "union": {"power": INF},
        "parts": {"parts": PARTS, "mask": mask.to(device)},
        "mean and parts": {"parts": PARTS, "power": 0.5, "values": 1},
    }


KINDS = list(kinds("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_blends(blender: Blender, kind: str) -> None:
    """With normalisers that are of more columns, and NaN where those are no distribution."""
    device = blender.device
    p = problem(blender, vocab=WIDTH, **kinds(device)[kind])
    log_z = normalisers(p) + normal(4, 3, 8, scale=1.0, device=device).abs()
    if kind != "mask":
        log_z[3, 1] = NAN
    inputs = inputs_of(p, log_z)
    t = temperatures(0.8, 0.0, 1.0, 1.0, device=device)
    draw = Draw(inputs, t, first_token=25129, **ids(4, device))
    got = assert_agrees(blender, inputs, draw)
    scores = assert_scores_agree(blender, inputs)
    assert got.facts[:, MAX].isnan().tolist() == [False, False, False, kind != "mask"]
    torch.testing.assert_close(scores.amax(dim=-1), got.facts[:, MAX], **CLOSE)
    assert got.tokens[:3].ge(0).tolist() == [True, True, "mask" not in p.options]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_have_the_scores_of_the_whole(blender: Blender, kind: str) -> None:
    """Where they know its normalisers, which are not those of their own columns."""
    p = problem(blender, vocab=WIDTH, **kinds(blender.device)[kind])
    whole, scores = blender.raw_scores(inputs_of(p)), []
    for part in (slice(0, 131), slice(131, WIDTH)):
        values = [q[:, part] for q in p.values]
        options = dict(p.options)
        if "mask" in options:
            options["mask"] = options["mask"][:, part]
        shard = Problem([z[:, part] for z in p.logits], p.weights, values, p.value_weights, options)
        shard.options["vocab_size"] = None
        scores.append(blender.raw_scores(inputs_of(shard, normalisers(p))))
    torch.testing.assert_close(torch.cat(scores, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("options", [{"power": 1.0}, {"parts": PARTS[:1]}], ids=str)
def test_normalisers_that_are_not_finite(blender: Blender, options: dict[str, Any]) -> None:
    """Those of a term that has a weight spoil their row; others are not looked at."""
    p = problem(blender, vocab=70, rows=4, **options)
    if "power" in options:
        p.weights = [*mean_weights(1, 2, 1)[0].tolist(), 0.0]
    log_z = normalisers(p)
    log_z[0, 2] = NAN
    log_z[1, 1] = NAN
    if blender != Backend("reference", "cpu"):
        log_z[2, 0], log_z[3, 1] = INF, -INF
    scores = blender.raw_scores(inputs_of(p, log_z))
    bad = [False, True] if blender == Backend("reference", "cpu") else [False, True, True, True]
    assert scores.isnan().all(dim=1).tolist()[: len(bad)] == bad
    assert scores[0].isfinite().all()


def test_scores_of_rows_that_are_bad_or_empty(blender: Blender) -> None:
    """Normalised, both are bad; a support that has no distribution to cut spoils its row."""
    p = problem(blender, vocab=300, rows=5, values=1)
    p.logits[0][1] = -INF
    p.logits[1][2, 299] = NAN
    p.values[0][3, 0] = INF
    scores = assert_scores_agree(blender, inputs_of(p))
    assert (scores[1] == -INF).all()
    assert scores.isnan().all(dim=1).tolist() == [False, False, True, True, False]
    torch.testing.assert_close(
        scores.log_softmax(dim=-1), blender.blend(*p.args, **p.options), **CLOSE
    )
    p = problem(blender, vocab=300, rows=2, support=Support(term=2, top_k=9))
    p.logits[2][1] = -INF
    scores = assert_scores_agree(blender, inputs_of(p))
    assert (scores[0] > -INF).sum() == 9
    draw = Draw(inputs := inputs_of(p), seed=1, step=0, first_token=3)
    assert assert_agrees(blender, inputs, draw).facts[1].isnan().all()
