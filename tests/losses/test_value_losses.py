"""FUDGE and CD-Q against their formulas, and at true values, which training must not move."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from crossfade import losses
from torch import Tensor

NAN, INF = float("nan"), float("inf")
LENGTHS = [4, 1, 3]


def case(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values, expected = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    rewards = torch.randn(3, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "values": values,
        "expected": expected,
        "rewards": rewards,
        "lengths": torch.tensor(LENGTHS),
    }


def without(c: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in c.items() if name not in names}


def by_hand(c: dict[str, Tensor], bootstrap: bool) -> list[float]:
    v, e, r = (c[name].double().numpy() for name in ("values", "expected", "rewards"))
    rows = []
    for b, n in enumerate(LENGTHS):
        target = [e[b, t] if bootstrap and t < n - 1 else r[b] for t in range(n)]
        rows.append(sum((v[b, t] - target[t]) ** 2 for t in range(n)) / 2)
    return rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_formulas(dtype: torch.dtype) -> None:
    c = case(dtype)
    for got, bootstrap in (
        (losses.fudge(**without(c, "expected")), False),
        (losses.cd_q(**c), True),
    ):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = by_hand(c, bootstrap)
        np.testing.assert_allclose(
            got.numpy(), want, rtol=1e-12 if got.dtype.itemsize == 8 else 1e-6
        )


def test_padding_is_not_read() -> None:
    c = case()
    want = losses.fudge(**without(c, "expected")), losses.cd_q(**c)
    at = torch.arange(4)
    c["values"][at >= c["lengths"][:, None]] = NAN
    c["expected"][at >= c["lengths"][:, None] - 1] = NAN
    c["values"].requires_grad_()
    for got, known in zip(
        (losses.fudge(**without(c, "expected")), losses.cd_q(**c)), want, strict=True
    ):
        assert torch.equal(got, known)
        (grad,) = torch.autograd.grad(got.sum(), c["values"])
        assert torch.equal(grad == 0, at >= c["lengths"][:, None])


def test_gradients_go_to_values_alone() -> None:
    c = case()
    for name in ("values", "expected", "rewards"):
        c[name].requires_grad_()
    for loss in (losses.fudge(**without(c, "expected")), losses.cd_q(**c)):
        grads = torch.autograd.grad(
            loss.sum(), [c["values"], c["expected"], c["rewards"]], allow_unused=True
        )
        assert grads[0] is not None
        assert grads[1] is None
        assert grads[2] is None
    fixed = {name: x.detach() for name, x in c.items()}
    for function in (losses.fudge, losses.cd_q):
        others = without(fixed, "values", *(["expected"] if function is losses.fudge else []))
        assert torch.autograd.gradcheck(lambda v: function(v, **others), c["values"])  # noqa: B023


def test_true_values_stay() -> None:
    """Over all texts of three tokens the mean gradient is 0 if each V is the mean reward."""
    generator = torch.Generator().manual_seed(1)
    words, depth = 3, 3
    logits = {
        prefix: torch.randn(words, generator=generator, dtype=torch.float64)
        for n in range(depth)
        for prefix in itertools.product(range(words), repeat=n)
    }
    texts = list(itertools.product(range(words), repeat=depth))
    reward = dict(zip(texts, torch.randn(len(texts), generator=generator).double(), strict=True))

    def value(prefix: tuple[int, ...]) -> Tensor:
        if len(prefix) == depth:
            return reward[prefix]
        q = torch.stack([value((*prefix, z)) for z in range(words)])
        return losses.expected_value(logits[prefix], q)

    def probability(text: tuple[int, ...]) -> Tensor:
        each = [logits[text[:n]].softmax(0)[text[n]] for n in range(depth)]
        return torch.stack(each).prod()

    prefixes = [text[:n] for text in texts for n in range(1, depth + 1)]
    table = {prefix: value(prefix).detach().requires_grad_() for prefix in dict.fromkeys(prefixes)}
    values = torch.stack([table[p] for p in prefixes]).view(-1, depth)
    rewards = torch.stack([reward[t] for t in texts])
    expected = torch.stack([value(p) for p in prefixes]).view(-1, depth)
    weights = torch.stack([probability(t) for t in texts])
    assert weights.sum() == pytest.approx(1)
    lengths = torch.full((len(texts),), depth)
    each = {
        "fudge": losses.fudge(values, rewards, lengths),
        "cd_q": losses.cd_q(values, expected, rewards, lengths),
    }
    for name, loss in each.items():
        grads = torch.autograd.grad((weights * loss).sum(), list(table.values()), retain_graph=True)
        assert max(g.abs() for g in grads) < 1e-12, name
    assert each["cd_q"].abs().max() < 1e-24, "nothing is left"
    assert (each["fudge"] > 0).all(), "rollouts still scatter"
    moved = losses.fudge(values + 0.1, rewards, lengths)
    grads = torch.autograd.grad((weights * moved).sum(), list(table.values()))
    assert min(grads) > 0, "too high values fall"


def test_expected_value() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    q = torch.tensor([[1.0, INF, 3.0], [1.0, 2.0, 6.0]], requires_grad=True)
    got = losses.expected_value(logits, q)
    e = np.exp(1.0)
    np.testing.assert_allclose(got.detach().numpy(), [(1 + 3 * e) / (1 + e), 3.0], rtol=1e-6)
    grads = torch.autograd.grad(got.sum(), [logits, q])
    assert all(g.isfinite().all() for g in grads)
    assert losses.expected_value(logits.bfloat16(), q.bfloat16()).dtype == torch.float32


GOOD = {**case(torch.float32)}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"values": [0.0]}, TypeError, "values is a list"),
        ({"values": torch.zeros(3)}, ValueError, r"values has shape \[3\]; it must be \[rows, T\]"),
        ({"values": torch.zeros(3, 0)}, ValueError, r"values has shape \[3, 0\]"),
        ({"values": torch.zeros(3, 4).int()}, TypeError, "values has dtype torch.int32"),
        ({"expected": torch.zeros(3, 3)}, ValueError, r"expected has shape \[3, 3\]; .* \[3, 4\]"),
        ({"expected": None}, TypeError, "expected is a NoneType"),
        ({"rewards": torch.zeros(2)}, ValueError, r"rewards has shape \[2\]; it must be \[3\]"),
        ({"rewards": torch.zeros(3, 1)}, ValueError, r"rewards has shape \[3, 1\]"),
        (
            {"lengths": torch.ones(3)},
            TypeError,
            "lengths has dtype torch.float32; it must be int64",
        ),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths has shape \[1\]"),
        ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "lengths is on"),
    ],
)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    call = {**GOOD, **changes}
    with pytest.raises(error, match=f"^{says}"):
        losses.cd_q(**call)
    if "expected" not in changes:
        with pytest.raises(error, match=f"^{says}"):
            losses.fudge(**without(call, "expected"))


def test_bad_expectations() -> None:
    with pytest.raises(ValueError, match=r"^logits has shape \[3\]; it must be \[2, 3\]"):
        losses.expected_value(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^q has shape \[\]"):
        losses.expected_value(torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(TypeError, match=r"^q is a float"):
        losses.expected_value(torch.zeros(3), 1.0)  # type: ignore[arg-type]
