"""Draws over many groups of tokens: a row's own affair, and on every backend the reference's."""

from typing import Any

import numpy as np
import pytest
import torch
from batches import ROWS, assert_rows, batch, settings, take
from cases import INF, Backend, Problem, assert_samples_agree, normal
from crossfade.ops import Draw, Inputs, reference
from numpy_noise import GROUP, gumbel_max

HOT = {"temperature": 2.0, "top_k": 0, "top_p": 0.99, "min_p": 0.0}  # many groups have a chance


@pytest.mark.parametrize("cut", [{}, HOT], ids=["truncated", "hot"])
def test_rows_of_many_groups(backend: Backend, cut: dict[str, Any]) -> None:
    """A row alone, three of them, and all of them in another order draw the same tokens."""
    vocab, parts = 5 * GROUP + 2, [[3], [0, 2, 5], [5, 3, 1, 0, 2, 4]]
    if backend.interpreted:
        vocab, parts = 4 * GROUP + 2, [[3], [5, 0]]
    p, chosen = batch(backend, vocab=vocab), settings(ROWS, backend.device) | cut
    whole = backend.blend_sample(*p.args, **p.options, **chosen)
    assert len({t // GROUP for t in whole.tokens.tolist()}) > 2
    for rows in parts:
        part, own = take(p, chosen, rows)
        assert_rows(backend.blend_sample(*part.args, **part.options, **own), whole, rows)


GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 300},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.01},
    "all": {"temperature": 1.5, "top_k": 400, "top_p": 0.95, "min_p": 0.001},
}


@pytest.mark.parametrize("cut", GIVEN)
@pytest.mark.parametrize("vocab", [255, 256, 257, 511, 513, 1100])
def test_many_draws_are_the_references(kernel: Backend, vocab: int, cut: str) -> None:
    """Of two rows, which are flat and peaked, at each of many steps; also from the last group."""
    count = 4 if kernel.interpreted else 400
    z = torch.cat([normal(1, vocab, 1, scale=0.5), normal(1, vocab, 2, scale=2.0)])
    z[:, -1] = 4.0
    z = z.to(kernel.device).repeat(count // 2, 1)
    ids = {"seed": 5, "stream": 1, "step": torch.arange(count, device=kernel.device)}
    out = assert_samples_agree(kernel, Problem([z], [1.0]), **ids, **GIVEN[cut])
    groups = set((out.tokens // GROUP).tolist())
    assert kernel.interpreted or groups == set(range(-(-vocab // GROUP)))


def test_removed_groups(kernel: Backend) -> None:
    """Groups of which nothing is left stand between others, at the beginning, and at the end."""
    vocab = 6 * GROUP + 10
    count = 2 if kernel.interpreted else 100
    z = normal(1, vocab, 3, scale=0.5).to(kernel.device)
    z[:, : 2 * GROUP] = -INF
    z[:, 3 * GROUP : 4 * GROUP] = -INF
    mask = torch.arange(vocab, device=kernel.device) < 5 * GROUP
    p = Problem([z.expand(count, -1)], [1.0], options={"mask": mask})
    out = assert_samples_agree(kernel, p, seed=1, step=torch.arange(count, device=kernel.device))
    assert {t // GROUP for t in out.tokens.tolist()} <= {2, 4}


@pytest.mark.parametrize("vocab", [7, 256, 257, 1100])
def test_reference_is_the_second_implementation(vocab: int) -> None:
    """torch and numpy draw the same tokens, over one group and many."""
    x, streams = normal(1, vocab, 4, scale=1.0).double().log_softmax(dim=-1), torch.arange(200)
    inputs = Inputs([x.expand(200, -1)], [1.0])
    out = reference.blend_sample(inputs, Draw(inputs, seed=9, stream=streams, step=2), False, False)
    want = gumbel_max(x[0].numpy(), 9, streams.numpy().astype(np.uint64), 2)
    assert out.tokens.tolist() == want.tolist()


def test_log_probs_do_not_know_of_groups(backend: Backend) -> None:
    """They are those of the whole row, before truncation and after it."""
    vocab = 2 * GROUP + 5
    z = normal(3, vocab, 6, device=backend.device)
    ids = {"seed": 0, "stream": torch.arange(3, device=backend.device), "step": 4}
    out = backend.blend_sample([z], [1.0], temperature=2.0, top_k=200, **ids)
    at = out.tokens[:, None]
    log_p = z.double().log_softmax(dim=-1)
    assert (out.logprobs.double() - log_p.gather(1, at)[:, 0]).abs().max() < 2e-5
    tempered = z.double() / 2
    kth = tempered.topk(200).values[:, -1:]
    log_p = tempered.masked_fill(tempered < kth, -INF).log_softmax(dim=-1)
    assert (out.sampled_logprobs.double() - log_p.gather(1, at)[:, 0]).abs().max() < 2e-5
