"""What terms and values pushed: the formula, and what holds of it whatever is blended.

That every kernel gives the reference's pushes is part of `assert_samples_agree`, and so of the
tests of all layouts, dtypes, sizes, masks, supports and truncations.
"""

import math
from typing import Any

import pytest
import torch
from batches import batch, settings, tensors
from cases import INF, NAN, Backend, Problem, assert_samples_agree, normal, problem
from crossfade import ops
from crossfade.ops import BlendSample, Inputs, Support, reference
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

IDS = {"seed": 2**63 + 5, "stream": 7, "step": 3}


def push(backend: Backend, p: Problem, **options: Any) -> BlendSample:
    return backend.blend_sample(*p.args, **p.options, **{**IDS, **options}, return_pushes=True)


def pushes(backend: Backend, p: Problem, **options: Any) -> Tensor:
    found = push(backend, p, **options).pushes
    assert found is not None
    assert found.dtype == torch.float32
    return found.double()


def above_mean(x: Tensor, log_p: Tensor, y: int) -> Tensor:
    """``x(y) - E[x]`` under the tokens that are left."""
    left = log_p > -INF
    return x[y] - (log_p[left].softmax(0) * x[left]).sum()


def expected(p: Problem, tokens: Tensor) -> Tensor:
    """The formula of `BlendSample`, a row and a column at a time."""
    log_p = ops.blend(*p.args, **p.options, backend="reference").double()
    w = reference.weights_of(p.weights, p.rows, log_p.device)
    v = reference.weights_of(p.value_weights if p.values else (), p.rows, log_p.device)
    z, q = ([x[:, : p.vocab].double() for x in group] for group in (p.logits, p.values))
    rows = []
    for b, y in enumerate(tokens.tolist()):
        terms = [above_mean(x[b], log_p[b], y) for x in z]
        values = [above_mean(x[b], log_p[b], y) for x in q]
        row = [w[b, k] * (x - terms[0]) for k, x in enumerate(terms)]
        rows.append(torch.stack(row + [v[b, m] * x for m, x in enumerate(values)]))
    return torch.stack(rows)


@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "temperature": 1.7}, {"do_sample": False}])
def test_formula(backend: Backend, cut: dict[str, Any]) -> None:
    """Of the blend at temperature 1 before truncation, however the token was drawn."""
    p = problem(backend, values=2, rows=5, vocab=300)
    p.weights = normal(5, 3, 1, scale=1.0, device=backend.device)
    out = push(backend, p, **cut)
    assert out.pushes is not None
    torch.testing.assert_close(out.pushes.double(), expected(p, out.tokens), atol=2e-5, rtol=1e-5)
    assert (out.pushes[:, 0] == 0).all()


def test_removed_tokens_count_nothing(backend: Backend) -> None:
    """By a mask, a support and a -inf, whose differences are NaN or infinite."""
    p = problem(backend, rows=4, vocab=290, support=Support(term=2, top_k=200))
    p.options["mask"] = torch.arange(290, device=backend.device) % 3 > 0
    p.logits[0][:, 40:60] = -INF
    p.logits[2][:, 50:70] = -INF
    p.logits[1][:, 0] = NAN  # which the mask removes
    out = push(backend, p)
    assert out.pushes is not None
    torch.testing.assert_close(out.pushes.double(), expected(p, out.tokens), atol=2e-5, rtol=1e-5)


@examples(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    values=st.integers(0, 2),
    masked=st.integers(1, 4),
)
def test_weights_of_one_in_all_share_out_the_departure(
    seed: int, weights: list[float], values: int, masked: int
) -> None:
    """In float64: sum = log(pi / p_0)(y) - E log(pi / p_0)."""
    made = torch.Generator().manual_seed(seed)
    z = [3 * torch.randn(2, 40, generator=made) for _ in range(len(weights) + 1)]
    q = [torch.randn(2, 40, generator=made) for _ in range(values)]
    each = torch.tensor([*weights, 1 - math.fsum(weights)])
    each[0] += 1 - float(each.double().sum())  # as float32 numbers
    mask = torch.arange(40) % (masked + 1) != 1
    i = Inputs(z, each, q, [0.5] * values, mask=mask)
    score, bad = reference.blend_scores(i)
    assert not bad.any()
    tokens = torch.where(mask, torch.rand(2, 40, generator=made), -1.0).argmax(dim=1)
    pi = score.softmax(dim=-1)
    ratio = score.log_softmax(dim=-1) - z[0].double().log_softmax(dim=-1)
    at_token = ratio.gather(1, tokens[:, None])[:, 0]
    want = at_token - torch.where(mask, pi * ratio, 0.0).sum(dim=-1)
    got = reference.pushes_of(i, score, tokens).sum(dim=-1)
    rounded = abs(1 - float(each.double().sum())) * 2 * float(z[0].abs().amax())  # of the weights
    torch.testing.assert_close(got, want, atol=1e-10 + rounded, rtol=0)


def test_they_share_out_the_departure(backend: Backend) -> None:
    """The same of every backend, in its own numbers."""
    p = problem(backend, terms=3, rows=6, vocab=500, values=1)
    p.weights = [0.25, 1.5, -0.75]
    out = push(backend, p)
    assert out.pushes is not None
    log_p = backend.blend(*p.args, **p.options).double()
    ratio = log_p - p.logits[0].double().log_softmax(dim=-1)
    at_token = ratio.gather(1, out.tokens[:, None])[:, 0]
    want = at_token - (log_p.exp() * ratio).sum(dim=-1)
    torch.testing.assert_close(out.pushes.double().sum(dim=-1), want, atol=5e-5, rtol=1e-5)


def test_constants_on_terms_change_nothing(backend: Backend) -> None:
    """Logits or log-probs: normalisers cancel."""
    p = problem(backend, rows=4, vocab=200)
    want = pushes(backend, p)
    p.logits = [z.log_softmax(dim=-1) - 7.0 * k for k, z in enumerate(p.logits)]
    torch.testing.assert_close(pushes(backend, p), want, atol=5e-5, rtol=0)


def test_without_weight(backend: Backend) -> None:
    """Such terms and values push nothing and are not read, in the rows that give them no weight."""
    p = problem(backend, terms=4, values=2, rows=4, vocab=300)
    own = normal(4, 6, 2, scale=1.0, device=backend.device)
    own[:, 2] = own[:, 5] = 0
    own[1, 1] = own[1, 4] = 0
    p.weights, p.value_weights = own[:, :4], own[:, 4:]
    want = pushes(backend, p)
    p.logits[2][:], p.values[1][:], p.logits[1][1], p.values[0][1] = NAN, INF, NAN, -INF
    got = pushes(backend, p)
    assert torch.equal(got, want)
    off = torch.tensor([own[b, c] == 0 or c == 0 for b in range(4) for c in range(6)]).view(4, 6)
    assert torch.equal((got == 0).cpu(), off)


def test_a_first_term_without_weight(backend: Backend) -> None:
    """The others depart from it all the same, as at the end of a fader from one term to another."""
    p = problem(backend, terms=2, rows=3, vocab=300)
    p.weights = [0.0, 1.0]
    out = push(backend, p)
    assert out.pushes is not None
    torch.testing.assert_close(out.pushes.double(), expected(p, out.tokens), atol=2e-5, rtol=1e-5)
    p.logits[0][1, 3] = -INF  # log p_1 - log p_0 is infinite where the blend has mass
    p.logits[0][2, 5] = NAN
    out = assert_samples_agree(backend, p, **IDS)
    assert (out.tokens >= 0).all()
    assert out.pushes is not None
    assert out.pushes.isnan().tolist() == [[False, False], [False, True], [False, True]]


def test_the_lowest_number_bans_a_token(backend: Backend) -> None:
    """Models write it for -inf. Its token has no mass, so its huge difference counts nothing."""
    p = problem(backend, terms=3, rows=4, vocab=600)
    p.weights = [1.0, 0.5, -0.5]
    banned = torch.finfo(torch.float32).min
    p.logits[0][:, 300:] = banned / 2
    p.logits[1][:, 10:20] = banned
    out = assert_samples_agree(backend, p, **IDS)
    assert out.pushes is not None
    assert (out.pushes.abs() < 100).all()


def test_one_token_is_pushed_by_nobody(backend: Backend) -> None:
    mask = torch.arange(300, device=backend.device) == 270
    p = problem(backend, rows=2, vocab=300, values=1, mask=mask)
    assert pushes(backend, p).tolist() == [[0.0] * 4] * 2


def test_one_term_alone_has_no_push(backend: Backend) -> None:
    p = problem(backend, terms=1, rows=3, vocab=100)
    assert pushes(backend, p).tolist() == [[0.0]] * 3


def test_asking_changes_no_other_result(backend: Backend) -> None:
    p, chosen = batch(backend), settings(6, backend.device)
    with_pushes = tensors(backend.blend_sample(*p.args, **p.options, **chosen))
    without = backend.blend_sample(*p.args, **p.options, **{**chosen, "return_pushes": False})
    assert without.pushes is None
    for a, b in zip(with_pushes, tensors(without), strict=False):
        assert torch.equal(a, b)


def test_sixteen_terms_and_values(kernel: Backend) -> None:
    """More than are summed at once, some of them without weight."""
    p = problem(kernel, terms=16, values=16, rows=2, vocab=270)
    p.weights = [0.0 if k % 5 == 3 else w / 3 for k, w in enumerate(p.weights)]
    assert_samples_agree(kernel, p, **IDS)


@pytest.mark.parametrize("power", [1.0, -INF])
def test_power_means_have_none(backend: Backend, power: float) -> None:
    p = problem(backend, power=power)
    with pytest.raises(NotImplementedError, match="return_pushes is True and power is"):
        push(backend, p)
