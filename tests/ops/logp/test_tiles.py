"""The tiles of `linear_logp`: their bits, what a GPU makes them of, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import NAN
from crossfade import ops
from crossfade.ops import LinearLogp, backends
from crossfade.ops.logp import api, eager
from crossfade.ops.logp import tiles as logp_tiles
from heads import (
    CUDA,
    INTERPRETED,
    LARGE,
    ON_CUDA,
    TILED,
    WAYS,
    assert_close,
    gradients,
    linear_logp,
    loss_of,
    naive,
    problem,
    profiled,
)

# ---- Bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_same_bits_whatever_learns(way: dict[str, Any], dtype: torch.dtype) -> None:
    """A policy and its reference agree, and results do not depend on what else is asked for."""
    tensors = problem(70, 33, 1500, dtype)
    want, _ = gradients(linear_logp, tensors, "", return_entropy=True, **way)
    for learn in ("h", "w", "b", "hw", "hwb"):
        for entropy in (False, True):
            got, _ = gradients(linear_logp, tensors, learn, return_entropy=entropy, **way)
            assert torch.equal(got.logp, want.logp)
            assert torch.equal(got.lse, want.lse)
            assert not entropy or torch.equal(got.entropy, want.entropy)


def test_rows_alone() -> None:
    """A token's results do not depend on the batch, to the bit, where torch's products do not."""
    hidden, weight, targets, _ = problem(1100, 96, 2100)
    products = hidden @ weight.T
    if not all(torch.equal(hidden[:n] @ weight.T, products[:n]) for n in (16, 17, 40, 550)):
        pytest.skip("a row of torch.mm depends on the number of rows here")
    want = linear_logp(hidden, weight, targets, return_entropy=True)
    for part in (slice(0, 1), slice(7, 9), slice(100, 116), slice(3, 44), slice(200, 750)):
        got = linear_logp(hidden[part], weight, targets[part], return_entropy=True)
        assert all(torch.equal(a, b[part]) for a, b in zip(got, want, strict=True))


def test_autocast_changes_nothing() -> None:
    """Products of float32 stay so: log-probs of bfloat16 products would be off by some 1e-2."""
    tensors = problem(20, 12, 31)
    want, of_want = gradients(linear_logp, tensors, "hwb", return_entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, of_got = gradients(linear_logp, tensors, "hwb", return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(of_got[n], of_want[n]) for n in "hwb")


# ---- As on a GPU: 16 bits are multiplied, float32 is summed --------------------------------------

GPU_LIKE = [*INTERPRETED, "torch", *ON_CUDA]
SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles on a CPU of what a GPU's are made of."""
    start = logp_tiles.start
    monkeypatch.setattr(logp_tiles, "FEWEST_ROWS", 1)
    monkeypatch.setattr(logp_tiles, "start", lambda head: start(head).float())
    monkeypatch.setattr(logp_tiles, "operand_dtype", lambda hidden, weight: hidden.dtype)


@pytest.mark.parametrize("tile", [(7, 12), (16, 31)], ids=["7 x 12", "one tile"])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("backend", GPU_LIKE)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_operands_of_16_bits(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    way: dict[str, Any],
    tile: tuple[int, int],
) -> None:
    """Results are those of float32; a gradient is off by what rounding its terms makes of it."""
    monkeypatch.setattr(logp_tiles, "tile_size", lambda device: tile)
    tensors = problem(9, 12, 31, dtype)
    tensors[2][3] = -100
    exact = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    want, of_want = gradients(naive, exact, "hwb", **way)
    # the interpreter cuts digits off where a GPU rounds: twice the error
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for learn in ("h", "hwb"):
        got, of_got = gradients(
            linear_logp, tensors, learn, return_entropy=True, backend=backend, **way
        )
        assert_close(got, want)
        for name, grad in of_got.items():
            off = (grad.double() - of_want[name]).abs().max()
            assert off <= 2 * rounding * of_want[name].abs().max(), f"of {name} in {learn}: {off}"


@pytest.mark.parametrize("backend", GPU_LIKE)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_small_gradients_of_float16(backend: str) -> None:
    """A mean's: each term of p weight, some 4e-8, would round to 6e-8 in float16."""
    hidden = torch.zeros(16, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(3001, 8, dtype=torch.float16, requires_grad=True)
    with torch.no_grad():
        weight[7] = 3
    targets = torch.full((16,), 7)
    of_hidden, of_weight = torch.autograd.grad(
        linear_logp(hidden, weight, targets, backend=backend).logp.sum() / 2**13, (hidden, weight)
    )
    torch.testing.assert_close(of_hidden.float(), torch.full((16, 8), 2 / 2**13), rtol=5e-3, atol=0)
    assert not of_weight.any(), "hidden is 0"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_product_sums_in_float32(dtype: torch.dtype, device: str) -> None:
    """A sum in 16 bits would stop growing at 256 or 2,048 times its terms, and lose the half."""
    a, b = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((16, 8192), (8192, 8)))
    out = torch.full((16, 8), NAN, device=device)
    logp_tiles.product(a, b, out)
    assert (out == 8192).all()
    out.fill_(0.5)
    logp_tiles.product(a, b, out, beta=1)
    assert (out == 8192.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", GPU_LIKE)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_same_bits_with_moments(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    columns = 2048 if backend.endswith("-cuda") else 16
    monkeypatch.setattr(logp_tiles, "tile_size", lambda device: (16, columns))
    tensors = problem(7, 33, 2 * columns - 1, dtype)
    want, _ = gradients(linear_logp, tensors, "", return_entropy=True, backend=backend)
    for learn, entropy in (("h", False), ("h", True), ("hw", True)):
        got, _ = gradients(linear_logp, tensors, learn, return_entropy=entropy, backend=backend)
        assert torch.equal(got.logp, want.logp)
        assert torch.equal(got.lse, want.lse)
        assert not entropy or torch.equal(got.entropy, want.entropy)


@CUDA
@pytest.mark.parametrize("learn", ["h", "hwb"])
def test_nothing_waits_for_cuda(learn: str) -> None:
    tensors = [x.cuda() for x in problem(100, 64, 3001, torch.bfloat16)]
    of = torch.linspace(-1, 1, 100, device="cuda")
    leaves = dict(zip("hwb", (tensors[0], tensors[1], tensors[3]), strict=True))
    for name in learn:
        leaves[name].requires_grad_()

    def run() -> None:
        done = ops.linear_logp(
            leaves["h"], leaves["w"], tensors[2], bias=leaves["b"], return_entropy=True
        )
        assert done.entropy is not None
        torch.autograd.grad((done.logp, done.entropy), [leaves[n] for n in learn], (of, of))

    run()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
def test_cuda_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes bfloat16 as it is, and makes no copy of hidden or weight in float32."""
    if backends.why_not("triton", torch.device("cuda:0")) is not None:
        pytest.skip("no Triton")
    hidden, weight, targets, _ = (x.cuda() for x in problem(64, 512, 4096, torch.bfloat16))
    assert api._kernel(hidden, None).__name__.endswith("triton.logp")
    assert api._kernel(hidden.double(), None) is eager
    monkeypatch.setattr(logp_tiles, "tile_size", lambda device: (64, 256))
    ops.linear_logp(hidden, weight, targets)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.linear_logp(hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < 4 * 64 * 512 * 3


@pytest.mark.parametrize("backend", LARGE)
def test_weight_gradient_is_summed_in_float32(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are 512 tiles; a bfloat16 sum would stop growing at 256 times its terms."""
    monkeypatch.setattr(logp_tiles, "tile_size", lambda device: (16, 1024))
    hidden = torch.ones(8192, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logp(
        hidden, weight, torch.zeros(8192, dtype=torch.int64), backend=backend
    ).logp.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [4096, -4096]


# ---- Cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learn", "entropy", "forward", "backward"),
    [
        ("", True, 1, 0),
        ("h", False, 2, 0),
        ("h", True, 3, 0),
        ("w", True, 1, 2),
        ("b", False, 1, 1),
        ("hb", False, 1, 2),
        ("hw", True, 1, 3),
    ],
)
@pytest.mark.parametrize("backend", TILED)
def test_products_and_memory(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    learn: str,
    entropy: bool,
    forward: int,
    backward: int,
) -> None:
    """Products of tiles as promised, and no tensor of all logits."""
    monkeypatch.setattr(logp_tiles, "ROWS", 64)
    monkeypatch.setattr(logp_tiles, "COLUMNS", 128)
    hidden, weight, targets, bias = problem(512, 8, 1024)
    leaves = [
        x.requires_grad_(n in learn) for n, x in zip("hwb", (hidden, weight, bias), strict=True)
    ]
    tiles, logits = 8 * 8, 4 * 512 * 1024

    def run() -> LinearLogp:
        return linear_logp(*leaves[:2], targets, bias=bias, return_entropy=entropy, backend=backend)

    run()
    products, most, results = profiled(run)
    assert products == forward * tiles
    assert most <= logits / 16
    if learn:
        loss = loss_of(results)
        products, most, _ = profiled(loss.backward)
        assert products == backward * tiles
        assert most <= logits / 16


def test_a_tensor_of_all_logits_is_seen() -> None:
    assert profiled(lambda: naive(*problem(512, 8, 1024)))[1] >= 4 * 512 * 1024


def test_ignored_tokens_cost_nothing_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_tiles, "ROWS", 16)
    hidden, weight, targets, _ = problem(160, 8, 64)
    targets[32:] = -100
    loss = linear_logp(hidden.requires_grad_(), weight.requires_grad_(), targets).logp.sum()
    assert profiled(loss.backward)[0] == 3 * 2
    assert hidden.grad is not None
    assert not hidden.grad[32:].any()
    assert hidden.grad[:32].any(1).all()
