"""A row's result depends on its own inputs alone: not on the batch, its order, or the threads."""

import functools

import pytest
import torch
from batches import ROWS, assert_rows, batch, pick_rows, settings, take, tensors
from cases import INF, NAN, Backend
from crossfade.ops import BlendSample, Support
from sweeps import product


@functools.cache
def whole_batch(backend: Backend, power: float) -> tuple[BlendSample, torch.Tensor]:
    p, chosen = batch(backend, power), settings(ROWS, backend.device, power)
    return backend.blend_sample(*p.args, **p.options, **chosen), backend.blend(*p.args, **p.options)


@pytest.mark.parametrize(
    ("power", "rows"),
    product(
        [0.0, 1.0],
        [[5, 3, 1, 0, 2, 4], [2], [0], [5], [4, 4, 4], [1, 3], [*range(6), *range(6)]],
        together=1,
    ),
    ids=str,
)
def test_any_rows_in_any_order(backend: Backend, rows: list[int], power: float) -> None:
    p, chosen = batch(backend, power), settings(ROWS, backend.device, power)
    whole, log_p = whole_batch(backend, power)
    part, own = take(p, chosen, rows)
    assert_rows(backend.blend_sample(*part.args, **part.options, **own), whole, rows)
    got = backend.blend(*part.args, **part.options)
    torch.testing.assert_close(got, log_p[rows], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(("power", "rows"), product([0.0, 1.0], [1, 2, 5], together=1))
def test_threads(backend: Backend, rows: int, power: float) -> None:
    """Threads take a row each or, of few rows, a part of the vocabulary."""
    if backend.device != "cpu" or backend.interpreted:
        pytest.skip("runs no threads of the CPU")
    p = batch(backend, power, vocab=30_011, rows=rows)
    p.options["support"] = Support(top_p=0.999)
    chosen = settings(rows, backend.device, power)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, log_p = (
            backend.blend_sample(*p.args, **p.options, **chosen),
            backend.blend(*p.args, **p.options),
        )
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_rows(backend.blend_sample(*p.args, **p.options, **chosen), one, slice(None))
            got = backend.blend(*p.args, **p.options)
            torch.testing.assert_close(got, log_p, atol=2e-6, rtol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("power", "junk"), product([0.0, 1.0], [NAN, INF, -INF], together=1))
def test_bad_rows_leave_others_alone(backend: Backend, junk: float, power: float) -> None:
    p, chosen = batch(backend, power), settings(ROWS, backend.device, power)
    good = [0, 2, 3, 5]
    want, log_p = whole_batch(backend, power)
    p.logits[0][1] = junk
    p.logits[1][4] = junk
    got = backend.blend_sample(*p.args, **p.options, **chosen)
    assert got.tokens.tolist() == [-1 if b in (1, 4) else want.tokens[b] for b in range(ROWS)]
    assert_rows(pick_rows(got, good), want, good)
    torch.testing.assert_close(backend.blend(*p.args, **p.options)[good], log_p[good])


def test_again_is_the_same(backend: Backend) -> None:
    """Results are the same to the last bit; torch's generator and the inputs stay as they were."""
    p, chosen = batch(backend), settings(ROWS, backend.device)
    copies = [x.clone() for x in (*p.logits, *p.values, p.weights)]
    state = torch.get_rng_state()
    first = backend.blend_sample(*p.args, **p.options, **chosen)
    again = backend.blend_sample(*p.args, **p.options, **chosen)
    for a, b in zip(tensors(first), tensors(again), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    for x, copy in zip((*p.logits, *p.values, p.weights), copies, strict=True):
        assert torch.equal(x, copy)


def test_inputs_that_require_grad(backend: Backend) -> None:
    """Results are the same, in inference mode too; a backward pass through them is an error."""
    p, chosen = batch(backend), settings(ROWS, backend.device)
    want, log_p = whole_batch(backend, 0.0)
    with torch.inference_mode():
        assert_rows(backend.blend_sample(*p.args, **p.options, **chosen), want, slice(None))
        assert torch.equal(backend.blend(*p.args, **p.options), log_p)
    for x in (*p.logits, *p.values, p.weights, p.value_weights):
        x.requires_grad_()
    got = backend.blend_sample(*p.args, **p.options, **chosen)
    assert_rows(got, want, slice(None))
    for x in (got.logprobs, backend.blend(*p.args, **p.options)):
        with pytest.raises(NotImplementedError, match="has no derivative"):
            x.sum().backward()
