"""`attend_` on every backend, against a loop over single tokens in float64.

Caches hold NaN wherever no token was written, so that a slot that is read too early shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, case
from cases import DTYPES, NAN, Backend
from crossfade.ops import attend_
from sweeps import product
from torch import Tensor

FLOAT32_ERROR = 3e-5


def _that_attends(backend: Backend) -> Backend:
    if backend.name == "native" and backend.device != "cpu":
        pytest.skip(f"{backend}: on GPUs the op is Triton's")
    return backend


@pytest.fixture
def backend(backend: Backend) -> Backend:
    return _that_attends(backend)


@pytest.fixture
def kernel(kernel: Backend) -> Backend:
    return _that_attends(kernel)


def expected(
    c: Case,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attend_` should return, in float64, and the caches it should leave."""
    c = Case(*(x.cpu().clone() for x in c))
    batch, heads, tokens, _ = c.query.shape
    group = heads // c.key.shape[1]
    out = torch.zeros(batch, tokens, heads, c.value.shape[3], dtype=torch.float64)
    for b in range(batch):
        row, length = b if rows is None else int(rows[b]), int(c.lengths[b])
        for i in range(tokens):
            end = length + i + 1
            begin = max(0, end - window) if window else 0
            if end > c.keys.shape[2]:
                continue
            c.keys[row, :, end - 1], c.values[row, :, end - 1] = c.key[b, :, i], c.value[b, :, i]
            for h in range(heads):
                k = c.keys[row, h // group, begin:end].double()
                v = c.values[row, h // group, begin:end].double()
                score = scale * (k @ c.query[b, h, i].double())
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                out[b, i, h] = torch.softmax(score, 0) @ v
    return out, c.keys, c.values


def assert_right(backend: Backend, c: Case, **options: Any) -> None:
    options = {"scale": 0.3, **options}
    out, keys, values = expected(c, **options)
    got = attend_(*c, **options, backend=backend.name)
    assert (got.shape, got.dtype) == (out.shape, c.query.dtype)
    assert got.is_contiguous()
    for cache, want in ((c.keys, keys), (c.values, values)):
        torch.testing.assert_close(cache.cpu(), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.cpu().double(), out, rtol=0, atol=FLOAT32_ERROR)


# ---- The rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "heads"), product([1, 3, 17], [(2, 2), (6, 2), (8, 1)], together=1), ids=str
)
def test_groups_and_tokens(backend: Backend, heads: tuple[int, int], tokens: int) -> None:
    """Rows that are empty, longer, and full after the step."""
    lengths = (0, 5, 40 - tokens)
    assert_right(backend, case(lengths, heads=heads, tokens=tokens, device=backend.device))


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    product([(1, 3), (20, 7), (33, 64), (80, 129)], [1, 5], together=1),
    ids=str,
)
def test_sizes_that_fill_no_vector(backend: Backend, sizes: tuple[int, int], tokens: int) -> None:
    assert_right(backend, case(sizes=sizes, tokens=tokens, device=backend.device))


@pytest.mark.parametrize(("window", "tokens"), product([1, 4, 100], [1, 17], together=1))
def test_windows(backend: Backend, window: int, tokens: int) -> None:
    assert_right(backend, case(tokens=tokens, device=backend.device), window=window)


@pytest.mark.parametrize("tokens", [1, 17])
def test_soft_cap(backend: Backend, tokens: int) -> None:
    """It bends scores near the cap, and holds large ones at it."""
    c = case(tokens=tokens, device=backend.device)
    assert_right(backend, c.copy(), softcap=1.5)
    assert_right(backend, c, softcap=2.0, scale=20.0, window=9)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_many_slots(backend: Backend, tokens: int) -> None:
    """Rows of more than one split, and a window that begins in one split and ends in another."""
    lengths = (0, 127, 128, 600, 900 - tokens)
    heads = (3, 1)
    c = case(lengths, heads=heads, tokens=tokens, capacity=900, device=backend.device)
    assert_right(backend, c.copy())
    assert_right(backend, c, window=301)


def test_a_long_prompt(backend: Backend) -> None:
    """Several tiles of tokens are appended to rows, empty ones too, and then one more token."""
    tokens = 30 if backend.interpreted else 130
    c = case((0, 9), tokens=tokens, heads=(9, 3), capacity=200, device=backend.device)
    assert_right(backend, c)
    more = case((tokens, 9 + tokens), heads=(9, 3), device=backend.device)
    assert_right(backend, c._replace(**more._asdict() | {"keys": c.keys, "values": c.values}))


def test_scores_of_any_size(backend: Backend) -> None:
    """Their exp would overflow, and a chunk's maximum may be far below the next chunk's."""
    c = case((300,), capacity=301, device=backend.device)
    c.keys[:, :, :300] *= torch.linspace(0, 100, 300, device=backend.device)[:, None]
    out, _, _ = expected(c, scale=10.0)
    got = attend_(*c, scale=10.0, backend=backend.name)
    # scores of some 5e3 have an error of some 5e-4 in float32
    torch.testing.assert_close(got.cpu().double(), out, rtol=0, atol=5e-3)


def test_rows_of_the_caches(backend: Backend) -> None:
    """Rows of the caches are named in any order; those that are not named stay as they are."""
    rows = torch.tensor([4, 0, 2], device=backend.device)
    c = case(cache_rows=rows.tolist(), tokens=3, device=backend.device)
    assert_right(backend, c, rows=rows)


def test_views(backend: Backend) -> None:
    """Slices of larger buffers, with tokens before heads, as a projection leaves them."""
    c = case(tokens=3, device=backend.device)

    def swapped(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def sliced(x: Tensor) -> Tensor:
        wide = x.new_full((x.shape[0], 3, x.shape[1], 50, x.shape[3] + 3), NAN)
        return wide[:, 1, :, : x.shape[2], 2:-1].copy_(x)

    viewed = map(sliced, (c.keys, c.values))
    assert_right(backend, Case(*map(swapped, c[:3]), *viewed, c.lengths))
    fused = torch.cat([c.query, c.key, c.value], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(backend, Case(*fused.split([6, 2, 2], dim=1), *c[3:]))


@pytest.mark.parametrize("lengths", [(38, 40, 3), (39, 41, 10**12)])
def test_a_full_cache_is_not_written_past(backend: Backend, lengths: tuple[int, ...]) -> None:
    """Rows with room for two, one or none of three tokens; memory around them is not written."""
    full = [min(n, 40) for n in lengths]
    c = case(full, tokens=3, device=backend.device)
    c = c._replace(lengths=torch.tensor(lengths, device=backend.device))
    buffers = [x.new_full((5, 2, 50, 16), 7.0) for x in (c.keys, c.values)]
    for buffer, x in zip(buffers, (c.keys, c.values), strict=True):
        buffer[1:4, :, :40] = x
    out, *caches = expected(c, scale=0.3)
    views = (buffer[1:4, :, :40] for buffer in buffers)
    got = attend_(*c[:3], *views, c.lengths, scale=0.3, backend=backend.name)
    for buffer, want in zip(buffers, caches, strict=True):
        torch.testing.assert_close(buffer[1:4, :, :40].cpu(), want, rtol=0, atol=0, equal_nan=True)
        buffer[1:4, :, :40] = 7.0
        assert (buffer == 7.0).all()
    for b, length in enumerate(lengths):
        written = max(0, min(3, 40 - length))
        torch.testing.assert_close(
            got[b, :written].cpu().double(), out[b, :written], rtol=0, atol=FLOAT32_ERROR
        )


def test_no_rows(backend: Backend) -> None:
    c = case((), device=backend.device)
    c = c._replace(keys=torch.zeros(2, 2, 40, 16, device=backend.device))
    c = c._replace(values=c.keys.clone())
    assert attend_(*c, scale=1.0, backend=backend.name).shape == (0, 1, 6, 16)


def test_nan_stays_in_its_row(backend: Backend) -> None:
    """A query, a key or a value that is NaN makes its row's results NaN, and no other's."""
    clean = case((3, 4, 5, 6), device=backend.device)
    want = attend_(*clean.copy(), scale=0.3, backend=backend.name)
    clean.query[0] = NAN
    clean.keys[1, :, 2] = NAN
    clean.value[2] = NAN
    for softcap in (0.0, 5.0):
        got = attend_(*clean.copy(), scale=0.3, softcap=softcap, backend=backend.name)
        assert got[:3].isnan().all()
        assert not got[3].isnan().any()
    got = attend_(*clean, scale=0.3, backend=backend.name)
    assert torch.equal(got[3], want[3])


@pytest.mark.parametrize(("tokens", "dtype"), product([1, 17], DTYPES[1:], together=1), ids=str)
def test_half_precision(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    """Weights of the softmax may be rounded to the dtype, and results are: half a step each.

    A step is that of the sum of the sizes of what is added up. Where Triton's interpreter cuts off
    bits that a GPU would round, it is a whole one each.
    """
    c = case((0, 50, 280), tokens=tokens, capacity=300, dtype=dtype, device=backend.device)
    out, keys, values = expected(c, scale=0.3)
    got = attend_(*c, scale=0.3, backend=backend.name)
    assert torch.equal(c.keys.cpu().isnan(), keys.isnan())
    slot = torch.arange(300) <= c.lengths.cpu()[:, None, None] + torch.arange(tokens)[:, None]
    size = F.scaled_dot_product_attention(
        c.query.cpu().double(),
        keys.nan_to_num().double(),
        values.nan_to_num().double().abs(),
        attn_mask=slot[:, None],
        scale=0.3,
        enable_gqa=True,
    ).transpose(1, 2)
    cut_off = backend.interpreted and dtype == torch.bfloat16
    step = torch.finfo(dtype).eps * size * (2 if cut_off else 1)
    assert ((got.cpu().double() - out).abs() <= step).all()


# ---- What a result does not depend on ------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_results_do_not_depend_on_batch_capacity_or_threads(
    kernel: Backend, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are the same to the bit."""
    lengths = (0, 5, 300, 701)
    heads = (3, 1) if kernel.interpreted else (24, 8)  # enough work for five threads
    c = case(lengths, tokens=tokens, heads=heads, capacity=760, device=kernel.device)
    want = attend_(*c.copy(), scale=0.3, backend=kernel.name)
    for b in range(4):
        one = attend_(*c.rows(slice(b, b + 1)).copy(), scale=0.3, backend=kernel.name)
        assert torch.equal(one[0], want[b]), f"row {b} alone"
    backwards = Case(*(x.flip(0) for x in c))
    assert torch.equal(attend_(*backwards, scale=0.3, backend=kernel.name).flip(0), want)
    wide = case(lengths, tokens=tokens, heads=heads, capacity=1200, device=kernel.device)
    assert torch.equal(attend_(*wide, scale=0.3, backend=kernel.name), want)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(attend_(*c.copy(), scale=0.3, backend=kernel.name), want)


# ---- Calls ---------------------------------------------------------------------------------------


def test_gradients_come_from_the_reference() -> None:
    """Gradients are those of plain torch, and NaN past the lengths does not reach them."""
    c = case((3, 3), tokens=2, capacity=9)
    leaves = [x.clone().requires_grad_() for x in c[:3]]
    caches = c.keys.clone(), c.values.clone()
    attend_(*leaves, *caches, c.lengths, scale=0.3).square().sum().backward()
    again = [x.clone().requires_grad_() for x in c[:3]]
    keys = torch.cat([c.keys[:, :, :3], again[1]], dim=2)
    values = torch.cat([c.values[:, :, :3], again[2]], dim=2)
    mask = torch.arange(5) <= 3 + torch.arange(2)[:, None]
    out = F.scaled_dot_product_attention(
        again[0], keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    out.square().sum().backward()
    for x, y in zip(leaves, again, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        assert not attend_(*leaves, *c[3:], scale=0.3, backend="native").requires_grad


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiled(backend: Backend, graph: str) -> None:
    """Two steps in one graph: the second reads what the first one wrote."""
    if backend.interpreted:
        pytest.skip("the graph is that of the other backends; an interpreter adds only time")
    torch._dynamo.reset()

    def steps(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, at: Tensor):
        options = {"scale": 0.3, "window": 7, "backend": backend.name}
        first = attend_(query, key, value, keys, values, at, **options)
        return first, attend_(query + 1, key * 2, value, keys, values, at + 1, **options)

    c = case(device=backend.device)
    plain = c.copy()
    want = steps(*plain)
    got = torch.compile(steps, fullgraph=True, backend=graph)(*c)
    for x, y in zip((*got, *c), (*want, *plain), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("rows", [False, True])
def test_registration(backend: Backend, rows: bool) -> None:
    """The schema says what the op changes; fake tensors and dynamic shapes are dispatched."""
    if backend.interpreted:
        pytest.skip("opcheck's fake tensors have no memory for an interpreter to read")
    c = case(tokens=2, device=backend.device)
    c = Case(*(x.nan_to_num() for x in c))  # opcheck takes equal NaNs for different
    named = torch.tensor([2, 0, 1], device=backend.device) if rows else None
    args = (*c, 0.3, 0, 0.0, named, backend.name)
    torch.library.opcheck(torch.ops.crossfade.attend_.default, args)
