"""Every kernel gives the reference's blends and draws, whatever is blended.

Tokens are equal for equal seeds, log-probs within rounding. Inputs of 16 bits are exact in float32,
so they meet the same tolerance. One test a property of the arguments, then random mixtures of all
of them. How tokens are drawn is in test_draws.py.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import POWERS, assert_agrees
from cases import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    Backend,
    Problem,
    assert_blend_agrees,
    assert_samples_agree,
    lay_out,
    mean_weights,
    normal,
    problem,
)
from crossfade.ops import Support
from sweeps import every


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms(kernel: Backend, terms: int, dtype: torch.dtype) -> None:
    assert_agrees(kernel, problem(kernel, terms=terms, dtype=dtype, seed=terms))


# tiny, under, at and over a vector's or a block's width, prime, and GPT-2's
@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 15, 16, 17, 64, 127, 1009, 1024, 1025, 4096, 50_257])
@pytest.mark.parametrize("rows", [3, 1])
def test_vocabularies(kernel: Backend, vocab: int, rows: int) -> None:
    if kernel.interpreted and vocab > 1025:
        pytest.skip("too long for an interpreter")
    assert_agrees(kernel, problem(kernel, vocab=vocab, rows=rows, values=1, seed=vocab))


@pytest.mark.parametrize("terms", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_rows(kernel: Backend, terms: int, dtype: torch.dtype) -> None:
    """Inputs of one dtype begin at multiples of 16 bytes, and end with a whole vector or not."""
    for rows, vocab in ((3, 1040), (1, 1028)):
        p = problem(kernel, terms=terms, vocab=vocab, rows=rows, values=4 - terms, dtype=dtype)
        assert_agrees(kernel, p)
    mask = torch.arange(1040, device=kernel.device) % 3 > 0
    p = problem(kernel, terms=terms, vocab=1040, dtype=dtype, mask=mask, support=Support(top_k=99))
    p.weights = [1.0, 0.0, -0.5, 0.0][:terms]
    p.logits[-1][1, ::2] = INF if terms == 4 else -INF  # without weight it is not read
    assert_agrees(kernel, p)


@pytest.mark.parametrize("rows", [7, 1, 2, 33])
def test_batches(kernel: Backend, rows: int) -> None:
    assert_agrees(kernel, problem(kernel, rows=rows, vocab=61, seed=rows))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel: Backend, layout: str, dtype: torch.dtype) -> None:
    """The other columns of the memory are NaN and infinite: reading one would show."""
    assert_agrees(kernel, problem(kernel, layout=layout, values=2, vocab=131, dtype=dtype))


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_expanded_row(kernel: Backend, power: float) -> None:
    """Row stride 0: one prompt's logits for all samples. Each row draws by its own step."""
    p = problem(kernel, rows=1, values=1, power=power)
    rows = 9
    p.logits = [z.expand(rows, -1) for z in p.logits]
    p.values = [q.expand(rows, -1) for q in p.values]
    assert p.logits[0].stride(0) == 0
    assert_blend_agrees(kernel, p)
    steps = torch.arange(rows, device=kernel.device)
    out = assert_samples_agree(kernel, p, temperature=9.0, seed=1, step=steps)
    assert len(set(out.tokens.tolist())) > 1


def test_widths_that_differ(kernel: Backend) -> None:
    """Models with one vocabulary and unequal padding, of unequal dtypes too: the least width is
    used, and what the wider ones hold past it is not read."""
    rows, vocab = 3, 83
    z = [
        lay_out(normal(rows, vocab, k, dtype=d, device=kernel.device), "padded", extra=e)
        for k, (d, e) in enumerate(zip(DTYPES, (5, 1, 44), strict=True))
    ]
    z.append(normal(rows, vocab, 7, device=kernel.device))
    assert_agrees(kernel, Problem(z, [0.5, -0.3, 0.6, 0.4]))
    assert_agrees(kernel, Problem(z[:3], [0.5, -0.3, 0.6], options={"vocab_size": vocab}))
    assert_agrees(kernel, Problem(z[:3], [0.5, -0.3, 0.6], options={"vocab_size": 50}))


@pytest.mark.parametrize("values", [1, 2, 16])
@pytest.mark.parametrize("power", [0.0, -1.0])
def test_values(kernel: Backend, values: int, power: float) -> None:
    assert_agrees(kernel, problem(kernel, values=values, power=power, vocab=89))


@pytest.mark.parametrize("terms", [1, 2, 3, 16])
@pytest.mark.parametrize("power", POWERS)
def test_powers(kernel: Backend, power: float, terms: int) -> None:
    assert_agrees(kernel, problem(kernel, power=power, terms=terms, vocab=101))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [-1.0, 1.0])
def test_powers_of_sharp_terms(kernel: Backend, power: float, dtype: torch.dtype) -> None:
    """Logits tens apart: probabilities underflow float32, their logs must not."""
    z = [normal(3, 101, k, scale=60.0, dtype=dtype, device=kernel.device) for k in range(3)]
    assert_agrees(kernel, Problem(z, [0.5, 0.3, 0.2], options={"power": power}))


@pytest.mark.parametrize("power", [0.0, 1.0, -1.0])
def test_weights_of_each_request(kernel: Backend, power: float) -> None:
    """A weight of 0 leaves its term out of its row, whatever the term holds there."""
    p = problem(kernel, rows=5, values=1, power=power)
    weights = mean_weights(5, 3, 1, kernel.device) if power else normal(5, 3, 1, scale=1.0)
    weights[1] = torch.tensor([0.25, 0.0, 0.75])
    weights[2] = torch.tensor([0.0, 0.0, 1.0])
    p.logits[1][1] = NAN
    p.logits[0][2] = -INF
    p.weights = weights.to(kernel.device)
    p.value_weights = torch.tensor([[0.5], [-1.0], [2.0], [0.0], [0.1]], device=kernel.device)
    p.values[0][3] = NAN
    # the terms' own log-probs are those of what the terms hold
    assert_agrees(kernel, p)
    got = kernel.blend(*p.args, **p.options)
    assert not got.isnan().any()


def test_weights_are_any_float_tensor(kernel: Backend) -> None:
    """Tensors `[K]` or `[B, K]`, of any stride and dtype, mean the numbers that they hold."""
    p = problem(kernel, rows=4)
    numbers = torch.tensor([1.0, 0.75, -0.5], device=kernel.device)
    p.weights = numbers.tolist()
    want = kernel.blend(*p.args)
    for w in (
        numbers,
        numbers.double(),
        numbers.bfloat16(),
        numbers.expand(4, 3),
        numbers.repeat(4, 1).t().contiguous().t(),
        torch.stack([numbers, numbers], dim=1)[:, 0],
    ):
        assert torch.equal(kernel.blend(p.logits, w), want)


SUPPORTS = [
    Support(top_k=1),
    Support(top_k=13),
    Support(top_k=10**9),
    Support(term=2, top_p=0.0),
    Support(term=1, top_p=0.8),
    Support(min_p=0.1),
    Support(min_p=1.0),
    Support(term=2, top_k=30, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_supports(kernel: Backend, support: Support, power: float) -> None:
    p = problem(kernel, support=support, power=power, vocab=97, values=1)
    assert_agrees(kernel, p)
    left = kernel.blend(*p.args, **p.options).isfinite().sum(dim=-1)
    assert (left > 0).all()


def test_support_of_a_term_left_out(kernel: Backend) -> None:
    """A term of weight 0 may still say which tokens are plausible."""
    p = problem(kernel, terms=2, support=Support(term=1, top_k=5))
    p.weights = [1.0, 0.0]
    assert_agrees(kernel, p)
    assert (kernel.blend(*p.args, **p.options).isfinite().sum(dim=-1) == 5).all()


def test_support_keeps_ties(kernel: Backend) -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]], device=kernel.device)
    for support in (Support(top_k=2), Support(top_p=0.7)):
        got = kernel.blend([z], [1.0], support=support)
        assert got.isfinite().tolist() == [[True, False, True, True, True, False]]


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one for all rows": lambda allowed: allowed[0, :97].clone(),
    "one a row": lambda allowed: allowed[:, :97].contiguous(),
    "rows that start at odd bytes": lambda allowed: allowed[:, 6:],
    "columns past the vocabulary": lambda allowed: allowed,
    "one row, expanded": lambda allowed: allowed[1:2].expand(4, -1),
    "columns first": lambda allowed: allowed.t().contiguous().t(),
}


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(kernel: Backend, mask: str, power: float) -> None:
    rows, vocab = 4, 97
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(rows, vocab + 6, generator=generator) < 0.4
    allowed[3, :vocab] = torch.arange(vocab) == vocab - 1  # one token left
    allowed = allowed.to(kernel.device)
    p = problem(kernel, vocab=vocab, mask=MASKS[mask](allowed), power=power)
    assert_agrees(kernel, p)


@pytest.mark.parametrize("weights", [[1.0, 0.5], [1.0, -0.5]], ids=str)
def test_minus_infinity_removes(kernel: Backend, weights: list[float]) -> None:
    """In any term, under weights of any sign: never a token of +inf, never NaN."""
    p = problem(kernel, terms=2, values=1, vocab=90)
    p.weights = weights
    p.logits[0][:, ::3] = -INF
    p.logits[1][:, 1::5] = -INF
    p.values[0][:, 2::7] = -INF
    p.logits[0][0, 1] = INF  # removed by the other term: not looked at
    assert_agrees(kernel, p)
    got = kernel.blend(*p.args)
    assert not got.isnan().any()
    assert got[:, ::3].isinf().all()


@pytest.mark.parametrize("power", POWERS)
def test_power_mean_without_mass(kernel: Backend, power: float) -> None:
    """A token that one term excludes has no mass with power < 0, and that of the others else."""
    p = problem(kernel, terms=2, vocab=50, power=power)
    p.logits[0][:, 10:20] = -INF
    p.logits[1][:, 15:30] = -INF
    assert_agrees(kernel, p)
    left = kernel.blend(*p.args, **p.options).isfinite()[0].nonzero()[:, 0].tolist()
    out = range(15, 20) if power > 0 else range(10, 30)
    assert left == [v for v in range(50) if v not in out]


@pytest.mark.parametrize("top", [2e9, -1e30, 3e38])
def test_scores_far_from_zero(kernel: Backend, top: float) -> None:
    """A score may be so large that a float32 near it cannot tell how far below another one is."""
    z = torch.tensor([[top, 1.0, 2.0] * 30, [top] * 90], device=kernel.device)
    assert_agrees(kernel, Problem([z], [1.0]))


def test_rising_scores(kernel: Backend) -> None:
    """Each token is a new maximum. A sum that is rescaled for each must not lose its digits."""
    vocab = 1000 if kernel.interpreted else 1_000_000
    z = torch.linspace(0, 0.3, vocab, device=kernel.device)[None]
    assert_blend_agrees(kernel, Problem([z], [1.0]))


def test_large_logits_lose_no_more_than_rounding(kernel: Backend) -> None:
    z = [normal(3, 97, k, scale=1e4, device=kernel.device) for k in range(3)]
    assert_agrees(kernel, Problem(z, [1.0, 0.8, -0.8]))
    offset = [normal(3, 97, k, device=kernel.device) + 1e4 for k in range(3)]
    assert_agrees(kernel, Problem(offset, [1.0, 0.8, -0.8]))


@pytest.mark.parametrize("seed", every(2, range(40)))
def test_everything_at_once(kernel: Backend, seed: int) -> None:
    """Random mixtures of all arguments, most of which the tests above leave alone."""
    pick = random.Random(seed)
    terms, rows = pick.choice([1, 2, 3, 4, 7]), pick.choice([1, 2, 3, 5])
    vocab = pick.choice([2, 7, 33, 130, 515] if kernel.interpreted else [2, 7, 33, 515, 2049, 9001])
    values, power = pick.choice([0, 0, 1, 3]), pick.choice([0.0, 0.0, 0.0, *POWERS])
    on = {"device": kernel.device}

    def matrix(k: int) -> torch.Tensor:
        x = normal(rows, vocab, 100 * seed + k, scale=pick.choice([1, 4, 20]), **on)
        x = x.to(pick.choice(DTYPES))
        if pick.random() < 0.2:
            x[:, pick.randrange(vocab)] = -INF if vocab > 2 else 0.0
        if pick.random() < 0.2:
            return x[:1].expand(rows, -1)
        return lay_out(x, pick.choice(LAYOUTS), extra=pick.randrange(1, 9))

    weights: Any = mean_weights(rows, terms, seed) if power else normal(rows, terms, seed, scale=1)
    value_weights: Any = normal(rows, values, seed + 1, scale=1) if values else None
    if pick.random() < 0.5:
        weights = weights[0].tolist()
        value_weights = value_weights[0].tolist() if values else None
    else:
        weights = weights.to(kernel.device)
        value_weights = value_weights.to(kernel.device) if values else None
    options: dict[str, Any] = {"power": power, "vocab_size": vocab}
    if pick.random() < 0.3:
        options["support"] = Support(
            pick.randrange(terms), pick.choice([0, 3]), pick.choice([1.0, 0.9]), 1e-3
        )
    if pick.random() < 0.3:
        options["mask"] = torch.arange(vocab, **on) % 5 != pick.randrange(1, 5)
    p = Problem(
        [matrix(k) for k in range(terms)],
        weights,
        [matrix(50 + m) for m in range(values)],
        value_weights,
        options,
    )
    settings: dict[str, Any] = {
        "temperature": pick.choice([1.0, 0.6, 1.8]),
        "top_k": pick.choice([0, 1, 40, 2 * vocab]),
        "top_p": pick.choice([1.0, 0.95, 0.4]),
        "min_p": pick.choice([0.0, 0.01, 0.2]),
        "seed": pick.randrange(2**64),
        "stream": torch.arange(rows, **on),
        "step": pick.randrange(2**32),
    }
    assert_blend_agrees(kernel, p)
    assert_samples_agree(kernel, p, **settings)
    assert_samples_agree(kernel, p, **settings, do_sample=False)
