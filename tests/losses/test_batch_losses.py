"""Losses that look at a whole batch, and the weights of its pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crossfade import losses
from crossfade.losses import PAIR_LOSSES, Pairs
from pair_cases import FIELDS, OF_BATCHES, Numbers, assert_near, gradients, make, ratios
from torch import Tensor


def reordered(pairs: Pairs, order: Tensor, *names: str) -> Pairs:
    return replace(pairs, **{name: getattr(pairs, name)[order] for name in names})


@pytest.mark.parametrize("name", OF_BATCHES)
def test_quantiles_have_no_order(name: str) -> None:
    """The order of pairs makes no difference; `aot_unpaired` does not know who belongs to whom."""
    pairs, order = make(), torch.from_numpy(np.random.default_rng(1).permutation(64))
    want = PAIR_LOSSES[name](pairs).numpy()
    assert_near(PAIR_LOSSES[name](reordered(pairs, order, *FIELDS)), want)
    torn = reordered(pairs, order, "rejected", "ref_rejected")
    same = np.allclose(PAIR_LOSSES[name](torn).numpy(), want)
    assert same == (name == "aot_unpaired")


@pytest.mark.parametrize("name", OF_BATCHES)
def test_quantiles_of_one_pair_are_dpo(name: str) -> None:
    pairs = make(1)
    got = PAIR_LOSSES[name](pairs, beta=0.3, label_smoothing=0.1)
    assert_near(got, losses.sigmoid(pairs, beta=0.3, label_smoothing=0.1).numpy())


def test_quantiles_by_hand() -> None:
    """Margins 4, 1 of the policy and 2, 3 of the reference: 1 meets 2, and 4 meets 3."""
    pairs = Pairs(*(torch.tensor(x) for x in ([4.0, 1.0], [0.0, 0.0], [2.0, 3.0], [0.0, 0.0])))
    got, by_chosen, _ = gradients(lambda p: losses.aot(p, beta=1.0), pairs)
    want = losses.sigmoid(ratios([-1.0, 1.0], [0.0, 0.0]), beta=1.0)
    assert_near(got, want.numpy(), rtol=1e-6)
    # the gradient goes to the pair that is at the quantile: the second is at the lower one
    assert_near(by_chosen, np.array([-0.268941, -0.731059]), atol=1e-6)


def test_bco_shift() -> None:
    """It is the mean reward of both kinds, and may be given as a tensor or a number."""
    pairs = make()
    x = Numbers(pairs)
    shift = losses.bco_shift(pairs, beta=0.3)
    assert_near(shift, 0.3 * (x.s_c.mean() + x.s_r.mean()) / 2)
    got = losses.bco_pair(pairs, beta=0.3, shift=shift)
    assert_near(got, losses.bco_pair(pairs, beta=0.3, shift=float(shift)).numpy())
    leaf = pairs.chosen.clone().requires_grad_()
    assert not losses.bco_shift(replace(pairs, chosen=leaf)).requires_grad
    with pytest.raises(ValueError, match=r"chosen has shape \[0\]"):
        losses.bco_shift(make(0))


@pytest.mark.parametrize(
    ("shift", "error", "says"),
    [
        ("0", TypeError, "shift is '0'; it must be a number"),
        (float("inf"), ValueError, "shift is inf; it must be finite"),
        (torch.zeros(2), ValueError, r"shift has shape \[2\]; it must be \[\]"),
        (torch.tensor(1), TypeError, "shift has dtype torch.int64"),
    ],
    ids=str,
)
def test_shifts_that_are_none(shift: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        losses.bco_pair(make(), shift=shift)


def test_tau_above_one() -> None:
    with pytest.raises(ValueError, match=r"^tau is 1.5; it must be within \(0, 1\]"):
        losses.discopop(make(), tau=1.5)


def test_wpo_weights_are_mean_likelihoods_beside_a_level() -> None:
    """By hand, of the tokens of one pair: exp of mean logs, over what each token is measured by."""
    rng = np.random.default_rng(0)
    tokens = [np.log(rng.uniform(0.1, 0.9, n)) for n in (3, 5)]
    levels = [np.log(rng.uniform(0.1, 0.9, n)) for n in (3, 5)]
    sums, over = ([torch.tensor([x.sum()]) for x in each] for each in (tokens, levels))
    pairs = Pairs(*sums, None, None, torch.tensor([3]), torch.tensor([5]))
    plain = np.exp(tokens[0].mean() + tokens[1].mean())
    assert_near(losses.wpo_weights(pairs), plain)
    want = np.exp(sum((t - m).mean() for t, m in zip(tokens, levels, strict=True)))
    assert_near(losses.wpo_weights(pairs, *over), want)


def test_wpo_weights_have_no_gradient() -> None:
    pairs = make(8)
    leaves = [x.clone().requires_grad_() for x in (pairs.chosen, pairs.rejected)]
    asked = replace(pairs, chosen=leaves[0], rejected=leaves[1])
    weights = losses.wpo_weights(asked, leaves[0], leaves[1])
    assert not weights.requires_grad
    assert_near(weights, 1.0)  # each response is as likely as its level
    narrow = replace(pairs, **{name: getattr(pairs, name).bfloat16() for name in FIELDS})
    assert losses.wpo_weights(narrow).dtype is torch.float32


def test_wpo_weights_that_cannot_be() -> None:
    pairs = make(8)
    with pytest.raises(ValueError, match=r"^chosen_lengths is None; it must be given"):
        losses.wpo_weights(replace(pairs, chosen_lengths=None))
    with pytest.raises(ValueError, match=r"^rejected_level has shape \[2\]; it must be \[8\]"):
        losses.wpo_weights(pairs, None, torch.zeros(2))
