"""Memory and waits: whatever the threads do first, results are those of one thread, and torch's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sweeps import every
from tapes import record
from torch import Tensor


def chain(seed: int, width: int) -> Any:
    """A random function of two tensors ``[rows, width]``: rows are computed with alone, together,
    crosswise and by products."""
    rng = random.Random(seed)
    weights = [torch.randn(width, width) / width**0.5 for _ in range(3)]
    plan = [(rng.randrange(9), rng.randrange(4), rng.randrange(4)) for _ in range(40)]

    def f(x: Tensor, y: Tensor) -> Tensor:
        held = [x, y, x + y, x - y]
        for what, i, j in plan:
            a, b = held[i], held[j]
            new = [
                lambda a, b: a + b,
                lambda a, b: a * b.sigmoid(),
                lambda a, b: a - b.mean(-1, keepdim=True),
                lambda a, b: torch.cat([a[:, 5:], b[:, :5]], dim=-1),
                lambda a, b: torch.cat([a[1:], b[:1]]),
                lambda a, b: a * b[:1],
                lambda a, b, w=weights[i % 3]: (a @ w).tanh(),
                lambda a, b: a.view(len(a), -1, 4).transpose(1, 2).reshape(len(a), -1) + b,
                lambda a, b: a.softmax(-1) - b,
            ][what](a, b)
            held[(i + j + what) % 4] = new.tanh()
        return held[0] + held[1] * held[2] - held[3]

    return f


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", every(4, range(16)))
def test_random_functions(seed: int, rows: int) -> None:
    width = 24
    torch.manual_seed(seed)
    f = chain(seed, width)
    program = record(f, [torch.randn(rows, width), torch.randn(rows, width)])
    threads = torch.get_num_threads()
    try:
        for _ in range(2):
            inputs = [torch.randn(rows, width), torch.randn(rows, width)]
            found = []
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                for _ in range(4):
                    program.run(inputs)
                    found.append(program.results[0].clone())
            assert all(torch.equal(x, found[0]) for x in found)
            torch.testing.assert_close(found[0], f(*inputs), atol=2e-4, rtol=2e-4)
    finally:
        torch.set_num_threads(threads)


def test_memory_is_used_again() -> None:
    """A hundred layers take no more room than a few."""

    def f(x: Tensor) -> Tensor:
        for _ in range(100):
            x = (x * 2).tanh() + x
        return x

    program = record(f, [torch.randn(2, 64)])
    assert program.arena.numel() <= 8 * 2 * 64 * 4
