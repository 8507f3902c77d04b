"""Laws that hold for any blend, tried on whatever hypothesis comes up with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import EPS, INF, Backend, Problem, magnitudes, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

numbers = st.floats(-30, 30, width=32)
logits = st.one_of(numbers, numbers, numbers, st.sampled_from([-INF, 0.0, -0.0, 1e4, 1e-40]))


@st.composite
def problems(draw: Any, power: bool = False) -> Problem:
    """Up to four terms on up to three rows of up to 20 tokens; the first token is never removed."""
    terms, rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    z = torch.from_numpy(draw(arrays(np.float32, (terms, rows, vocab), elements=logits)))
    z[:, :, 0].clamp_(min=-30.0)
    if power:
        weights = torch.tensor(draw(st.lists(st.floats(0.1, 1), min_size=terms, max_size=terms)))
        r = draw(st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]))
        return Problem(list(z), (weights / weights.sum()).tolist(), options={"power": r})
    weights = draw(st.lists(st.floats(-2, 2, width=32), min_size=terms, max_size=terms))
    return Problem(list(z), weights)


def law(**strategies: Any) -> Callable[[Callable[..., None]], Callable[[Backend], None]]:
    """Makes a test whose examples are the same in each run. An interpreter tries the first few."""

    def decorate(check: Callable[..., None]) -> Callable[[Backend], None]:
        def test(backend: Backend) -> None:
            @settings(
                max_examples=4 if backend.interpreted else 60,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def holds(**example: Any) -> None:
                check(backend, **example)

            holds()

        test.__doc__ = check.__doc__
        return test

    return decorate


def on(backend: Backend, p: Problem) -> Problem:
    moved = [z.to(backend.device) for z in p.logits]
    return Problem(moved, p.weights, options=p.options)


def assert_near(a: Tensor, b: Tensor, allowed: Tensor) -> None:
    assert torch.equal(a.isinf(), b.isinf())
    error = torch.where(a.isinf(), 0.0, a.double() - b.double()).abs()
    assert (error <= allowed).all(), f"{error.max():.3g} apart"


@law(p=st.one_of(problems(), problems(power=True)))
def test_probabilities_sum_to_one(backend: Backend, p: Problem) -> None:
    p = on(backend, p)
    total = backend.blend(*p.args, **p.options).double().exp().sum(dim=-1)
    allowed = 1e-5 + 4 * EPS * magnitudes(p).amax(dim=-1)
    assert ((total - 1).abs() <= 2 * allowed).all(), total


@law(p=problems(), shift=st.floats(-50, 50, width=32), data=st.data())
def test_a_constant_on_a_term_changes_nothing(
    backend: Backend, p: Problem, shift: float, data: Any
) -> None:
    p = on(backend, p)
    k = data.draw(st.integers(0, len(p.logits) - 1))
    moved = Problem([*p.logits[:k], p.logits[k] + shift, *p.logits[k + 1 :]], p.weights)
    rounded = 4 * EPS * 2 * (p.logits[k].nan_to_num(0, 0, 0).abs().amax() + abs(shift))
    allowed = tolerance(p) + tolerance(moved) + rounded
    assert_near(backend.blend(*p.args), backend.blend(*moved.args), allowed)


@law(p=st.one_of(problems(), problems(power=True)), data=st.data())
def test_terms_in_any_order(backend: Backend, p: Problem, data: Any) -> None:
    p = on(backend, p)
    order = data.draw(st.permutations(range(len(p.logits))))
    shuffled = Problem(
        [p.logits[k] for k in order], [p.weights[k] for k in order], options=p.options
    )
    got, want = (backend.blend(*q.args, **q.options) for q in (shuffled, p))
    assert_near(got, want, 2 * tolerance(p))


@law(
    p=st.one_of(problems(), problems(power=True)),
    seed=st.integers(0, 2**64 - 1),
    top_k=st.integers(0, 25),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.01, 100),
    masked=st.integers(1, 5),
)
def test_draws_are_of_what_is_left(
    backend: Backend, p: Problem, seed: int, masked: int, **cut: float
) -> None:
    """Never a removed token, never one past the vocabulary, never a probability above one."""
    p = on(backend, p)
    p.options["mask"] = torch.arange(p.vocab, device=backend.device) % (masked + 1) != 1
    out = backend.blend_sample(*p.args, **p.options, **cut, seed=seed, step=0)
    assert ((out.tokens >= 0) & (out.tokens < p.vocab)).all()
    log_p = backend.blend(*p.args, **p.options).gather(1, out.tokens[:, None])[:, 0]
    assert log_p.isfinite().all()
    assert_near(out.logprobs, log_p, 2 * tolerance(p).gather(1, out.tokens[:, None])[:, 0])
    assert (out.sampled_logprobs <= 1e-6).all()


@law(p=st.one_of(problems(), problems(power=True)), seed=st.integers(0, 2**64 - 1))
def test_cold_is_greedy(backend: Backend, p: Problem, seed: int) -> None:
    """As the temperature falls, a draw is the best token, or one tied with it within rounding."""
    p = on(backend, p)
    cold = backend.blend_sample(*p.args, **p.options, temperature=1e-9, seed=seed, step=0)
    greedy = backend.blend_sample(*p.args, **p.options, do_sample=False, seed=seed, step=0)
    score = p.scores()
    assert (cold.tokens >= 0).all()
    lost = [score.gather(1, x.tokens[:, None])[:, 0] for x in (greedy, cold)]
    allowed = tolerance(p).gather(1, cold.tokens[:, None])[:, 0]
    assert ((lost[0] - lost[1]).abs() <= 1e-5 + 2 * allowed).all()
