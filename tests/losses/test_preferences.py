"""Pair losses against their formulas in numpy, and what they promise at the extremes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crossfade import losses
from crossfade.losses import PAIR_LOSSES, Pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_cases import (
    CASES,
    EXPECTED,
    EXTREMES,
    FIELDS,
    OF_BATCHES,
    Numbers,
    assert_near,
    expect_orpo,
    gradients,
    log_sigma,
    make,
    ratios,
    sigma,
)
from torch import Tensor

LN2 = math.log(2)


def test_names() -> None:
    """Every loss in the table has its formula here."""
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
    """Losses of inputs in 16 bits are computed in float32."""
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
    """For |beta s| up to 1e4 float32 losses and gradients are finite, and near those in float64."""
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
    """Losses are finite, and the loss and gradients of a pair do not depend on other pairs."""
    name = data.draw(st.sampled_from(sorted({*PAIR_LOSSES} - {*OF_BATCHES})))
    columns = list(-torch.tensor(rows).T.abs())
    one = torch.ones(len(rows), dtype=torch.int64)
    pairs = Pairs(*columns, one, 2 * one)
    together = gradients(PAIR_LOSSES[name], pairs)
    assert all(bool(x.isfinite().all()) for x in together)
    for i in range(len(rows)):
        alone = Pairs(*(x[i : i + 1] for x in (*columns, one, 2 * one)))
        for got, want in zip(gradients(PAIR_LOSSES[name], alone), together, strict=True):
            torch.testing.assert_close(got[0], want[i], rtol=1e-4, atol=1e-6)


BETTER_CHOSEN = [
    *("sigmoid", "sigmoid_norm", "hinge", "apo_zero", "bco_pair", "aot", "aot_unpaired"),
    *("orpo", "simpo"),
]
WORSE_REJECTED = [*BETTER_CHOSEN, "apo_down", "nca_pair"]


@pytest.mark.parametrize("name", sorted({*BETTER_CHOSEN, *WORSE_REJECTED}))
def test_signs(name: str) -> None:
    """A loss falls if the chosen response becomes likelier, or the rejected one less likely."""
    pairs = make()
    _, by_chosen, by_rejected = gradients(PAIR_LOSSES[name], pairs)
    counts = pairs.delta < 10 if name == "hinge" else torch.ones(64, dtype=torch.bool)
    assert int(counts.sum()) > 0
    if name in BETTER_CHOSEN:
        assert bool((by_chosen[counts] < 0).all())
    assert bool((by_rejected[counts] > 0).all())


def test_no_preference() -> None:
    """The losses at step 0, where policy and reference are equal, are known to the last bit."""
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
        (losses.bco_pair(pairs), 2 * LN2),
        (losses.aot(pairs), LN2),
        (losses.discopop(pairs), 0.5 * LN2 + 0.5),
        (losses.exo_pair(pairs, label_smoothing=0.1), -LN2 - 0.5 * math.log(0.9 * 0.1)),
    ):
        assert_near(loss, want, rtol=1e-6)
        assert len(loss.unique()) == 1


def test_sigmoid_smoothing_is_symmetric() -> None:
    """Swapping each pair and flipping each label changes nothing."""
    pairs = make()
    swapped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
    plain, flipped = losses.sigmoid(pairs), losses.sigmoid(swapped)
    for eps in (0.0, 0.1, 0.49):
        want = (1 - eps) * plain + eps * flipped
        assert_near(losses.sigmoid(pairs, label_smoothing=eps), want.numpy())
        want = (1 - eps) * flipped + eps * plain
        assert_near(losses.sigmoid(swapped, label_smoothing=eps), want.numpy())


def test_robust_undoes_flips() -> None:
    """With a share eps of the labels flipped, its mean is that of DPO on the true labels."""
    pairs = make()
    swapped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
    for eps in (0.0, 0.1, 0.4):
        kept, flipped = (losses.robust(p, label_smoothing=eps) for p in (pairs, swapped))
        assert_near((1 - eps) * kept + eps * flipped, losses.sigmoid(pairs).numpy(), atol=1e-9)
    assert torch.equal(losses.robust(pairs), losses.sigmoid(pairs))


def test_ipo_minimum() -> None:
    """The loss is 0 where the difference per token is 1 / (2 beta), and rises again above that."""
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
    """It is the KL divergence of two Bernoulli distributions, 0 only where both are the same."""
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
    """``beta q (1 - q) (beta delta - log odds of the labels)`` is precise, for q near 0 too."""
    x = np.array([-17.0, 17.0])
    _, by_chosen, _ = gradients(losses.exo_pair, ratios(x / 0.1, [0.0, 0.0], torch.float32))
    want = 0.1 * sigma(x) * sigma(-x) * (x - math.log(0.999 / 0.001))
    assert_near(by_chosen, want, rtol=1e-4, atol=0)


def test_sppo_minimum() -> None:
    got, by_chosen, by_rejected = gradients(losses.sppo_hard, ratios([5.0], [-5.0]))
    assert [x.item() for x in (got, by_chosen, by_rejected)] == [0.0, 0.0, 0.0]


def test_apo_directions() -> None:
    """`apo_zero` pushes the two apart. `apo_down` pushes the rejected one down first, then both."""
    step_0, later = ratios([0.0], [0.0]), ratios([-0.5], [-3.0])
    for loss, pairs, chosen, rejected in (
        (losses.apo_zero, step_0, -0.25, 0.25),
        (losses.apo_down, step_0, 0.0, 0.25),
        # s(0.5) - s(2.5) and s(2.5), where s is the derivative of the sigmoid
        (losses.apo_down, later, 0.164900, 0.070104),
    ):
        _, by_chosen, by_rejected = gradients(lambda p, loss=loss: loss(p, beta=1.0), pairs)
        assert_near(by_chosen, chosen, atol=1e-6)
        assert_near(by_rejected, rejected, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, -0.0, 1e-6, -1e-45, -1e-9, -1e-7, -1e-4, -100.0, -1e4])
@pytest.mark.parametrize("other", [0.0, -1e-7, -1.0, -1e4])
def test_orpo_odds(mean: float, other: float) -> None:
    """The odds of a certain response are finite, even if its log-prob was rounded to above 0."""
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
    """The loss is log 2 where the chosen response leads by gamma / beta a token."""
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
    """The more the other objectives prefer the chosen response, the larger the loss."""
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
    """A loss needs references, lengths, or both, and leaves alone what it does not need."""
    pairs, loss = make(), PAIR_LOSSES[name]
    means = name in ("ipo", "sigmoid_norm", "orpo", "simpo")
    references = name not in ("orpo", "simpo")
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
