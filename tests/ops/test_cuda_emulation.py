"""The CUDA kernels' logic without a GPU: compiled for the CPU and run thread by thread.

tests/cuda_emulation says how. Every barrier, shuffle and cluster read of csrc/cuda is executed, by
threads that drift as far apart as barriers let them, in shared memory that is full of NaN at the
start. What only hardware shows (memory ordering, speed) is left to the GPU tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batches import tensors
from cases import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    Problem,
    assert_blend_agrees,
    assert_samples_agree,
    lay_out,
    mean_weights,
    normal,
    problem,
)
from crossfade.ops import Part, Support
from emulated_cuda import EmulatedCuda
from numpy_noise import GROUP, group_words, gumbel, gumbel_max
from sweeps import every, product
from torch import Tensor

# Blocks of a team and their threads: one block as before Hopper, then clusters.
TEAMS = [(1, 64), (2, 64), (4, 32), (8, 32)]


@pytest.fixture(params=TEAMS, ids=lambda team: f"{team[0]}x{team[1]}")
def cuda(request: pytest.FixtureRequest, library: Any) -> EmulatedCuda:
    return EmulatedCuda(library, *request.param)


@pytest.fixture
def pair(library: Any) -> EmulatedCuda:
    """A cluster of two, for what does not depend on the team."""
    return EmulatedCuda(library, 2, 64)


SAMPLE = {"seed": 3, "stream": 5, "step": 7}
TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"top_k": 11, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.9, "temperature": 2.0},
]

FEW_TRUNCATIONS: list[dict[str, Any]] = [{}, {"top_k": 12, "top_p": 0.9}, {"top_p": 0.6}]


# ---- Tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "layout"), product(DTYPES, LAYOUTS, together=1), ids=str)
def test_layouts(pair: EmulatedCuda, dtype: torch.dtype, layout: str) -> None:
    """300 is a multiple of 4 and not of 8, so half the rows of 16-bit logits start unaligned."""
    p = problem(pair, vocab=300, values=2, dtype=dtype, layout=layout)
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, **SAMPLE)


@pytest.mark.parametrize(("dtype", "terms"), product(DTYPES, [1, 3, 4], together=1), ids=str)
def test_aligned_rows(cuda: EmulatedCuda, dtype: torch.dtype, terms: int) -> None:
    """A few inputs of one dtype have a kernel of their own. One of them has no weight."""
    for vocab, rows in ((1040, 2), (1028, 1)):
        p = problem(cuda, terms=terms, vocab=vocab, rows=rows, values=4 - terms, dtype=dtype)
        if terms == 4:
            p.weights = [1.0, 0.0, 0.3, -0.5]
            p.logits[1][:] = INF
        assert_samples_agree(cuda, p, **SAMPLE)
        assert_samples_agree(cuda, p, top_k=9, top_p=0.9, temperature=0.8, **SAMPLE)
    mask = torch.arange(1040) % 3 > 0
    support = Support(top_k=99, term=terms - 1)
    p = problem(cuda, terms=terms, vocab=1040, dtype=dtype, mask=mask, support=support)
    assert_samples_agree(cuda, p, top_p=0.8, **SAMPLE)


@pytest.mark.parametrize(
    "vocab", every(3, [1, 7, 8, 37, 255, 256, 257, 511, 1031, 5000], keep=[256])
)
def test_vocabularies(cuda: EmulatedCuda, vocab: int) -> None:
    """Rows of one thread, of one group and of several rounds, which end within a group or not."""
    p = problem(cuda, vocab=vocab, rows=2)
    assert_blend_agrees(cuda, p)
    assert_samples_agree(cuda, p, **SAMPLE)
    assert_samples_agree(cuda, p, top_k=5, top_p=0.9, **SAMPLE)


@pytest.mark.parametrize("settings", every(2, TRUNCATIONS), ids=str)
def test_truncation(cuda: EmulatedCuda, settings: dict[str, Any]) -> None:
    """Lists settle peaked rows; the radix search settles flat ones, and k beyond the lists."""
    for scale in (0.3, 3.0):
        p = problem(cuda, vocab=1031, rows=1)
        p.logits = [z * scale for z in p.logits]
        assert_samples_agree(cuda, p, **SAMPLE, **settings)


def test_a_warp_lists_many_groups(library: Any) -> None:
    """The tokens that stay lie in 47 groups, of which a lone warp enters 32 at once."""
    cuda = EmulatedCuda(library, 1, 32)
    p = problem(cuda, terms=1, vocab=12_000, rows=8)
    p.weights = [1.0]
    best = torch.arange(47) * 257  # one of each group
    p.logits[0][:, best] = 20.0 + normal(8, 47, 3, scale=0.1)
    p.logits[0][:, best[5]] = 21.0
    steps = torch.arange(8)
    got = assert_samples_agree(cuda, p, **{**SAMPLE, "step": steps}, min_p=0.1)
    assert (got.tokens // 256 >= 32).any()
    p.logits[0][:, best] = 20.0
    got = assert_samples_agree(cuda, p, **{**SAMPLE, "step": steps}, top_k=40)
    assert (got.tokens // 256 >= 32).any()


@pytest.mark.parametrize(
    ("terms", "power"), product([1, 2, 5, 16], [0.0, 1.0, -1.0, 0.5, INF, -INF], together=1)
)
def test_terms_and_powers(pair: EmulatedCuda, terms: int, power: float) -> None:
    p = problem(pair, terms=terms, vocab=259, rows=2, values=terms % 3, power=power)
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, top_p=0.9, **SAMPLE)


SUPPORTS = [
    Support(term=1, top_k=3),
    Support(term=1, top_k=250),
    Support(term=0, top_p=0.8),
    Support(term=2, min_p=0.1),
    Support(term=1, top_k=40, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize(("support", "power"), product(SUPPORTS, [0.0, 1.0], together=1), ids=str)
def test_support(cuda: EmulatedCuda, support: Support, power: float) -> None:
    p = problem(cuda, vocab=530, rows=2, power=power, support=support, values=1)
    assert_blend_agrees(cuda, p)
    assert_samples_agree(cuda, p, top_k=9, **SAMPLE)


@pytest.mark.parametrize("power", [0.0, -1.0])
def test_parts(pair: EmulatedCuda, power: float) -> None:
    """Clamped sums and a union, under a support, with weights of each row; some rows are bad."""
    own = normal(4, 3, 3, scale=0.5)
    own[2, 1] = NAN
    parts = [Part(own, min=-1.0, max=0.5), Part([0.0, -0.5, -0.25], INF), Part([0, 1, -1.0])]
    p = problem(pair, vocab=259, values=1, power=power, parts=parts, support=Support(top_k=99))
    p.logits[1][:, 10:20] = p.logits[2][:, 15:30] = -INF
    p.logits[2][1, 5] = NAN
    assert_blend_agrees(pair, p)
    got = assert_samples_agree(pair, p, top_p=0.9, **SAMPLE)
    assert (got.tokens < 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("per_row", [False, True])
def test_mask(pair: EmulatedCuda, per_row: bool) -> None:
    """Unaligned masks, one for all rows or one for each; one that leaves nothing spoils its row."""
    mask = normal(4, 301, 5)[:, 1:] > 0
    mask[2] = False
    p = problem(pair, vocab=300, mask=mask if per_row else mask[0])
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, top_k=4, **SAMPLE)


def one_term(rows: Tensor) -> Problem:
    """Scores that are these logits."""
    return Problem([rows], [1.0])


def draw_streams(cuda: EmulatedCuda, row: Tensor, streams: Tensor, **settings: Any) -> Tensor:
    """The tokens that a row of scores draws, one for each stream."""
    p = one_term(row.expand(len(streams), -1))
    return cuda.blend_sample(*p.args, seed=3, stream=streams, step=7, **settings).tokens


@pytest.mark.parametrize("vocab", every(3, [7, 255, 256, 257, 511, 5000], keep=[5000]))
def test_tokens_are_those_of_two_levels_of_noise(cuda: EmulatedCuda, vocab: int) -> None:
    """A second implementation draws the same tokens, whether groups are whole or not."""
    row, streams = normal(1, vocab, 21, scale=1.0)[0], torch.arange(12)
    for t in (1.0, 2.5):
        got = draw_streams(cuda, row, streams, temperature=t)
        want = gumbel_max(row.double().numpy() / t, 3, streams.numpy(), 7)
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("settings", [{}, {"min_p": 1e-9}], ids=str)
@pytest.mark.parametrize("team", [(1, 32), *TEAMS], ids=str)
def test_noise_of_groups(library: Any, team: tuple[int, int], settings: dict[str, Any]) -> None:
    """With one token in each group, and none in some, the noise of groups decides alone.

    A warp that reads the row alone has more groups than it has lanes to keep them.
    """
    cuda = EmulatedCuda(library, *team)
    groups, streams = 41, np.arange(24)
    token = GROUP * np.arange(groups) + np.arange(groups) * 37 % GROUP
    token = np.delete(token, [0, 7, 8, 39])  # all of these groups' tokens are removed
    score = normal(1, len(token), 22, scale=0.5)[0]
    row = torch.full((groups * GROUP - 5,), -INF)
    row[torch.from_numpy(token)] = score
    noise = gumbel(group_words(3, streams, 7, groups))[:, token // GROUP]
    want = token[(score.double().numpy() + noise).argmax(axis=1)]
    got = draw_streams(cuda, row, torch.from_numpy(streams), **settings)
    assert got.tolist() == want.tolist()
    assert len({*want.tolist()}) > 10


@pytest.mark.parametrize("settings", TRUNCATIONS[::2], ids=str)
def test_teams_draw_the_same_tokens(library: Any, settings: dict[str, Any]) -> None:
    """Whatever the team, the order of its threads, and whether its lists settle the truncation."""
    p = one_term(normal(12, 2700, 23))
    p.logits[0][:4] *= 0.1
    p.logits[0][:, 512:800] = -INF
    ids = {"seed": 3, "stream": torch.arange(12), "step": 7}
    teams = [(1, 32), (1, 256), (16, 32), *TEAMS]
    drawn = [
        EmulatedCuda(library, *team, order).blend_sample(*p.args, **ids, **settings).tokens
        for order, team in enumerate(teams)
    ]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)
    assert_samples_agree(EmulatedCuda(library, 4, 64), p, **ids, **settings)


def test_greedy(cuda: EmulatedCuda) -> None:
    """Ties go to the lowest id, also across threads, groups and blocks."""
    p = problem(cuda, terms=1, vocab=1031, rows=5)
    p.weights = [1.0]
    p.logits[0].round_()
    p.logits[0][1] = 0.0
    p.logits[0][2, [40, 700, 1030]] = 50.0
    p.logits[0][3, [256, 255]] = 50.0
    p.logits[0][4, [1030, 777, 770]] = 50.0
    got = assert_samples_agree(cuda, p, do_sample=False, **SAMPLE)
    assert got.tokens[1:].tolist() == [0, 40, 255, 770]


def test_settings_of_each_row(pair: EmulatedCuda) -> None:
    p = problem(pair, vocab=300, rows=6, values=1)
    p.weights = normal(6, 3, 1)
    p.value_weights = normal(6, 4, 2)[:, :1]
    settings = {
        "temperature": torch.tensor([0.1, 1.0, 0.7, 1.5, 1e-30, 1e30]),
        "top_k": torch.tensor([0, 1, 5, 0, 400, 0]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 0.3, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.02, 1.0, 0.0, 0.0]),
        "seed": torch.arange(6) - 3,
        "stream": torch.arange(6) << 33,
        "step": torch.arange(6),
    }
    assert_samples_agree(pair, p, **settings)


def test_bad_settings_spoil_their_row(pair: EmulatedCuda) -> None:
    p = problem(pair, vocab=64, rows=8)
    settings = {
        "temperature": torch.tensor([1.0, -0.5, -1.0, NAN, INF, 1.0, 1.0, 1.0]),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.0, NAN]),
        "top_k": torch.tensor([0, 0, 0, 0, 0, 0, -1, 0]),
    }
    got = assert_samples_agree(pair, p, **settings, **SAMPLE)
    assert (got.tokens >= 0).tolist() == [True] + [False] * 7


def adversarial(vocab: int) -> Tensor:
    """Rows that break samplers, each in a way of its own."""
    x = normal(12, vocab, 11)
    x[0] = 0.0  # all tie: the lists overflow
    x[1] = -INF
    x[1, vocab // 2] = 1.0
    x[2, ::2] = -INF
    x[3] = x[3].round()  # ties at every threshold
    x[4] *= 1e4
    x[5] *= 1e-40  # denormal
    x[6, 17] = NAN
    x[7] = -INF
    x[8, 5] = INF
    x[9] = x[9].sort().values  # ascending: each round beats the last
    x[10] = torch.where(torch.arange(vocab) < 20, 10.0, -1e4)
    x[11] = 1e30
    return x


@pytest.mark.parametrize(
    ("power", "settings"),
    product([0.0, 1.0, -1.0, INF, -INF], FEW_TRUNCATIONS, together=1),
    ids=str,
)
def test_adversarial_rows(pair: EmulatedCuda, power: float, settings: dict[str, Any]) -> None:
    p = problem(pair, terms=2, vocab=530, rows=12, power=power)
    p.logits = [lay_out(adversarial(530), "sliced"), adversarial(530).roll(3, dims=0)]
    p.weights = [0.75, 0.25] if power else [1.5, -0.5]
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, **SAMPLE, **settings)
    p.logits[1] = torch.zeros(12, 530)
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, **SAMPLE, **settings)


def test_lists_that_overflow(library: Any) -> None:
    """Ascending scores put every token of every round on the list: the radix search takes over."""
    cuda = EmulatedCuda(library, 1, 64)
    p = problem(cuda, terms=1, vocab=5000, rows=2)
    p.weights = [1.0]
    p.logits = [p.logits[0].sort().values]
    p.logits[0][1, 100:] = 3.0
    for settings in ({"top_k": 20}, {"top_p": 0.5}, {"top_k": 30, "top_p": 0.5, "min_p": 0.2}):
        assert_samples_agree(cuda, p, **SAMPLE, **settings)


def flat(vocab: int) -> Tensor:
    """Rows in which top-p keeps more tokens than lists can show to be the best."""
    x = normal(8, vocab, 24, scale=0.3)
    x[1] = 0.0  # all tie: the bin of the threshold has too many tokens to list
    x[2] = torch.where(torch.arange(vocab) % 5 < 2, 0.0, -1.0)  # two levels, as many
    x[3] = x[3].sort().values
    x[4] *= 1e-40  # denormal: all are about as likely, and in one bin
    x[5] = 1e30  # no room for bins
    x[6, 256:1024] = -INF
    x[7] = (x[7] * 20).round() / 20  # ties at every threshold
    return x


@pytest.mark.parametrize(("p", "temperature"), [(0.5, 1.7), (0.999, 1.0)])
def test_flat_rows_under_top_p(cuda: EmulatedCuda, p: float, temperature: float) -> None:
    """The edge of the nucleus is found by even bins, or else by the radix search."""
    rows = one_term(flat(2603))
    assert_samples_agree(cuda, rows, top_p=p, temperature=temperature, **SAMPLE)
    sure = [0, 3, 6]  # rows whose edge is a few tokens wide: the same from any team
    drawn = [
        one.blend_sample(*rows.args, top_p=p, temperature=temperature, **SAMPLE).tokens[sure]
        for one in (cuda, EmulatedCuda(cuda.library, 1, 128))
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_edges_that_hold_much_of_the_mass(cuda: EmulatedCuda, p: float) -> None:
    """A bin of 405 tokens, of which some stay: their groups are read and entered once more."""
    row = torch.full((2603,), -30.0)
    row[:1024:8] = 0.5  # these stay for sure, and hold a third of the mass
    row[896:2516:4] = normal(1, 405, 25, scale=1e-4)[0] - 0.002
    rows = one_term(row.expand(12, -1))
    ids = {"seed": 3, "stream": torch.arange(12), "step": 7}
    got = assert_samples_agree(cuda, rows, top_p=p, **ids)
    assert int((got.tokens >= 1024).sum()) > 3


@pytest.mark.parametrize("settings", [{"top_k": 2000}, {"top_k": 1500, "top_p": 0.9}], ids=str)
def test_large_k(cuda: EmulatedCuda, settings: dict[str, Any]) -> None:
    assert_samples_agree(cuda, one_term(flat(2603)), **settings, **SAMPLE)


def test_edges_that_are_too_wide(library: Any) -> None:
    """One token more than a block's list holds, all of them in the bin of the threshold."""
    for vocab in (1919, 1920, 1921, 1925):
        rows = one_term(torch.zeros(1, vocab))
        assert_samples_agree(EmulatedCuda(library, 1, 64), rows, top_p=0.5, **SAMPLE)


def test_strides(pair: EmulatedCuda) -> None:
    """One row for all (stride 0), a column slice, mixed dtypes, and padding that is never read."""
    rows, vocab = 5, 201
    logits = [
        normal(1, vocab, 1).expand(rows, vocab),
        normal(rows, 2 * vocab + 1, 2, dtype=torch.bfloat16)[:, 1 : 1 + vocab],
        lay_out(normal(rows, vocab, 3, dtype=torch.float16), "padded"),
    ]
    p = problem(pair, vocab=vocab, rows=rows)
    p.logits = logits
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, top_k=3, **SAMPLE)


def test_weights(pair: EmulatedCuda) -> None:
    """A term of weight 0 is left out, NaN and all; a bad weight spoils its row."""
    p = problem(pair, vocab=70, rows=4)
    p.logits[1][0, 3] = NAN
    p.weights = torch.tensor([[1.0, 0.0, 2.0], [NAN, 1, 1], [INF, 0, 0], [0.0, 0.0, 0.0]])
    assert_blend_agrees(pair, p)
    assert_samples_agree(pair, p, **SAMPLE)
    p = problem(pair, vocab=70, rows=4, power=1.0)
    p.weights = mean_weights(4, 3, 1)
    p.weights[1, 0] += 0.5
    p.weights[2] = torch.tensor([1.5, -0.5, 0.0])
    assert_blend_agrees(pair, p)


def test_empty_batch(pair: EmulatedCuda) -> None:
    p = problem(pair, vocab=8, rows=0)
    assert pair.blend(*p.args, **p.options).shape == (0, 8)
    assert pair.blend_sample(*p.args, **p.options, **SAMPLE).tokens.shape == (0,)


def test_results_do_not_depend_on_the_order_of_threads(library: Any) -> None:
    """Equal to the last bit: sums are made in a fixed order or in fixed point."""
    p = problem(EmulatedCuda(library, 2, 64), vocab=1500, rows=2)
    results = []
    for order in (1, 2, 3):
        cuda = EmulatedCuda(library, 2, 64, order)
        for settings in ({}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.99, "temperature": 3.0}):
            more = {"return_term_logprobs": True, "return_pushes": True}
            results.append(cuda.blend_sample(*p.args, **settings, **SAMPLE, **more))
    for i, got in enumerate(results[3:]):
        assert all(torch.equal(x, y) for x, y in zip(got, results[i % 3], strict=True))


@pytest.mark.parametrize(
    ("power", "settings"), product([0.0, 1.0], FEW_TRUNCATIONS, together=1), ids=str
)
def test_greedy_rows(cuda: EmulatedCuda, power: float, settings: dict[str, Any]) -> None:
    """A row of temperature 0 comes out as with `do_sample=False`, and the others as without it."""
    support = Support(term=1, top_k=99)
    p = problem(cuda, vocab=530, rows=4, values=1, power=power, support=support)
    results = {"return_term_logprobs": True, "return_pushes": power == 0}
    settings = {**settings, **SAMPLE, **results}
    warm = torch.tensor([0.7, 1.0, 1.3, 2.0])
    t = torch.where(torch.tensor([False, True, False, True]), 0.0, warm)
    mixed = assert_samples_agree(cuda, p, **{**settings, "temperature": t})
    greedy = cuda.blend_sample(*p.args, **p.options, **settings, do_sample=False)
    sampled = cuda.blend_sample(*p.args, **p.options, **{**settings, "temperature": warm})
    for got, best, drawn in zip(*map(tensors, (mixed, greedy, sampled)), strict=True):
        assert torch.equal(got[1::2], best[1::2])
        assert torch.equal(got[::2], drawn[::2])
    for zero in (0.0, torch.zeros(4)):
        got = cuda.blend_sample(*p.args, **p.options, **{**settings, "temperature": zero})
        assert all(torch.equal(x, y) for x, y in zip(tensors(got), tensors(greedy), strict=True))
