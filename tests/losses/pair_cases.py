"""Formulas of the pair losses in numpy, and pairs of responses to try them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crossfade.losses import Pairs
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
# Values of beta * delta and beta * s, from one end of where losses must be finite to the other. The
# kink of the hinge loss, at 1, is not among them.
EXTREMES = [0.0, 1e-6, 0.6, 3.0, 12.0, 17.0, 40.0, 88.0, 104.0, 700.0, 1e4]
EXTREMES = [-x for x in EXTREMES[:0:-1]] + EXTREMES


def log_sigma(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigma(x: Array) -> Array:
    return np.exp(log_sigma(x))


class Numbers:
    """What the symbols of the formulas stand for, in float64, for some `Pairs`."""

    def __init__(self, pairs: Pairs) -> None:
        names = (*FIELDS, "chosen_lengths", "rejected_lengths")
        c, r, rc, rr, nc, nr = (getattr(pairs, x).detach().double().numpy() for x in names)
        self.c, self.r, self.ref_c, self.ref_r = c, r, rc, rr
        self.s_c, self.s_r, self.len_c, self.len_r = c - rc, r - rr, nc, nr
        self.delta = self.s_c - self.s_r
        self.l_c, self.l_r = c / nc, r / nr


def expect_sigmoid(x: Numbers, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    e, z = label_smoothing, beta * x.delta
    return -(1 - e) * log_sigma(z) - e * log_sigma(-z)


def expect_ipo(x: Numbers, beta: float = 0.1) -> Array:
    return (x.s_c / x.len_c - x.s_r / x.len_r - 1 / (2 * beta)) ** 2


def expect_sigmoid_norm(x: Numbers, beta: float = 5.0) -> Array:
    return -log_sigma(beta * (x.s_c / x.len_c - x.s_r / x.len_r))


def expect_discopop(x: Numbers, beta: float = 0.1, tau: float = 0.05) -> Array:
    z = beta * x.delta
    # a product of the share and of exp(-z), which alone may be more than floats hold
    return -sigma(-z / tau) * log_sigma(z) + np.exp(log_sigma(z / tau) - z)


def expect_bco_pair(x: Numbers, beta: float = 0.1, shift: float = 0.0) -> Array:
    return -log_sigma(beta * x.s_c - shift) - log_sigma(shift - beta * x.s_r)


def expect_aot(x: Numbers, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    e, z = label_smoothing, beta * (np.sort(x.c - x.r) - np.sort(x.ref_c - x.ref_r))
    return -(1 - e) * log_sigma(z) - e * log_sigma(-z)


def expect_aot_unpaired(x: Numbers, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    e, z = label_smoothing, beta * (np.sort(x.s_c) - np.sort(x.s_r))
    return -(1 - e) * log_sigma(z) - e * log_sigma(-z)


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
    "sigmoid_norm": expect_sigmoid_norm,
    "discopop": expect_discopop,
    "bco_pair": expect_bco_pair,
    "aot": expect_aot,
    "aot_unpaired": expect_aot_unpaired,
}
OF_BATCHES = ("aot", "aot_unpaired")  # whose entries depend on all pairs
OPTIONS: dict[str, list[dict[str, float]]] = {
    "sigmoid": [{"beta": 0.3, "label_smoothing": 0.2}],
    "robust": [{"beta": 0.3, "label_smoothing": 0.2}],
    "exo_pair": [{"beta": 0.3, "label_smoothing": 0.2}, {"label_smoothing": 1e-12}],
    "orpo": [{"lam": 1.7}],
    "simpo": [{"beta": 0.3, "gamma": 0.0}],
    "discopop": [{"beta": 0.3, "tau": 0.5}, {"tau": 1.0}],
    "bco_pair": [{"beta": 0.3, "shift": 1.2}],
    "aot": [{"beta": 0.3, "label_smoothing": 0.2}],
    "aot_unpaired": [{"beta": 0.3, "label_smoothing": 0.2}],
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
    """Pairs of responses of one token that have these log-ratios."""
    s_c, s_r = torch.as_tensor(chosen, dtype=dtype), torch.as_tensor(rejected, dtype=dtype)
    zero, one = torch.zeros_like(s_c), torch.ones_like(s_c, dtype=torch.int64)
    return Pairs(s_c, s_r, zero, zero, one, one)


def gradients(loss: Callable[[Pairs], Tensor], pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, and their gradients with respect to `chosen` and to `rejected`."""
    leaves = [x.detach().clone().requires_grad_() for x in (pairs.chosen, pairs.rejected)]
    result = loss(replace(pairs, chosen=leaves[0], rejected=leaves[1]))
    by_chosen, by_rejected = torch.autograd.grad(result.sum(), leaves, materialize_grads=True)
    return result.detach(), by_chosen, by_rejected


def assert_near(got: Tensor, want: Array | float, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    want = np.broadcast_to(np.asarray(want), tuple(got.shape))
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=rtol, atol=atol)
