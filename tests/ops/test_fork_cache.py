"""`fork_cache_` on every backend, against a loop over rows.

Caches hold random bits, so NaN of every kind too: what is copied and what stays keeps them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, Backend
from crossfade.ops import fork_cache_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
BITS[torch.float64] = torch.int64
Position = int | Sequence[int] | None


def bits(x: Tensor) -> Tensor:
    return x.view(BITS[x.dtype])


def cache(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    limits = torch.iinfo(BITS[dtype])
    numbers = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=BITS[dtype])
    return numbers.view(dtype).to(device)


def expected(x: Tensor, parents: Sequence[int], start: Position, end: Position) -> Tensor:
    want = x.clone()
    for row, parent in enumerate(parents):
        begin = start[row] if isinstance(start, Sequence) else start
        stop = end[row] if isinstance(end, Sequence) else end
        span = slice(max(begin or 0, 0), x.shape[2] if stop is None else max(stop, 0))
        if parent >= 0:
            want[row, :, span] = x[parent, :, span]
    return want


def assert_right(
    backend: Backend,
    tensors: Sequence[Tensor],
    parents: Sequence[int],
    start: Position = 0,
    end: Position = None,
) -> None:
    want = [expected(x, parents, start, end) for x in tensors]

    def given(x: Any) -> Any:
        if isinstance(x, Sequence):
            return torch.tensor(x, dtype=torch.int64, device=backend.device)
        return x

    fork_cache_(tensors, given(list(parents)), given(start), given(end), backend=backend.name)
    for k, (x, y) in enumerate(zip(tensors, want, strict=True)):
        assert torch.equal(bits(x), bits(y)), f"tensor {k} under parents {parents}"


# ---- The rows ------------------------------------------------------------------------------------

PARENTS = {
    "identity": [0, 1, 2, 3, 4, 5, 6],
    "none": [-1] * 7,
    "swap": [1, 0, 2, 3, 4, 5, 6],
    "cycle": [1, 2, 3, 4, 5, 6, 0],
    "cycle backwards": [6, 0, 1, 2, 3, 4, 5],
    "two cycles with tails": [1, 0, 0, 4, 5, 3, 5],
    "three swaps": [3, 4, 5, 0, 1, 2, -1],
    "all from one": [2] * 7,
    "chain": [-1, 2, 3, 4, 5, 6, 6],
    "chain backwards": [0, 0, 1, 2, 3, 4, 5],
    "chain and repetition": [-1, 2, 2, 1, 1, 0, 3],
    "tree": [0, 0, 0, 1, 1, 2, 2],
    "mixture": [3, -1, 3, 0, 4, 3, -1],
}


@pytest.mark.parametrize("name", PARENTS)
def test_parents(backend: Backend, name: str) -> None:
    assert_right(backend, [cache(7, 2, 5, 8, device=backend.device)], PARENTS[name])


@pytest.mark.parametrize("name", PARENTS)
def test_parents_and_a_range_of_each_row(backend: Backend, name: str) -> None:
    """Each row copies a range of its own; some ranges are empty or pass the end."""
    x = cache(7, 2, 11, 8, device=backend.device)
    start, end = [0, 4, 2, 7, 11, 0, 3], [11, 6, 2, 40, 12, 0, 10]
    assert_right(backend, [x], PARENTS[name], start, end)


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 33, 130])
def test_numbers_of_rows(backend: Backend, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for _ in range(1 if backend.interpreted else 5):
        parents = torch.randint(-1, max(rows, 1), (rows,), generator=generator).tolist()
        x = cache(rows, 1, 3, 4, device=backend.device)
        assert_right(backend, [x], torch.randperm(rows, generator=generator).tolist(), 1)
        assert_right(backend, [x], parents, 1)


def test_the_most_rows_on_a_gpu(backend: Backend) -> None:
    rows = 64 if backend.interpreted else 2048
    x = cache(rows, 2, 3, 8, device=backend.device)
    assert_right(backend, [x], [(i * 5 + 3) % rows for i in range(rows)])


# ---- The range -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (3, None), (3, 7), (0, 100), (9, None), (10, None), (50, None), (4, 4), (5, 2)],
)
def test_ranges(backend: Backend, start: int, end: int | None) -> None:
    """Ranges up to the end, within the cache, past its end, and empty ones."""
    assert_right(backend, [cache(4, 2, 10, 8, device=backend.device)], [1, 2, 3, 0], start, end)


def test_a_number_and_a_tensor(backend: Backend) -> None:
    x = cache(4, 2, 10, 8, device=backend.device)
    assert_right(backend, [x], [1, 2, 3, 0], 2, [3, 10, 7, 2])
    assert_right(backend, [x], [1, 0, 1, 1], [0, 9, 3, 4], 9)


def test_positions_of_tensors_are_clamped(backend: Backend) -> None:
    x = cache(4, 2, 10, 8, device=backend.device)
    assert_right(backend, [x], [3, 0, 1, 2], [-5, 0, 10**12, 2], [4, 2**63 - 1, 10**13, -1])


# ---- The memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 6, 12, 64])
def test_dims(backend: Backend, dtype: torch.dtype, dim: int) -> None:
    """Tokens of 2 and of 10 bytes, which no vector fits, and of up to 256."""
    assert_right(
        backend, [cache(4, 3, 7, dim, dtype=dtype, device=backend.device)], [3, 0, 1, 1], 2
    )


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_unaligned_views(backend: Backend, dtype: torch.dtype, offset: int) -> None:
    """Every alignment that there is. The memory around a view must stay as it was."""
    buffer = cache(4, 3, 9, 40, dtype=dtype, device=backend.device)
    view = buffer[:, 1:, 1:8, offset : offset + 16]
    want = buffer.clone()
    want[:, 1:, 1:8, offset : offset + 16] = expected(view, [1, 2, 0, 0], 2, None)
    assert_right(backend, [view], [1, 2, 0, 0], 2)
    assert torch.equal(bits(buffer), bits(want))


def test_strides(backend: Backend) -> None:
    """Strides with tokens before heads, with rows within tokens, and of a slice of rows."""
    on = {"device": backend.device}
    tensors = [
        cache(4, 7, 3, 8, **on).transpose(1, 2),
        cache(7, 3, 4, 8, **on).permute(2, 1, 0, 3),
        cache(8, 3, 7, 8, **on)[::2],
        cache(4, 3, 7, 16, **on)[..., ::2][..., :1],  # a dim of 1 with a stride
    ]
    assert_right(backend, tensors, [2, 3, 1, 1], [1, 0, 3, 2], [7, 5, 6, 9])


def test_tensors_of_all_kinds(backend: Backend) -> None:
    """Each with heads, length, dim and dtype of its own; some of them empty."""
    on = {"device": backend.device}
    tensors = (
        cache(5, 2, 9, 8, **on),
        cache(5, 1, 4, 80, dtype=torch.bfloat16, **on),
        cache(5, 3, 1, 5, dtype=torch.float16, **on),
        cache(5, 0, 9, 8, **on),
        cache(5, 2, 0, 8, **on),
        cache(5, 2, 9, 0, **on),
        cache(5, 4, 33, 3, dtype=torch.bfloat16, **on),
    )
    assert_right(backend, tensors, [4, 0, 0, 2, 3], [0, 2, 3, 1, 8])
    assert_right(backend, tensors, [4, 0, 0, 2, 3], 3, 6)


def test_no_tensors(backend: Backend) -> None:
    assert_right(backend, [], [1, 0])
    fork_cache_((), torch.tensor([1, 0], device=backend.device), backend=backend.name)


def test_more_tensors_than_a_launch_takes(backend: Backend) -> None:
    count = 5 if backend.interpreted else 150
    tensors = [cache(3, 1, 4, 8 + k % 3, device=backend.device) for k in range(count)]
    assert_right(backend, tensors, [1, 2, 0], 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are enough bytes for five threads. In cycles each thread sets a row aside."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = [cache(8, 3, 100 + k, 64) for k in range(4)]
    for parents in ([1, 2, 3, 0, 5, 4, 6, 6], [7] * 8):
        assert_right(Backend("native", "cpu"), tensors, parents, [0, 3, 50, 7, 0, 20, 1, 2])


# ---- Anything ------------------------------------------------------------------------------------


@st.composite
def problems(draw: Any) -> tuple[list[Tensor], list[int], Position, Position]:
    rows = draw(st.integers(1, 8))
    parents = st.one_of(
        st.permutations(range(rows)),
        st.lists(st.integers(-1, rows - 1), min_size=rows, max_size=rows),
    )
    position = st.integers(0, 12)
    each = st.lists(position, min_size=rows, max_size=rows)
    tensors = [
        cache(rows, *(draw(st.integers(1, most)) for most in (3, 10, 17)), dtype=dtype)
        for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    ]
    start = draw(st.one_of(position, each))
    return tensors, draw(parents), start, draw(st.one_of(st.none(), position, each))


def test_any_fork(backend: Backend) -> None:
    @settings(
        max_examples=5 if backend.interpreted else 200,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problem=problems())
    def holds(problem: tuple[list[Tensor], list[int], Position, Position]) -> None:
        tensors, parents, start, end = problem
        assert_right(backend, [x.to(backend.device) for x in tensors], parents, start, end)

    holds()


# ---- Calls ---------------------------------------------------------------------------------------


def call(**changes: Any) -> dict[str, Any]:
    tensors = [torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)]
    return {"tensors": tensors, "parents": torch.tensor([1, 2, 0]), **changes}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tensor": ({"tensors": torch.zeros(3, 2, 4, 8)}, TypeError, "tensors is a Tensor; it must be"),
    "None": ({"tensors": [None]}, TypeError, r"tensors\[0\] is a NoneType"),
    "dtype": (
        {"tensors": [torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8).long()]},
        TypeError,
        r"tensors\[1\] has dtype torch.int64",
    ),
    "dims": (
        {"tensors": [torch.zeros(3, 4, 8)]},
        ValueError,
        r"tensors\[0\] has shape \[3, 4, 8\]",
    ),
    "rows": (
        {"tensors": [torch.zeros(4, 2, 4, 8)]},
        ValueError,
        r"tensors\[0\] has shape \[4, 2, 4, 8\]; it must be \[3, heads, length, dim\]",
    ),
    "stride": (
        {"tensors": [torch.zeros(3, 2, 4, 8)[..., ::2]]},
        ValueError,
        r"tensors\[0\] has a last stride of 2",
    ),
    "device": (
        {"tensors": [torch.zeros(3, 2, 4, 8, device="meta")]},
        ValueError,
        r"tensors\[0\] is on meta",
    ),
    "list": ({"parents": [1, 2, 0]}, TypeError, "parents is a list"),
    "int32": ({"parents": torch.tensor([1, 2, 0]).int()}, TypeError, "parents has dtype"),
    "2-D": ({"parents": torch.zeros(3, 1).long()}, ValueError, r"parents has shape \[3, 1\]"),
    "too many": (
        {"tensors": [], "parents": torch.zeros(2049, dtype=torch.int64, device="meta")},
        ValueError,
        "parents has 2049 rows; on meta it must have at most 2048",
    ),
    "past the rows": (
        {"parents": torch.tensor([0, 3, 1]), "backend": "native"},
        ValueError,
        r"parents\[1\] is 3; it must be within \[-1, 3\)",
    ),
    "below -1": (
        {"parents": torch.tensor([0, 1, -2]), "backend": "native"},
        ValueError,
        r"parents\[2\] is -2",
    ),
    "start": ({"start": -1}, ValueError, "start is -1; it must be within"),
    "float": ({"start": 1.0}, TypeError, "start is 1.0; it must be an int or a tensor"),
    "start's dtype": ({"start": torch.zeros(3)}, TypeError, "start has dtype torch.float32"),
    "end": ({"end": -3}, ValueError, "end is -3"),
    "end's shape": (
        {"end": torch.zeros(2).long()},
        ValueError,
        r"end has shape \[2\]; it must be \[3\], as parents",
    ),
    "no such": ({"backend": "fast"}, ValueError, "backend is 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fork_cache_(**call(**change))


def test_parents_that_only_the_device_sees(backend: Backend) -> None:
    """Parents out of range leave their rows alone; the native kernel on a CPU raises."""
    if (backend.name, backend.device) == ("native", "cpu"):
        pytest.skip("it raises: see above")
    x = cache(4, 2, 5, 8, device=backend.device)
    want = expected(x, [1, -1, -1, 0], 0, None)
    parents = torch.tensor([1, 4, -(2**40), 0], device=backend.device)
    fork_cache_([x], parents, backend=backend.name)
    assert torch.equal(bits(x), bits(want))


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiled(backend: Backend, graph: str) -> None:
    """Two forks in one graph: the second reads what the first one wrote."""
    if backend.interpreted:
        pytest.skip("the graph is that of the other backends; an interpreter adds only time")
    torch._dynamo.reset()

    def forks(keys: Tensor, values: Tensor, parents: Tensor, start: Tensor) -> Tensor:
        fork_cache_([keys, values], parents, start, backend=backend.name)
        fork_cache_([keys], parents.flip(0), 1, 4, backend=backend.name)
        return keys + 1

    on = {"device": backend.device}
    tensors = [torch.randn(3, 2, 5, 8, **on), torch.randn(3, 2, 6, 4, **on)]
    plain = [x.clone() for x in tensors]
    numbers = torch.tensor([2, 0, 0], **on), torch.tensor([0, 3, 2], **on)
    want = forks(*plain, *numbers)
    got = torch.compile(forks, fullgraph=True, backend=graph)(*tensors, *numbers)
    for x, y in zip((got, *tensors), (want, *plain), strict=True):
        assert torch.equal(x, y)


def test_registration(backend: Backend) -> None:
    """The schema says what the op changes; fake tensors and dynamic shapes are dispatched."""
    if backend.interpreted:
        pytest.skip("opcheck's fake tensors have no memory for an interpreter to read")
    on = {"device": backend.device}
    tensors = [torch.randn(3, 2, 5, 8, **on), torch.randn(3, 2, 6, 4, **on)]
    numbers = (torch.tensor(x, **on) for x in ([2, 0, 0], [0, 3, 2], [5, 5, 4]))
    args = tensors, *numbers, backend.name
    torch.library.opcheck(torch.ops.crossfade.fork_cache_.default, args)
