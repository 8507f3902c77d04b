"""Parts of a blend: clamped sums, unions and intersections that are added to other terms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agreement import assert_agrees
from cases import INF, NAN, Backend, Problem, assert_blend_agrees, assert_samples_agree, normal
from crossfade.ops import Part, Support
from test_formulas import assert_is
from torch import Tensor

ROWS, VOCAB = 3, 67
LogP = list[Tensor]

# What is added to p[0], and the parts that mean it, of terms 0, 1 and 2.
PUSHES: dict[str, tuple[Any, list[Part]]] = {
    "clamped": (
        lambda p: (0.8 * (p[1] - p[2])).clamp(-0.5, 0.7),
        [Part([0, 0.8, -0.8], min=-0.5, max=0.7)],
    ),
    "one-sided": (lambda p: (1.5 * p[1] - p[2]).clamp(max=-2.0), [Part([0, 1.5, -1], max=-2.0)]),
    "least of nothing": (lambda p: (p[1] - p[2]).clamp(min=0.0), [Part([0, 1, -1], min=0.0)]),
    "less a union": (
        lambda p: -0.95 * torch.maximum(p[0], p[1]),
        [Part([-0.475, -0.475, 0], math.inf)],
    ),
    "twice an intersection": (
        lambda p: 2 * torch.minimum(p[1], p[2]),
        [Part([0, 1, 1], -math.inf)],
    ),
    "a clamped union": (
        lambda p: torch.maximum(p[1], p[2]).clamp(-6.0, -1.0),
        [Part([0, 0.5, 0.5], math.inf, -6.0, -1.0)],
    ),
    "several": (
        lambda p: (
            (p[1] - p[0]).clamp(-1, 1) + (p[2] - p[0]).clamp(-1, 1) - torch.minimum(p[0], p[2])
        ),
        [
            Part([-1, 1, 0], min=-1, max=1),
            Part([-1, 0, 1], min=-1, max=1),
            Part([-0.5, 0, -0.5], -math.inf),
        ],
    ),
}


@pytest.mark.parametrize("push", PUSHES)
def test_formula(backend: Backend, push: str) -> None:
    """Against the formula, in float64, of log-softmaxes."""
    formula, parts = PUSHES[push]
    z = [normal(ROWS, VOCAB, k, device=backend.device) for k in range(3)]
    p = Problem(z, [1, 0, 0], options={"parts": parts})
    log_p = [t.double().log_softmax(dim=-1) for t in z]
    assert_is(backend.blend(*p.args, **p.options), log_p[0] + formula(log_p), p)


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [67, 515])
def test_with_everything_else(kernel: Backend, vocab: int, power: float) -> None:
    """Under a support and a mask, with values, in three dtypes, with rows of other memory."""
    z = [
        normal(2, vocab, 0, device=kernel.device).bfloat16(),
        normal(2, vocab + 3, 1, device=kernel.device).half()[:, 3:],
        normal(1, vocab, 2, device=kernel.device).expand(2, -1),
    ]
    q = normal(2, vocab, 9, scale=1.0, device=kernel.device)
    own = normal(2, 3, 5, scale=0.5, device=kernel.device)
    options = {
        "power": power,
        "parts": [Part(own, min=-1.0, max=2.0), Part([0.5, 0.25, 0.25], math.inf)],
        "support": Support(term=1, top_k=40),
        "mask": torch.arange(vocab, device=kernel.device) % 7 != 3,
    }
    weights = [0.25, 0.75, 0.0] if power else [1.0, -0.25, 0.0]
    assert_agrees(kernel, Problem(z, weights, [q], [0.5], options))


def test_what_a_term_excludes(backend: Backend) -> None:
    """A clamp bounds what it does to others' tokens; where nothing does, the token is removed."""
    z = torch.zeros(3, 1, 4, device=backend.device)
    z[1, 0, 1] = z[2, 0, 2] = z[1, 0, 3] = z[2, 0, 3] = -INF
    third = math.log(2)  # the log-probs of terms 1 and 2 are -log 2 where they are not -inf

    def pushes(**bounds: float) -> list[float]:
        got = backend.blend([*z], [1, 0, 0], parts=[Part([0, 1, -1], **bounds)])
        return (got - got[:, :1])[0].tolist()

    assert pushes(min=-1.0, max=2.0) == pytest.approx([0.0, -1.0, 2.0, -INF])
    assert pushes(min=-1.0) == pytest.approx([0.0, -1.0, -INF, -INF])
    assert pushes(max=2.0) == pytest.approx([0.0, -INF, 2.0, -INF])
    assert pushes() == pytest.approx([0.0, -INF, -INF, -INF])
    for power, removed in ((INF, [3]), (-INF, [1, 2, 3])):
        got = backend.blend([*z], [1, 0, 0], parts=[Part([0, 1, 1], power)])[0]
        assert got.isinf().nonzero()[:, 0].tolist() == removed
        assert got[0].item() == pytest.approx(-math.log(4 - len(removed)))
    bounded = backend.blend([*z], [1, 0, 0], parts=[Part([0, 1, 1], -INF, min=-3.0)])[0]
    assert (bounded[1] - bounded[0]).item() == pytest.approx(-3 + 2 * third)


def test_weights_of_each_request(kernel: Backend) -> None:
    """A weight of 0 leaves a term out, whatever the term holds; a bad one spoils its row."""
    p = Problem([normal(5, 90, k, device=kernel.device) for k in range(3)], [1.0, 0.0, 0.0])
    own = torch.tensor([[0.0, 1, -1], [0, 0, 0], [0, 0, 1], [0, NAN, 1], [0, 0.5, INF]])
    p.logits[1][1:3] = NAN
    p.logits[2][1] = -INF
    for power in (0.0, INF, -INF):
        parts = [Part(own.to(kernel.device), power, -2.0, 2.0), Part([0.5, 0.0, 0.0], power)]
        p.options = {"parts": parts}
        assert_blend_agrees(kernel, p)
        got = assert_samples_agree(kernel, p, seed=1, step=2)
        assert (got.tokens < 0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("to", [NAN, INF], ids=str)
def test_bad_logits_of_a_part(kernel: Backend, to: float) -> None:
    """A clamp does not hide them."""
    p = Problem([normal(3, 40, k, device=kernel.device) for k in range(2)], [1.0, 0.0])
    p.logits[1][1, 7] = to
    p.options = {"parts": [Part([0.0, 1.0], min=-1.0, max=1.0)]}
    assert_blend_agrees(kernel, p)
    got = assert_samples_agree(kernel, p, seed=1, step=2)
    assert (got.tokens < 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Part([1.0], 1.0), ValueError, "power is 1.0; of a part it must be 0, inf or -inf"),
        (lambda: Part([1.0], NAN), ValueError, "power is nan"),
        (lambda: Part([1.0], min=NAN), ValueError, "min is nan; it must be a number"),
        (lambda: Part([1.0], max="1"), TypeError, "max is '1'; it must be a number"),
        (lambda: Part([1.0], min=2.0, max=1), ValueError, "min is 2.0; it must be at most max"),
        (lambda: Part([1.0], minimum=2.0), TypeError, "unknown argument 'minimum'"),
        (lambda: [Part([1.0])] * 9, ValueError, "parts has 9 members; it must have at most 8"),
        (lambda: Part([1.0]), TypeError, "parts is a Part; it must be a list of Part"),
        (lambda: [([1.0], 0.0)], TypeError, r"parts\[0\] is a tuple; it must be a Part"),
        (
            lambda: [Part([1.0, 2.0])],
            ValueError,
            r"parts\[0\].weights has 2 numbers; it must have 1",
        ),
        (lambda: [Part([NAN])], ValueError, r"parts\[0\].weights\[0\] is nan"),
        (lambda: [Part(1.0)], TypeError, r"parts\[0\].weights is a float"),
        (lambda: [Part(torch.ones(3, 1))], ValueError, r"parts\[0\].weights has shape \[3, 1\]"),
    ],
)
def test_bad_parts(backend: Backend, make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        backend.blend([normal(2, 8, 0, device=backend.device)], [1.0], parts=make())
