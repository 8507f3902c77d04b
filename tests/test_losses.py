"""Preference losses against their formulas in numpy, and what they promise at the extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crossfade import losses
from crossfade.losses import PAIR_LOSSES, Pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]
LN2 = math.log(2)
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
# beta * delta and beta * s from one end of what must be finite to the other; off the hinge's kink
EXTREMES = [0.0, 1e-6, 0.6, 3.0, 12.0, 17.0, 40.0, 88.0, 104.0, 700.0, 1e4]
EXTREMES = [-x for x in EXTREMES[:0:-1]] + EXTREMES


def log_sigma(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigma(x: Array) -> Array:
    return np.exp(log_sigma(x))


class Numbers:
    """The symbols of the formulas in float64, from a `Pairs`."""

    def __init__(self, pairs: Pairs) -> None:
        names = (*FIELDS, "chosen_lengths", "rejected_lengths")
        c, r, rc, rr, nc, nr = (getattr(pairs, x).detach().double().numpy() for x in names)
        self.s_c, self.s_r, self.len_c, self.len_r = c - rc, r - rr, nc, nr
        self.delta = self.s_c - self.s_r
        self.l_c, self.l_r = c / nc, r / nr


def expect_sigmoid(x: Numbers, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    e, z = label_smoothing, beta * x.delta
    return -(1 - e) * log_sigma(z) - e * log_sigma(-z)


def expect_ipo(x: Numbers, beta: float = 0.1) -> Array:
    return (x.s_c / x.len_c - x.s_r / x.len_r - 1 / (2 * beta)) ** 2


def expect_hinge(x: Numbers, beta: float = 0.1) -> Array:
    return np.maximum(0, 1 - beta * x.delta)


def expect_robust(x: Numbers, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    e, z = label_smoothing, beta * x.delta
    return (-(1 - e) * log_sigma(z) + e * log_sigma(-z)) / (1 - 2 * e)


def expect_orpo(x: Numbers, lam: float = 0.1) -> Array:
    odds_c, odds_r = (m - np.log(-np.expm1(m)) for m in (x.l_c, x.l_r))
    return -x.l_c - lam * log_sigma(odds_c - odds_r)


def expect_simpo(x: Numbers, beta: float = 2.0, gamma: float = 1.0) -> Array:
    return -log_sigma(beta * (x.l_c - x.l_r) - gamma)


def expect_apo_zero(x: Numbers, beta: float = 0.1) -> Array:
    return 1 - sigma(beta * x.s_c) + sigma(beta * x.s_r)


def expect_apo_down(x: Numbers, beta: float = 0.1) -> Array:
    return sigma(beta * x.s_c) + 1 - sigma(beta * x.delta)


def expect_nca_pair(x: Numbers, beta: float = 0.1) -> Array:
    c, r = beta * x.s_c, beta * x.s_r
    return -log_sigma(c) - log_sigma(-c) / 2 - log_sigma(-r) / 2


def expect_exo_pair(x: Numbers, beta: float = 0.1, label_smoothing: float = 1e-3) -> Array:
    total = np.zeros_like(x.delta)
    for sign, label in ((1, 1 - label_smoothing), (-1, label_smoothing)):
        log_q = log_sigma(sign * beta * x.delta)
        total += np.exp(log_q) * (log_q - math.log(label))
    return total


def expect_sppo_hard(x: Numbers, beta: float = 0.1) -> Array:
    return (x.s_c - 1 / (2 * beta)) ** 2 + (x.s_r + 1 / (2 * beta)) ** 2


EXPECTED: dict[str, Callable[..., Array]] = {
    "sigmoid": expect_sigmoid,
    "ipo": expect_ipo,
    "hinge": expect_hinge,
    "robust": expect_robust,
    "orpo": expect_orpo,
    "simpo": expect_simpo,
    "apo_zero": expect_apo_zero,
    "apo_down": expect_apo_down,
    "nca_pair": expect_nca_pair,
    "exo_pair": expect_exo_pair,
    "sppo_hard": expect_sppo_hard,
}
OPTIONS: dict[str, list[dict[str, float]]] = {
    "sigmoid": [{"beta": 0.3, "label_smoothing": 0.2}],
    "robust": [{"beta": 0.3, "label_smoothing": 0.2}],
    "exo_pair": [{"beta": 0.3, "label_smoothing": 0.2}, {"label_smoothing": 1e-12}],
    "orpo": [{"lam": 1.7}],
    "simpo": [{"beta": 0.3, "gamma": 0.0}],
}
CASES = [
    pytest.param(name, options, id=f"{name} {options}")
    for name in EXPECTED
    for options in ({}, *OPTIONS.get(name, [{"beta": 0.3}]))
]


def make(pairs: int = 64, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pairs:
    """Random pairs with log-probs of responses of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, (2, pairs))
    log_probs = -lengths * rng.gamma(1.0, 1.5, (2, pairs)) - 1e-3
    refs = log_probs + rng.normal(0, 8, (2, pairs))
    return Pairs(
        *(torch.from_numpy(x).to(dtype) for x in (*log_probs, *refs)),
        *torch.from_numpy(lengths),
    )


def ratios(chosen: Any, rejected: Any, dtype: torch.dtype = torch.float64) -> Pairs:
    """Pairs with these log-ratios, of responses of one token."""
    s_c, s_r = torch.as_tensor(chosen, dtype=dtype), torch.as_tensor(rejected, dtype=dtype)
    zero, one = torch.zeros_like(s_c), torch.ones_like(s_c, dtype=torch.int64)
    return Pairs(s_c, s_r, zero, zero, one, one)


def gradients(loss: Callable[[Pairs], Tensor], pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, and their gradients by chosen and by rejected."""
    leaves = [x.detach().clone().requires_grad_() for x in (pairs.chosen, pairs.rejected)]
    result = loss(replace(pairs, chosen=leaves[0], rejected=leaves[1]))
    by_chosen, by_rejected = torch.autograd.grad(result.sum(), leaves, materialize_grads=True)
    return result.detach(), by_chosen, by_rejected


def assert_near(got: Tensor, want: Array | float, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    want = np.broadcast_to(np.asarray(want), tuple(got.shape))
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=rtol, atol=atol)


def test_names() -> None:
    """Every loss of pairs and numbers alone has its formula here."""
    assert set(PAIR_LOSSES) == set(EXPECTED)
    assert all(PAIR_LOSSES[name] is getattr(losses, name) for name in PAIR_LOSSES)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_formulas(name: str, options: dict[str, float]) -> None:
    pairs = make()
    got = PAIR_LOSSES[name](pairs, **options)
    assert got.dtype is torch.float64
    assert_near(got, EXPECTED[name](Numbers(pairs), **options), atol=1e-9 if "exo" in name else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_dtypes(name: str, options: dict[str, float], dtype: torch.dtype) -> None:
    """Computed in float32 on the inputs as they are rounded."""
    pairs = make(dtype=dtype)
    got = PAIR_LOSSES[name](pairs, **options)
    assert got.dtype is torch.float32
    assert_near(got, EXPECTED[name](Numbers(pairs), **options), rtol=1e-5, atol=1e-5)
    mixed = replace(pairs, rejected=pairs.rejected.double())
    assert PAIR_LOSSES[name](mixed, **options).dtype is torch.float64


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients(name: str, options: dict[str, float]) -> None:
    pairs = make(16)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return PAIR_LOSSES[name](replace(pairs, chosen=chosen, rejected=rejected), **options)

    leaves = pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_extremes(name: str, options: dict[str, float]) -> None:
    """Finite in float32, and near float64 in losses and gradients, for |beta s| up to 1e4."""
    s = torch.tensor(EXTREMES) / options.get("beta", 0.1)
    grid = torch.cartesian_prod(s, s)
    pairs = ratios(grid[:, 0], grid[:, 1], torch.float32)
    if name == "orpo":  # a log-prob is below 0
        pairs = replace(
            pairs, chosen=-pairs.chosen.abs() - 1e-6, rejected=-pairs.rejected.abs() - 1e-6
        )
    exact = replace(pairs, **{x: getattr(pairs, x).double() for x in FIELDS})
    got, *got_grads = gradients(lambda p: PAIR_LOSSES[name](p, **options), pairs)
    _, *grads = gradients(lambda p: PAIR_LOSSES[name](p, **options), exact)
    assert_near(got, EXPECTED[name](Numbers(pairs), **options), rtol=1e-5, atol=2e-6)
    for got_grad, grad in zip(got_grads, grads, strict=True):
        assert bool(got_grad.isfinite().all())
        assert_near(got_grad, grad.numpy(), rtol=1e-4, atol=1e-6)


numbers = st.floats(-1e5, 1e5, width=32)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=4), st.data())
def test_any_log_probs(rows: list[tuple[float, ...]], data: Any) -> None:
    """Finite, and each pair's loss and gradients are its own."""
    name = data.draw(st.sampled_from(sorted(PAIR_LOSSES)))
    columns = list(-torch.tensor(rows).T.abs())
    one = torch.ones(len(rows), dtype=torch.int64)
    pairs = Pairs(*columns, one, 2 * one)
    together = gradients(PAIR_LOSSES[name], pairs)
    assert all(bool(x.isfinite().all()) for x in together)
    for i in range(len(rows)):
        alone = Pairs(*(x[i : i + 1] for x in (*columns, one, 2 * one)))
        for got, want in zip(gradients(PAIR_LOSSES[name], alone), together, strict=True):
            torch.testing.assert_close(got[0], want[i], rtol=1e-4, atol=1e-6)


BETTER_CHOSEN = ["sigmoid", "hinge", "apo_zero", "orpo", "simpo"]
WORSE_REJECTED = [*BETTER_CHOSEN, "apo_down", "nca_pair"]


@pytest.mark.parametrize("name", sorted({*BETTER_CHOSEN, *WORSE_REJECTED}))
def test_signs(name: str) -> None:
    """A likelier chosen response or an unlikelier rejected one lowers the loss, wherever it is."""
    pairs = make()
    _, by_chosen, by_rejected = gradients(PAIR_LOSSES[name], pairs)
    counts = pairs.delta < 10 if name == "hinge" else torch.ones(64, dtype=torch.bool)
    assert int(counts.sum()) > 0
    if name in BETTER_CHOSEN:
        assert bool((by_chosen[counts] < 0).all())
    assert bool((by_rejected[counts] > 0).all())


def test_no_preference() -> None:
    """What the losses are where policy and reference agree, to the bit, as at step 0."""
    x = make().chosen.float()
    pairs = Pairs(x, x + 1, x, x + 1)
    for loss, want in (
        (losses.sigmoid(pairs, label_smoothing=0.3), LN2),
        (losses.robust(pairs, label_smoothing=0.3), LN2),
        (losses.hinge(pairs), 1.0),
        (losses.apo_zero(pairs), 1.0),
        (losses.apo_down(pairs), 1.0),
        (losses.nca_pair(pairs), 2 * LN2),
        (losses.sppo_hard(pairs), 50.0),
        (losses.exo_pair(pairs, label_smoothing=0.1), -LN2 - 0.5 * math.log(0.9 * 0.1)),
    ):
        assert_near(loss, want, rtol=1e-6)
        assert len(loss.unique()) == 1


def test_sigmoid_smoothing_is_symmetric() -> None:
    """Swapped pairs with swapped labels are the same pairs."""
    pairs = make()
    swapped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
    plain, flipped = losses.sigmoid(pairs), losses.sigmoid(swapped)
    for eps in (0.0, 0.1, 0.49):
        want = (1 - eps) * plain + eps * flipped
        assert_near(losses.sigmoid(pairs, label_smoothing=eps), want.numpy())
        want = (1 - eps) * flipped + eps * plain
        assert_near(losses.sigmoid(swapped, label_smoothing=eps), want.numpy())


def test_robust_undoes_flips() -> None:
    """Its mean over labels flipped at a rate of eps is DPO's on the true ones."""
    pairs = make()
    swapped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
    for eps in (0.0, 0.1, 0.4):
        kept, flipped = (losses.robust(p, label_smoothing=eps) for p in (pairs, swapped))
        assert_near((1 - eps) * kept + eps * flipped, losses.sigmoid(pairs).numpy(), atol=1e-9)
    assert torch.equal(losses.robust(pairs), losses.sigmoid(pairs))


def test_ipo_minimum() -> None:
    """0 at a difference per token of 1 / (2 beta); above it, the loss rises again."""
    two, four = torch.tensor([2] * 3), torch.tensor([4] * 3)
    pairs = replace(ratios([6.0, 8.0, 10.0], [-4.0] * 3), chosen_lengths=two, rejected_lengths=four)
    got, by_chosen, by_rejected = gradients(lambda p: losses.ipo(p, beta=0.1), pairs)
    assert_near(got, np.array([1.0, 0.0, 1.0]))
    assert_near(by_chosen, np.array([-1.0, 0.0, 1.0]))
    assert_near(by_rejected, np.array([0.5, 0.0, -0.5]))


def test_hinge_kink() -> None:
    pairs = ratios([9.0, 10.0, 11.0], [0.0] * 3)
    got, by_chosen, _ = gradients(lambda p: losses.hinge(p, beta=0.1), pairs)
    assert_near(got, np.array([0.1, 0.0, 0.0]))
    assert_near(by_chosen, np.array([-0.1, 0.0, 0.0]))


def test_nca_minimum() -> None:
    """The chosen log-ratio comes to rest at log(2) / beta, wherever the rejected one is."""
    pairs = ratios([LN2 / 0.1] * 3, [-40.0, 0.0, 40.0])
    _, by_chosen, by_rejected = gradients(losses.nca_pair, pairs)
    assert_near(by_chosen, 0.0)
    assert bool((by_rejected > 0).all())


def test_exo_is_a_divergence() -> None:
    """That of two Bernoullis: 0 where the policy has the labels' odds, above 0 elsewhere."""
    eps = 0.2
    at = math.log((1 - eps) / eps) / 0.1
    got, by_chosen, _ = gradients(
        lambda p: losses.exo_pair(p, label_smoothing=eps), ratios([at - 9, at, at + 9], [0.0] * 3)
    )
    assert_near(got[1], 0.0)
    assert by_chosen.sign().tolist()[::2] == [-1, 1]
    assert_near(by_chosen[1], 0.0)
    q = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    labels = torch.distributions.Bernoulli(probs=torch.tensor(1 - eps).double())
    want = torch.distributions.kl_divergence(torch.distributions.Bernoulli(probs=q), labels)
    got = losses.exo_pair(ratios(q.logit() / 0.1, [0.0] * 3), label_smoothing=eps)
    assert_near(got, want.numpy(), rtol=1e-6)


def test_exo_gradient_where_q_rounds_to_1() -> None:
    """Or to 0: ``beta q (1 - q) (beta delta - log odds of the labels)`` keeps its digits."""
    x = np.array([-17.0, 17.0])
    _, by_chosen, _ = gradients(losses.exo_pair, ratios(x / 0.1, [0.0, 0.0], torch.float32))
    want = 0.1 * sigma(x) * sigma(-x) * (x - math.log(0.999 / 0.001))
    assert_near(by_chosen, want, rtol=1e-4, atol=0)


def test_sppo_minimum() -> None:
    got, by_chosen, by_rejected = gradients(losses.sppo_hard, ratios([5.0], [-5.0]))
    assert [x.item() for x in (got, by_chosen, by_rejected)] == [0.0, 0.0, 0.0]


def test_apo_directions() -> None:
    """Zero pushes the two apart. Down pushes the rejected one down, and then both."""
    step_0, later = ratios([0.0], [0.0]), ratios([-0.5], [-3.0])
    for loss, pairs, chosen, rejected in (
        (losses.apo_zero, step_0, -0.25, 0.25),
        (losses.apo_down, step_0, 0.0, 0.25),
        (losses.apo_down, later, 0.164900, 0.070104),  # s(0.5) - s(2.5), s(2.5), s = sigmoid'
    ):
        _, by_chosen, by_rejected = gradients(lambda p, loss=loss: loss(p, beta=1.0), pairs)
        assert_near(by_chosen, chosen, atol=1e-6)
        assert_near(by_rejected, rejected, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, -0.0, 1e-6, -1e-45, -1e-9, -1e-7, -1e-4, -100.0, -1e4])
@pytest.mark.parametrize("other", [0.0, -1e-7, -1.0, -1e4])
def test_orpo_odds(mean: float, other: float) -> None:
    """Certain responses have finite odds, also where rounding puts a log-prob above 0."""
    for l_c, l_r in ((mean, other), (other, mean)):
        got = gradients(losses.orpo, ratios([l_c], [l_r], torch.float32))
        assert all(bool(x.isfinite().all()) for x in got)
    eps = 2.0**-23
    clamped = Numbers(ratios([min(mean, -eps)], [min(other, -eps)], torch.float32))
    want = expect_orpo(clamped)
    assert_near(losses.orpo(ratios([mean], [other], torch.float32)), want, rtol=1e-5, atol=2e-6)


def test_orpo_at_equal_odds() -> None:
    x = torch.tensor([-3.0, -30.0])
    pairs = Pairs(x, 2 * x, None, None, torch.tensor([2, 2]), torch.tensor([4, 4]))
    assert_near(losses.orpo(pairs, lam=0.5), np.array([1.5, 15.0]) + 0.5 * LN2, rtol=1e-6)


def test_simpo_margin() -> None:
    """log 2 where the chosen response is ahead by gamma / beta a token."""
    x = torch.tensor([-2.0])
    pairs = Pairs(x, 6 * x, None, None, torch.tensor([2]), torch.tensor([8]))
    assert_near(losses.simpo(pairs, beta=2.0, gamma=1.0), LN2, rtol=1e-6)


def modpo_case(others: int) -> tuple[Pairs, Tensor]:
    rng = np.random.default_rng(others)
    return make(), torch.from_numpy(rng.normal(0, 3, (64, others)))


def test_modpo() -> None:
    pairs, margins = modpo_case(2)
    x, m = Numbers(pairs), margins.numpy()
    want = -log_sigma((0.3 * x.delta - (0.2 * m[:, 0] + 0.3 * m[:, 1])) / 0.5)
    got = losses.modpo(pairs, margins, 0.5, [0.2, 0.3], beta=0.3)
    assert_near(got, want)
    narrow = replace(pairs, **{name: getattr(pairs, name).float() for name in FIELDS})
    got = losses.modpo(narrow, margins.float(), 0.5, (0.2, 0.3), beta=0.3)
    assert got.dtype is torch.float32
    assert_near(got, want, rtol=1e-4, atol=1e-4)


def test_modpo_alone_is_dpo() -> None:
    pairs, margins = modpo_case(0)
    assert_near(losses.modpo(pairs, margins, 1.0, []), losses.sigmoid(pairs).numpy())
    want = losses.sigmoid(pairs, beta=0.4).numpy()
    assert_near(losses.modpo(pairs, modpo_case(1)[1], 0.25, [0.0]), want)


def test_modpo_trades_off() -> None:
    """What the other objectives like about the chosen response is left to them."""
    pairs = ratios([0.0] * 3, [0.0] * 3)
    margins = torch.tensor([[-1.0], [0.0], [1.0]])
    _, by_chosen, by_rejected = gradients(lambda p: losses.modpo(p, margins, 0.5, [0.5]), pairs)
    assert by_chosen[0] > by_chosen[1] > by_chosen[2]
    assert_near(by_chosen[1], -0.1)
    assert_near(by_rejected, -by_chosen.numpy())


def test_modpo_gradients() -> None:
    pairs, margins = make(16), modpo_case(2)[1][:16].requires_grad_()

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        own = replace(pairs, chosen=chosen, rejected=rejected)
        return losses.modpo(own, margins, 0.5, [0.2, 0.3])

    leaves = pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    loss(*leaves).sum().backward()
    assert margins.grad is None


def kto_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    pairs = make(dtype=dtype)
    assert pairs.ref_chosen is not None
    return pairs.chosen, pairs.ref_chosen, torch.arange(64) % 3 == 0


def test_kto() -> None:
    log_probs, refs, labels = kto_case()
    s, good = (log_probs - refs).numpy(), labels.numpy()
    for z0 in (0.0, 2.5, torch.tensor(2.5, dtype=torch.float64)):
        z = float(z0)
        want = np.where(good, 1.3 * (1 - sigma(0.3 * (s - z))), 0.7 * (1 - sigma(0.3 * (z - s))))
        assert_near(losses.kto(log_probs, refs, labels, z0, 0.3, 1.3, 0.7), want)
        narrow = [x.float() for x in (log_probs, refs)]
        got = losses.kto(*narrow, labels, z, 0.3, 1.3, 0.7)
        assert got.dtype is torch.float32
        assert_near(got, want, rtol=1e-5, atol=1e-6)


def test_kto_balance() -> None:
    """At z0 both labels cost half their weight and pull apart equally, and they always sum to 1."""
    s = torch.tensor([3.0, 3.0], requires_grad=True)
    zero, labels = torch.zeros(2), torch.tensor([True, False])
    loss = losses.kto(s, zero, labels, 3.0, 0.1, 2.0, 1.0)
    assert loss.tolist() == [1.0, 0.5]
    loss.sum().backward()
    assert s.grad is not None
    assert_near(s.grad, np.array([-0.05, 0.025]), rtol=1e-6)
    log_probs, refs, labels = kto_case()
    both = losses.kto(log_probs, refs, labels, 1.0) + losses.kto(log_probs, refs, ~labels, 1.0)
    assert_near(both, 1.0)


def test_kto_gradients() -> None:
    log_probs, refs, labels = kto_case()
    z0 = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    refs.requires_grad_()

    def loss(log_probs: Tensor) -> Tensor:
        return losses.kto(log_probs, refs, labels, z0, 0.2, 1.3, 0.7)

    assert torch.autograd.gradcheck(loss, (log_probs.requires_grad_(),))
    loss(log_probs).sum().backward()
    assert refs.grad is None
    assert z0.grad is None


def test_kto_extremes() -> None:
    s = (torch.tensor(EXTREMES) / 0.1).repeat(2).requires_grad_()
    labels = torch.arange(len(s)) < len(EXTREMES)
    got = losses.kto(s, torch.zeros_like(s), labels, 0.0)
    x = 0.1 * s.detach().double().numpy()
    assert_near(got, np.where(labels.numpy(), sigma(-x), sigma(x)), rtol=1e-5, atol=1e-30)
    (grad,) = torch.autograd.grad(got.sum(), s)
    size = 0.1 * sigma(x) * sigma(-x)
    assert_near(grad, np.where(labels.numpy(), -size, size), rtol=1e-4, atol=1e-8)


def test_kto_z0() -> None:
    log_probs, refs, _ = kto_case()
    log_probs.requires_grad_()
    up = losses.kto_z0(log_probs, refs - 20)
    assert_near(up, float((log_probs.detach() - refs + 20).mean()))
    assert up.shape == ()
    assert not up.requires_grad
    assert losses.kto_z0(log_probs, refs + 20).item() == 0.0
    assert losses.kto_z0(log_probs.bfloat16(), refs.bfloat16() - 20).dtype is torch.float32


def test_sft_is_cross_entropy() -> None:
    """Of logits whose tokens' log-probs are summed a response, padding left out."""
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    lengths = torch.tensor([5, 1, 3])
    live = torch.arange(5) < lengths[:, None]
    token = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = losses.sft((token * live).sum(-1))
    want = F.cross_entropy(logits[live], targets[live])
    torch.testing.assert_close(got.sum() / lengths.sum(), want)
    assert losses.sft(torch.tensor([-1.0, -2.0]).bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_no_gradient_to_references(name: str) -> None:
    pairs = make()
    leaves = {x: getattr(pairs, x).requires_grad_() for x in FIELDS}
    PAIR_LOSSES[name](pairs).sum().backward()
    assert leaves["chosen"].grad is not None
    assert leaves["ref_chosen"].grad is None
    assert leaves["ref_rejected"].grad is None


def test_properties() -> None:
    pairs = make()
    x = Numbers(pairs)
    assert_near(torch.stack(pairs.log_ratios), np.stack([x.s_c, x.s_r]))
    assert_near(pairs.delta, x.delta)
    assert_near(torch.stack(pairs.means), np.stack([x.l_c, x.l_r]))
    empty = Pairs(*[torch.zeros(0)] * 4)
    assert losses.sigmoid(empty).shape == (0,)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_what_a_loss_needs(name: str) -> None:
    """References, lengths, or both, and no more."""
    pairs, loss = make(), PAIR_LOSSES[name]
    means, references = name in ("ipo", "orpo", "simpo"), name not in ("orpo", "simpo")
    for fields, needed in (
        (("ref_chosen", "ref_rejected"), references),
        (("chosen_lengths", "rejected_lengths"), means),
    ):
        for field in fields:
            less = replace(pairs, **{field: None})
            if needed:
                with pytest.raises(ValueError, match=f"^{field} is None; it must be given"):
                    loss(less)
            else:
                assert torch.equal(loss(less), loss(pairs))


ROWS = torch.zeros(3)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"chosen": [1.0]}, TypeError, "chosen is a list; it must be a tensor"),
        ({"chosen": ROWS.long()}, TypeError, "chosen has dtype torch.int64; it must be float32 or"),
        ({"chosen": torch.zeros(3, 1)}, ValueError, r"chosen has shape \[3, 1\]; it must have 1"),
        ({"rejected": 0.0}, TypeError, "rejected is a float"),
        ({"rejected": torch.zeros(2)}, ValueError, r"rejected has shape \[2\]; it must be \[3\]"),
        ({"rejected": ROWS.to("meta")}, ValueError, "rejected is on meta; it must be on cpu"),
        ({"ref_chosen": torch.zeros(1)}, ValueError, r"ref_chosen has shape \[1\]"),
        ({"ref_chosen": ROWS.bool()}, TypeError, "ref_chosen has dtype torch.bool"),
        ({"ref_rejected": torch.tensor(0.0)}, ValueError, r"ref_rejected has shape \[\]"),
        ({"ref_rejected": "no"}, TypeError, "ref_rejected is a str"),
        ({"chosen_lengths": ROWS}, TypeError, "chosen_lengths has dtype .* be int64 or int32"),
        ({"chosen_lengths": [1, 2, 3]}, TypeError, "chosen_lengths is a list"),
        ({"rejected_lengths": ROWS[:2].int()}, ValueError, r"rejected_lengths has shape \[2\]"),
    ],
)
def test_bad_pairs(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        Pairs(**{"chosen": ROWS, "rejected": ROWS, **changes})


BAD_NUMBERS = [
    *[(name, "beta") for name in PAIR_LOSSES if name != "orpo"],
    ("orpo", "lam"),
    ("simpo", "gamma"),
    *[(name, "label_smoothing") for name in ("sigmoid", "robust", "exo_pair")],
]


@pytest.mark.parametrize(("name", "option"), BAD_NUMBERS)
def test_bad_numbers(name: str, option: str) -> None:
    pairs, loss = make(), PAIR_LOSSES[name]
    for value in (None, "0.1", True, torch.tensor(0.1)):
        with pytest.raises(TypeError, match=f"^{option} is "):
            loss(pairs, **{option: value})
    wrong = [-0.1, math.inf, math.nan]
    wrong += [] if option == "gamma" or "smoothing" in option else [0.0]
    wrong += [0.5, 1.0] if "smoothing" in option else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{option} is {value}; it must be"):
            loss(pairs, **{option: value})


def test_exo_needs_smoothing() -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing is 0.0; it must be above 0"):
        losses.exo_pair(make(), label_smoothing=0)


MODPO = {"pairs": Pairs(*[ROWS] * 4), "margins": torch.zeros(3, 1)}
MODPO |= {"weight": 0.5, "other_weights": [0.5]}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"margins": [[0.0]]}, TypeError, "margins is a list"),
        ({"margins": torch.zeros(3, 1).long()}, TypeError, "margins has dtype torch.int64"),
        ({"margins": ROWS}, ValueError, r"margins has shape \[3\]; it must be \[3, 1\]"),
        ({"margins": torch.zeros(2, 1)}, ValueError, r"margins has shape \[2, 1\]"),
        ({"margins": torch.zeros(3, 1).to("meta")}, ValueError, "margins is on meta"),
        ({"weight": 0.0}, ValueError, "weight is 0.0; it must be above 0"),
        ({"weight": None}, TypeError, "weight is None"),
        ({"other_weights": 0.5}, TypeError, "other_weights is a float; it must be a list"),
        ({"other_weights": [-0.5]}, ValueError, r"other_weights\[0\] is -0.5; it must be 0 or"),
        ({"other_weights": ["a"]}, TypeError, r"other_weights\[0\] is 'a'"),
        ({"other_weights": [0.2, 0.3]}, ValueError, r"margins has shape .* must be \[3, 2\]"),
        ({"beta": 0}, ValueError, "beta is 0.0"),
    ],
)
def test_bad_modpo(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        losses.modpo(**{**MODPO, **changes})


KTO = {"log_probs": ROWS, "ref_log_probs": ROWS, "labels": ROWS.bool(), "z0": 0.0}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"log_probs": 1.0}, TypeError, "log_probs is a float"),
        ({"log_probs": torch.zeros(3, 1)}, ValueError, r"log_probs has shape \[3, 1\]"),
        ({"ref_log_probs": torch.zeros(2)}, ValueError, r"ref_log_probs has shape \[2\]"),
        ({"ref_log_probs": ROWS.int()}, TypeError, "ref_log_probs has dtype torch.int32"),
        ({"labels": ROWS}, TypeError, "labels has dtype torch.float32; it must be bool"),
        ({"labels": ROWS[:2].bool()}, ValueError, r"labels has shape \[2\]"),
        ({"z0": ROWS}, ValueError, r"z0 has shape \[3\]; it must be \[\]"),
        ({"z0": torch.tensor(1)}, TypeError, "z0 has dtype torch.int64"),
        ({"z0": -1.0}, ValueError, "z0 is -1.0; it must be 0 or more"),
        ({"z0": None}, TypeError, "z0 is None"),
        ({"beta": -1.0}, ValueError, "beta is -1.0"),
        ({"desirable_weight": 0.0}, ValueError, "desirable_weight is 0.0"),
        ({"undesirable_weight": "1"}, TypeError, "undesirable_weight is '1'"),
    ],
)
def test_bad_kto(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        losses.kto(**{**KTO, **changes})


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"^log_probs has shape \[0\]; it must have at least 1"):
        losses.kto_z0(ROWS[:0], ROWS[:0])
    with pytest.raises(ValueError, match=r"^ref_log_probs has shape \[2\]"):
        losses.kto_z0(ROWS, ROWS[:2])
    with pytest.raises(TypeError, match=r"^log_probs is a list"):
        losses.sft([0.0])  # type: ignore[arg-type]
