"""`chunk_select` on every backend, against a sort of tuples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import INF, NAN, Backend, normal
from crossfade.ops import chunk_select
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor


def expected(scores: Tensor, finished: Tensor, width: int) -> list[list[int]]:
    parents = []
    for row, ended in zip(scores.tolist(), finished.tolist(), strict=True):

        def place(i: int, row: list[float] = row) -> tuple[Any, ...]:
            return (1, i) if row[i] != row[i] else (0, -row[i], i)

        kept, samples = sorted(range(len(row)), key=place)[:width], len(row) // width
        parents.append([-1 if ended[i] and n > 0 else i for i in kept for n in range(samples)])
    return parents


def select(backend: Backend, scores: Any, finished: Any, width: int) -> list[list[int]]:
    """Checks the parents against the sort, and returns them."""
    scores = torch.as_tensor(scores, dtype=torch.float32, device=backend.device)
    finished = torch.as_tensor(finished, dtype=torch.bool, device=backend.device)
    got = chunk_select(scores, finished, width, backend=backend.name)
    assert (got.shape, got.dtype, got.device) == (scores.shape, torch.int64, scores.device)
    assert got.tolist() == expected(scores, finished, width)
    return got.tolist()


def test_a_finished_row_is_one_candidate(backend: Backend) -> None:
    """With W = 2 and N = 3, slot 4 is best and forks; slot 1 is finished and fills one slot."""
    scores = [[0.0, 2.0, 1.0, -1.0, 3.0, 0.5]]
    finished = [[False, True, False, False, False, True]]
    assert select(backend, scores, finished, 2) == [[4, 4, 4, 1, -1, -1]]


def test_ties_go_to_the_lower_slot(backend: Backend) -> None:
    """Of a tie the lower slot comes first. Zeros of both signs are equal."""
    no = torch.zeros(2, 6, dtype=torch.bool)
    got = select(backend, [[1.0] * 6, [-0.0, 0.0, 0.0, -0.0, -1.0, 0.0]], no, 3)
    assert got == [[0, 0, 1, 1, 2, 2]] * 2


def test_infinities_and_nan(backend: Backend) -> None:
    """The order is +inf, numbers, -inf, and NaN of either sign."""
    scores = torch.tensor([[NAN, -INF, INF, 0.0], [NAN, NAN, -INF, NAN], [-NAN, NAN, NAN, NAN]])
    got = select(backend, scores, torch.zeros(3, 4, dtype=torch.bool), 4)
    assert got == [[2, 3, 1, 0], [2, 0, 1, 3], [0, 1, 2, 3]]


def test_all_finished(backend: Backend) -> None:
    got = select(backend, normal(3, 8, 1), torch.ones(3, 8, dtype=torch.bool), 2)
    assert [[p >= 0 for p in row] for row in got] == [([True] + [False] * 3) * 2] * 3


@pytest.mark.parametrize("slots", [1, 6, 33])
def test_one_row_or_one_sample(backend: Backend, slots: int) -> None:
    """With W = 1 it is a blockwise best-of-N, and with N = 1 it sorts."""
    scores, finished = normal(2, slots, 2), normal(2, slots, 3) > 1
    select(backend, scores, finished, 1)
    select(backend, scores, finished, slots)


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 32, 32), (1, 17, 61), (70, 4, 4)], ids=str)
def test_sizes(backend: Backend, shape: tuple[int, int, int]) -> None:
    """No prompt, as many slots as a block has threads, slots that fill no vector, many prompts."""
    prompts, width, samples = shape
    if backend.interpreted:
        prompts = min(prompts, 3)
    scores = normal(prompts, width * samples, 4)
    scores[:, ::3] = scores[:, ::3].round()
    select(backend, scores, normal(prompts, width * samples, 5) > 0, width)


def test_views(backend: Backend) -> None:
    scores, finished = normal(12, 5, 6).t()[:, 1:], normal(5, 22, 7)[:, ::2] > 0
    select(backend, scores, finished, 11)


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray, int]:
    prompts, width, samples = (draw(st.integers(1, most)) for most in (3, 5, 5))
    shape = prompts, width * samples
    some = st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])
    scores = arrays(np.float32, shape, elements=st.one_of(some, st.floats(width=32)))
    return draw(scores), draw(arrays(np.bool_, shape)), width


def test_any_scores(backend: Backend) -> None:
    @settings(
        max_examples=10 if backend.interpreted else 200,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problem=problems())
    def holds(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
        scores, finished, width = problem
        select(backend, torch.from_numpy(scores), torch.from_numpy(finished), width)

    holds()


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "list": (([[1.0]], torch.ones(1, 1) > 0, 1), TypeError, "scores is a list; it must be"),
    "dtype": (
        (torch.zeros(1, 4).long(), torch.ones(1, 4) > 0, 2),
        TypeError,
        "scores has dtype torch.int64; it must be float32",
    ),
    "bool": ((torch.zeros(1, 4), torch.ones(1, 4), 2), TypeError, "finished has dtype"),
    "dims": ((torch.zeros(4), torch.ones(4) > 0, 2), ValueError, r"scores has shape \[4\]"),
    "empty": ((torch.zeros(2, 0), torch.ones(2, 0) > 0, 1), ValueError, r"has shape \[2, 0\]"),
    "shape": (
        (torch.zeros(2, 4), torch.ones(1, 4) > 0, 2),
        ValueError,
        r"finished has shape \[1, 4\]; it must be \[2, 4\]",
    ),
    "float": ((torch.zeros(1, 4), torch.ones(1, 4) > 0, 2.0), TypeError, "width is 2.0"),
    "flag": ((torch.zeros(1, 4), torch.ones(1, 4) > 0, True), TypeError, "width is True"),
    "none": ((torch.zeros(1, 4), torch.ones(1, 4) > 0, 0), ValueError, "width is 0"),
    "uneven": (
        (torch.zeros(1, 4), torch.ones(1, 4) > 0, 3),
        ValueError,
        "width is 3; it must be 1 or more and divide scores' 4 columns",
    ),
    "device": (
        (torch.zeros(1, 4), (torch.ones(1, 4) > 0).to("meta"), 2),
        ValueError,
        "finished is on meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    args, error, message = BAD[name]
    with pytest.raises(error, match=message):
        chunk_select(*args)


def test_no_such_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'fast'"):
        chunk_select(torch.zeros(1, 1), torch.ones(1, 1) > 0, 1, backend="fast")


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiled(backend: Backend, graph: str) -> None:
    if backend.interpreted:
        pytest.skip("the graph is that of the other backends; an interpreter adds only time")
    torch._dynamo.reset()

    def parents(scores: Tensor) -> Tensor:
        return chunk_select(scores * 2, scores > 1, 3, backend=backend.name) + 1

    scores = normal(4, 12, 1, device=backend.device)
    got = torch.compile(parents, fullgraph=True, backend=graph)(scores)
    assert torch.equal(got, parents(scores))


def test_registration(backend: Backend) -> None:
    if backend.interpreted:
        pytest.skip("opcheck's fake tensors have no memory for an interpreter to read")
    scores = normal(4, 12, 1, device=backend.device)
    args = scores, scores > 1, 3, backend.name
    torch.library.opcheck(torch.ops.crossfade.chunk_select.default, args)
