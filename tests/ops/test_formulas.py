"""The blends of the literature against their formulas, written out from the papers in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import INF, NAN, Backend, Problem, normal, tolerance
from crossfade.ops import Support
from torch import Tensor

ROWS, VOCAB = 3, 67
Formula = Callable[
    [list[Tensor], Tensor], Tensor
]  # (log p of each term, a value) -> log pi + const


def on(allowed: Tensor, score: Tensor) -> Tensor:
    return score.masked_fill(~allowed, -float("inf"))


def top(log_p: Tensor, k: int) -> Tensor:
    return log_p >= log_p.topk(k, dim=-1).values[:, -1:]


# method: weights, formula, further arguments
METHODS: dict[str, tuple[Sequence[float], Formula, dict[str, Any]]] = {
    "one term": ([1.0], lambda p, q: p[0], {}),
    "tempered term": ([0.25], lambda p, q: p[0] / 4, {}),
    "EFT": ([1, 0.8, -0.8], lambda p, q: p[0] + 0.8 * (p[1] - p[2]), {}),
    "DeRa": ([0.7, 0.3], lambda p, q: (1 - 0.3) * p[0] + 0.3 * p[1], {}),
    "DeRa, extrapolating": ([-0.7, 1.7], lambda p, q: (1 - 1.7) * p[0] + 1.7 * p[1], {}),
    "MOD, reverse KL": ([0.2, 0.5, 0.3], lambda p, q: 0.2 * p[0] + 0.5 * p[1] + 0.3 * p[2], {}),
    "MOD, forward KL": (
        [0.2, 0.5, 0.3],
        lambda p, q: -(0.2 / p[0].exp() + 0.5 / p[1].exp() + 0.3 / p[2].exp()).log(),
        {"power": -1},
    ),
    "MOD, alpha-divergence 0.5": (
        [0.4, 0.6],
        lambda p, q: ((0.4 * p[0].exp() ** -0.5 + 0.6 * p[1].exp() ** -0.5) ** (-1 / 0.5)).log(),
        {"power": -0.5},
    ),
    "power mean 2": (
        [0.4, 0.6],
        lambda p, q: (0.4 * p[0].exp() ** 2 + 0.6 * p[1].exp() ** 2).sqrt().log(),
        {"power": 2.0},
    ),
    "mixture": (
        [0.25, 0.75],
        lambda p, q: (0.25 * p[0].exp() + 0.75 * p[1].exp()).log(),
        {"power": 1.0},
    ),
    "union": (
        [0.2, 0.5, 0.3],
        lambda p, q: torch.stack(p).exp().amax(0).log(),
        {"power": INF},
    ),
    "intersection": (
        [0.2, 0.5, 0.3],
        lambda p, q: torch.stack(p).exp().amin(0).log(),
        {"power": -INF},
    ),
    "a value over a union": (
        [0.4, 0.6],
        lambda p, q: torch.maximum(p[0], p[1]) - 0.5 * q,
        {"value": -0.5, "power": INF},
    ),
    "the tokens of one term in an intersection": (
        [0.4, 0.6],
        lambda p, q: on(top(p[1], 20), torch.minimum(p[0], p[1])),
        {"power": -INF, "support": Support(term=1, top_k=20)},
    ),
    "GenARM": ([1, 0.3, 0.6], lambda p, q: p[0] + 0.3 * p[1] + 0.6 * p[2], {}),
    "classifier-free guidance": ([-0.5, 1.5], lambda p, q: p[0] + 1.5 * (p[1] - p[0]), {}),
    "contrastive decoding": (
        [1.5, -0.5],
        lambda p, q: on(
            p[0].exp() >= 0.05 * p[0].exp().amax(-1, keepdim=True), 1.5 * p[0] - 0.5 * p[1]
        ),
        {"support": Support(term=0, min_p=0.05)},
    ),
    "contrastive decoding, the amateur's tokens": (
        [1.5, -0.5],
        lambda p, q: on(top(p[1], 20), 1.5 * p[0] - 0.5 * p[1]),
        {"support": Support(term=1, top_k=20)},
    ),
    "token-wise value": ([1.0], lambda p, q: p[0] + 1.5 * q, {"value": 1.5}),
    "ARGS": (
        [1.0],
        lambda p, q: on(top(p[0], 10), p[0] + 1.5 * q),
        {"value": 1.5, "support": Support(top_k=10)},
    ),
    "value over a mixture": (
        [0.25, 0.75],
        lambda p, q: (0.25 * p[0].exp() + 0.75 * p[1].exp()).log() - 0.5 * q,
        {"value": -0.5, "power": 1},
    ),
}


def assert_is(got: Tensor, truth: Tensor, p: Problem) -> None:
    truth = truth.log_softmax(dim=-1)
    assert torch.equal(got.isinf(), truth.isinf())
    error = (got.double() - truth).nan_to_num(0.0).abs()
    assert (error <= tolerance(p)).all(), f"off by {error.max():.3g}"
    assert ((got.double().exp().sum(dim=-1) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("method", METHODS)
def test_method(backend: Backend, method: str) -> None:
    weights, formula, options = METHODS[method]
    options = dict(options)
    z = [normal(ROWS, VOCAB, k, device=backend.device) for k in range(len(weights))]
    q = normal(ROWS, VOCAB, 9, scale=1.0, device=backend.device)
    value = options.pop("value", None)
    p = (
        Problem(z, weights, [q], [value], options)
        if value
        else Problem(z, weights, [], None, options)
    )
    truth = formula([t.double().log_softmax(dim=-1) for t in z], q.double())
    assert_is(backend.blend(*p.args, **p.options), truth, p)


def test_proxy_tuning_on_raw_logits(backend: Backend) -> None:
    """Normalisers cancel: shifting any term's row by a constant is no change (`power` 0)."""
    z = [normal(ROWS, VOCAB, k, device=backend.device) for k in range(3)]
    shifted = [t + 10.0 * (k + 1) for k, t in enumerate(z)]
    p = Problem(shifted, [1, 0.8, -0.8])
    truth = z[0].double() + 0.8 * (z[1].double() - z[2].double())
    assert_is(backend.blend(*p.args), truth, p)


def test_a_fader_of_its_own_for_each_request(backend: Backend) -> None:
    """DeRa with a lambda for each request. Where lambda is 0, a NaN in its term does not matter."""
    z = [normal(ROWS, VOCAB, k, device=backend.device) for k in range(2)]
    z[1][1] = NAN
    lam = torch.tensor([0.3, 0.0, 2.0], device=backend.device)
    p = Problem(z, torch.stack([1 - lam, lam], dim=1))
    log_p = [t.double().log_softmax(dim=-1) for t in z]
    truth = (1 - lam[:, None]) * log_p[0] + lam[:, None] * log_p[1].nan_to_num(0.0)
    assert_is(backend.blend(*p.args), truth, p)


@pytest.mark.parametrize("power", [1e-3, 1e-7, 1e-20, 1e-38, 1e-44, 1e-300, -1e-7, -1e-20, -1e-44])
@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.0, 0.4, 0.6003]], ids=str)
def test_tiny_powers(backend: Backend, weights: list[float], power: float) -> None:
    """The mean goes to the geometric one, which differs by some |power| times a variance.

    A log-sum-exp divided by the power would be rounding alone; and float32 has no such powers.
    """
    z = [normal(2, 40, k, device=backend.device) for k in range(3)]
    got = backend.blend(z, weights, power=power).double().cpu()
    log_p = torch.stack([x.double().cpu().log_softmax(-1) for x in z])
    w = torch.tensor(weights, dtype=torch.float64)
    w = (w / w.sum())[:, None, None]
    mean = (w * log_p).sum(0)
    variance = (w * (log_p - mean).square()).sum(0).max().item()
    allowed = 2e-5 + abs(power) * variance
    torch.testing.assert_close(got, mean.log_softmax(-1), rtol=0, atol=allowed)
