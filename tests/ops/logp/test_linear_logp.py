"""`ops.linear_logp` against dense float64: values, gradients, bits, memory and errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import DTYPES, EPS, INF, NAN, lay_out, normal, rerun, rms, skip_unless_lesser
from crossfade import ops
from crossfade.ops import LinearLogp, backends, native
from crossfade.ops.logp import api, eager
from crossfade.ops.logp import tiles as logp_tiles
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

KERNEL_MISSING = native.why_not(torch.device("cpu"))
TILED = [
    pytest.param(
        "native", marks=pytest.mark.skipif(KERNEL_MISSING is not None, reason="not built")
    ),
    "torch",
]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON_CUDA = ["triton-cuda", "torch-cuda"] if torch.cuda.is_available() else []
# some 10 ms a row and tile: small problems
INTERPRETED = ["triton"] if backends.why_not("triton", torch.device("cpu")) is None else []
SMALL, LARGE = [*TILED, *INTERPRETED, *ON_CUDA], [*TILED, *ON_CUDA]
WAYS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"temperature": 0.7},
    {"softcap": 2.0, "temperature": 1.7},
]


@pytest.fixture(params=[None, (7, 12), (1, 1)], ids=["one tile", "7 x 12", "1 x 1"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of a tile, at most."""
    if request.param == (1, 1) and request.node.callspec.params["backend"] == "triton":
        pytest.skip("hundreds of programs")
    if request.param is not None:
        monkeypatch.setattr(logp_tiles, "tile_size", lambda device: request.param)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """numpy computes what a GPU would, and warns of NaN and infinities."""
    with np.errstate(all="ignore"):
        yield


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> LinearLogp:
    """The op. For "...-cuda" arguments move to the GPU, and results and gradients move back."""
    if backend is None or not backend.endswith("-cuda"):
        return ops.linear_logp(hidden, weight, targets, bias=bias, backend=backend, **options)
    there = [None if x is None else x.cuda() for x in (hidden, weight, targets, bias)]
    name = backend.removesuffix("-cuda")
    done = ops.linear_logp(*there[:3], bias=there[3], backend=name, **options)
    return LinearLogp(*(None if x is None else x.cpu() for x in done))


def problem(
    tokens: int, size: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and bias; the last token of the vocabulary is among the targets."""
    hidden = normal(tokens, size, 1, scale=1.0, dtype=dtype)
    weight = normal(vocab, size, 2, scale=2 / math.sqrt(size), dtype=dtype)
    targets = torch.arange(tokens) * 7919 % vocab
    targets[-1:] = vocab - 1
    return hidden, weight, targets, normal(1, vocab, 3, scale=1.0, dtype=dtype)[0]


def naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> LinearLogp:
    """The same as one writes it in torch, all in the dtype of the arguments."""
    z = F.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0)).sum(-1)
    return LinearLogp(logp.where(targets != -100, 0), z.logsumexp(-1), entropy)


def loss_of(results: LinearLogp) -> Tensor:
    """A loss in which each result of each token has a weight of its own."""
    total = results.logp.new_zeros(())
    for k, x in enumerate(results):
        if x is not None:
            total = total + (x * torch.linspace(-1, 1.5, x.numel()).view_as(x) * (k + 1)).sum()
    return total


def gradients(
    call: Callable[..., LinearLogp], tensors: tuple[Tensor | None, ...], learn: str, **options: Any
) -> tuple[LinearLogp, dict[str, Tensor]]:
    """Results, and gradients by those of hidden, weight and bias whose letters are in `learn`."""
    hidden, weight, targets, bias = (None if x is None else x.detach() for x in tensors)
    leaves = {"h": hidden, "w": weight, "b": bias}
    for name in learn:
        leaves[name] = leaves[name].clone().requires_grad_()
    results = call(leaves["h"], leaves["w"], targets, bias=leaves["b"], **options)
    grads = torch.autograd.grad(loss_of(results), [leaves[n] for n in learn]) if learn else ()
    return results, dict(zip(learn, grads, strict=True))


def assert_close(got: LinearLogp, want: LinearLogp, tolerance: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_reference(way: dict[str, Any]) -> None:
    """The dense truth is what torch's own functions give in float64."""
    tensors = problem(6, 8, 11, torch.float64)
    got = linear_logp(
        *tensors[:3], bias=tensors[3], **way, return_entropy=True, backend="reference"
    )
    assert_close(got, naive(*tensors, **way), 1e-12)


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 9), (5, 8), (33, 67)])
def test_truth(tiles: None, tokens: int, vocab: int, way: dict[str, Any], backend: str) -> None:
    if logp_tiles.tile_size(torch.device("cpu"))[1] == 1 and vocab > 9:
        pytest.skip("thousands of tiles")
    hidden, weight, targets, bias = problem(tokens, 12, vocab)
    targets[tokens // 2 :: 3] = -100
    for b in (None, bias):
        tensors = hidden, weight, targets, b
        exact = tuple(None if x is None else x.double() for x in (hidden, weight)), targets, b
        want, of_want = gradients(
            naive,
            (*exact[0], targets, None if b is None else b.double()),
            "hw" + "b" * (b is not None),
            **way,
        )
        for learn in ("", "h", "w", "hw", *(("b", "hwb") if b is not None else ())):
            got, of_got = gradients(
                linear_logp, tensors, learn, **way, return_entropy=True, backend=backend
            )
            assert_close(got, want)
            for name, grad in of_got.items():
                torch.testing.assert_close(
                    grad.double(), of_want[name], rtol=1e-4, atol=1e-4, msg=f"of {name} in {learn}"
                )


@pytest.mark.parametrize("learn", ["h", "w", "b", "hw", "wb", "hb", "hwb"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], learn: str) -> None:
    """Every result by every argument, alone and together, through the tiles in float64."""
    monkeypatch.setattr(logp_tiles, "ROWS", 3)
    monkeypatch.setattr(logp_tiles, "COLUMNS", 4)
    hidden, weight, targets, bias = problem(5, 3, 7, torch.float64)
    targets[1] = -100
    leaves = {"h": hidden, "w": weight, "b": bias}
    for name in learn:
        leaves[name].requires_grad_()

    def results(*tensors: Tensor, entropy: bool = True) -> tuple[Tensor, ...]:
        at = {**leaves, **dict(zip(learn, tensors, strict=True))}
        done = linear_logp(at["h"], at["w"], targets, bias=at["b"], return_entropy=entropy, **way)
        return tuple(x for x in done if x is not None)

    inputs = tuple(leaves[name] for name in learn)
    assert torch.autograd.gradcheck(results, inputs)
    for i in range(3):
        assert torch.autograd.gradcheck(lambda *x, i=i: results(*x)[i], inputs)
    assert torch.autograd.gradcheck(lambda *x: results(*x, entropy=False), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("backend", LARGE)
def test_error(backend: str, way: dict[str, Any], dtype: torch.dtype) -> None:
    """In root mean square, one step of float32 times what a number is a sum of.

    A logit is a sum of products: its rounding grows with the sum of their sizes. A result is off by
    what its logits are. A gradient is a sum over logits or tokens of their gradients G times
    weights or hidden states: each is off by a step and by what its logit is. A gradient of 16 bits
    is rounded to them besides, once, by half a step at most.
    """
    hidden, weight, targets, bias = problem(96, 64, 3001, dtype)
    exact = hidden.double(), weight.double(), targets, bias.double()
    want, of_want = gradients(naive, exact, "hwb", **way)
    size = (exact[0].abs() @ exact[1].abs().T + exact[3].abs()) / way.get("temperature", 1.0)
    identity = torch.eye(3001, dtype=torch.float64)
    products = (exact[0] @ exact[1].T + exact[3]).detach()
    _, g = gradients(naive, (products, identity, targets, None), "h", **way)
    off = g["h"].abs() * (1 + size)
    sums = {"h": off @ exact[1].abs(), "w": off.T @ exact[0].abs(), "b": off.sum(0)}
    for learn in ("hwb", "h"):
        got, of_got = gradients(
            linear_logp,
            (hidden, weight, targets, bias),
            learn,
            **way,
            return_entropy=True,
            backend=backend,
        )
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            assert rms(a.double() - b) <= EPS * rms(size), f"result {k}"
        for name in learn:
            rounded = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
            allowed = EPS * rms(sums[name]) + rounded * rms(of_want[name])
            assert rms(of_got[name].double() - of_want[name]) <= allowed, f"of {name}"


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


@pytest.mark.parametrize("backend", SMALL)
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda d: "-".join(str(x)[6:] for x in d)
)
def test_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """hidden and weight may differ; results are float32, gradients as their tensors."""
    hidden, weight, targets, bias = problem(5, 12, 31)
    tensors = hidden.to(dtypes[0]), weight.to(dtypes[1]), targets, bias
    got, grads = gradients(linear_logp, tensors, "hwb", return_entropy=True, backend=backend)
    want, of_want = gradients(
        naive, tuple(x.float() if x.is_floating_point() else x for x in tensors), "hwb"
    )
    assert_close(got, want)
    for name, x in zip("hwb", (*tensors[:2], bias), strict=True):
        assert grads[name].dtype == x.dtype
        torch.testing.assert_close(grads[name].float(), of_want[name], rtol=1e-2, atol=1e-2)
    assert all(x.dtype == torch.float32 for x in got)


@pytest.mark.parametrize("backend", [*SMALL, "reference"])
def test_shapes(backend: str) -> None:
    hidden, weight, targets, _ = problem(6, 12, 31)
    want = linear_logp(hidden, weight, targets, backend=backend)
    got = linear_logp(hidden.view(2, 3, 12), weight, targets.view(2, 3), backend=backend)
    assert got.entropy is None
    assert torch.equal(got.logp, want.logp.view(2, 3))
    assert torch.equal(got.lse, want.lse.view(2, 3))
    one = linear_logp(hidden[0], weight, targets[0], backend=backend)
    torch.testing.assert_close(one.logp, want.logp[0])
    weight.requires_grad_()
    none = linear_logp(hidden[:0], weight, targets[:0], return_entropy=True, backend=backend)
    assert all(x is not None and x.shape == (0,) for x in none)
    none.logp.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", SMALL)
def test_layouts(backend: str) -> None:
    """Views with NaN around them, and gradients of any stride."""
    hidden, weight, targets, bias = problem(20, 12, 31)
    want, of_want = gradients(linear_logp, (hidden, weight, targets, bias), "hwb", backend=backend)
    views = [
        (lay_out(hidden, "sliced"), lay_out(weight, "sliced"), torch.stack([targets] * 2, 1)[:, 0]),
        (lay_out(hidden, "offset"), lay_out(weight, "offset"), targets),
        (hidden.T.contiguous().T, weight.T.contiguous().T, targets),
    ]
    for h, w, t in views:
        for b in (bias, torch.stack([bias] * 2, 1)[:, 0]):
            got, of_got = gradients(linear_logp, (h, w, t, b), "hwb", backend=backend)
            torch.testing.assert_close(got.logp, want.logp)
            for name in "hwb":
                torch.testing.assert_close(of_got[name], of_want[name], rtol=1e-4, atol=1e-5)
    leaf = hidden.clone().requires_grad_()
    linear_logp(leaf, weight, targets, backend=backend).logp.sum().backward()  # of stride 0
    other = hidden.clone().requires_grad_()
    naive(other, weight, targets).logp.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)


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


@pytest.mark.skipif(KERNEL_MISSING is not None, reason="not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    skip_unless_lesser(isa)
    tests = "(test_truth or test_error or test_same_bits or extreme or bad) and native"
    rerun(__file__, isa, tests)


def test_autocast_changes_nothing() -> None:
    """Products of float32 stay so: log-probs of bfloat16 products would be off by some 1e-2."""
    tensors = problem(20, 12, 31)
    want, of_want = gradients(linear_logp, tensors, "hwb", return_entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, of_got = gradients(linear_logp, tensors, "hwb", return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(of_got[n], of_want[n]) for n in "hwb")


# ---- Edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["h", "hwb"])
@pytest.mark.parametrize("backend", SMALL)
def test_ignored_targets(backend: str, learn: str) -> None:
    """Their log-prob is 0, without a gradient; lse and entropy are as ever. Any index will do."""
    hidden, weight, targets, bias = problem(9, 12, 31)
    everything = torch.full_like(targets, -100)
    got, grads = gradients(linear_logp, (hidden, weight, everything, bias), learn, backend=backend)
    assert torch.equal(got.logp, torch.zeros(9))
    torch.testing.assert_close(got.lse, naive(hidden, weight, targets, bias).lse)
    assert all(g.any() for g in grads.values()), "lse has a gradient"

    leaves = [
        x.clone().requires_grad_(n in learn)
        for n, x in zip("hwb", (hidden, weight, bias), strict=True)
    ]
    for index, t in ((-100, everything), (3, torch.full_like(targets, 3))):
        done = linear_logp(*leaves[:2], t, bias=leaves[2], ignore_index=index, backend=backend)
        asked = [x for x in leaves if x.requires_grad]
        for grad in torch.autograd.grad(done.logp.sum(), asked):
            assert not grad.any()


@pytest.mark.parametrize("learn", ["h", "hwb"])
@pytest.mark.parametrize("backend", SMALL)
def test_padding_that_holds_nan(backend: str, learn: str) -> None:
    """Tokens without a gradient do not change the gradients of others, whatever they hold."""
    hidden, weight, targets, bias = problem(30, 12, 31)
    targets[20:] = -100
    spoilt = hidden.clone()
    spoilt[20:] = NAN
    leaves = [
        x.clone().requires_grad_(n in learn)
        for n, x in zip("hwb", (spoilt, weight, bias), strict=True)
    ]
    whole = [
        x.clone().requires_grad_(n in learn)
        for n, x in zip("hwb", (hidden, weight, bias), strict=True)
    ]
    for h, w, b in (leaves, whole):
        linear_logp(h, w, targets, bias=b, backend=backend).logp.sum().backward()
    for got, want in zip(leaves, whole, strict=True):
        assert (got.grad is None) == (want.grad is None)
        assert got.grad is None or torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("learn", ["h", "hwb"])
@pytest.mark.parametrize("backend", SMALL)
def test_extreme_logits(tiles: None, backend: str, learn: str) -> None:
    """Logits up to 1e4, rising and falling, with removed tokens, give what float64 gives."""
    hidden, weight, targets, bias = problem(6, 12, 31)
    weight = weight * 3000
    bias[2:30:3] = -INF
    targets[:] = torch.tensor([0, 1, 30, 4, 2, 30])  # the fifth is removed
    tensors = hidden, weight, targets, bias
    got, of_got = gradients(linear_logp, tensors, learn, return_entropy=True, backend=backend)
    exact = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    want, of_want = gradients(linear_logp, exact, learn, return_entropy=True, backend="reference")
    assert got.logp[4] == -INF
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-2)  # 1e4 has steps of 1e-3
    for name, grad in of_got.items():
        torch.testing.assert_close(
            grad.double(), of_want[name], rtol=1e-2, atol=1e-2 * of_want[name].abs().max().item()
        )
    if "b" in learn:
        removed = bias == -INF
        removed[2] = False  # a target's own gradient is 1 though it is removed
        assert not of_got["b"][removed].any()
        assert not of_got["w"][removed].any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("backend", [*SMALL, "reference"])
def test_bad_rows(tiles: None, backend: str, value: float) -> None:
    """A token with bad logits is NaN, and the others are as without it."""
    hidden, weight, targets, _ = problem(20, 2, 31)
    hidden, weight = hidden.abs(), weight.abs()
    want = linear_logp(hidden, weight, targets, return_entropy=True, backend=backend)
    hidden[11, 1] = value
    hidden.requires_grad_()
    got = linear_logp(hidden, weight, targets, return_entropy=True, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a[11].isnan()
        others = torch.arange(20) != 11
        torch.testing.assert_close(a[others], b[others])
    (grad,) = torch.autograd.grad(loss_of(got), hidden)
    assert grad.isfinite().all(1).nonzero().squeeze(1).tolist() == [i for i in range(20) if i != 11]
    targets[11] = -100
    assert linear_logp(hidden, weight, targets, backend=backend).logp[11] == 0


@pytest.mark.parametrize("backend", SMALL)
def test_soft_cap_of_infinity(backend: str) -> None:
    """An infinite logit becomes the cap, as the tanh of infinity is 1."""
    hidden, weight, targets, bias = problem(6, 12, 31)
    bias[3], bias[4] = INF, -INF
    got, of_got = gradients(
        linear_logp,
        (hidden, weight, targets, bias),
        "hwb",
        softcap=4.0,
        return_entropy=True,
        backend=backend,
    )
    want, of_want = gradients(naive, (hidden, weight, targets, bias), "hwb", softcap=4.0)
    assert_close(got, want)
    for name in "hwb":
        torch.testing.assert_close(of_got[name], of_want[name], rtol=1e-4, atol=1e-4)
    assert not of_got["b"][3:5].any()


# ---- Cost ----------------------------------------------------------------------------------------


def profiled(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Products of a call, its largest allocation in bytes, and what it gave."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = seen.events()
    products = sum(e.name in ("aten::mm", "aten::addmm_") for e in events)
    return products, max(e.self_cpu_memory_usage for e in events), result


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
    assert profiled(lambda: naive(hidden, weight, targets, bias))[1] >= logits


def test_ignored_tokens_cost_nothing_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_tiles, "ROWS", 16)
    hidden, weight, targets, _ = problem(160, 8, 64)
    targets[32:] = -100
    loss = linear_logp(hidden.requires_grad_(), weight.requires_grad_(), targets).logp.sum()
    assert profiled(loss.backward)[0] == 3 * 2
    assert hidden.grad is not None
    assert not hidden.grad[32:].any()
    assert hidden.grad[:32].any(1).all()


# ---- Registration --------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["", "h", "hwb"])
def test_compiled(learn: str) -> None:
    """One node between operations of the graph; sizes may change."""
    torch._dynamo.reset()

    def results(
        hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: Any
    ) -> LinearLogp:
        done = linear_logp(
            hidden * 2, weight, targets, bias=bias.relu(), return_entropy=True, **options
        )
        return LinearLogp(done.logp + 1, done.lse, done.entropy)

    compiled = torch.compile(results, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 33):
        hidden, weight, targets, bias = problem(tokens, 12, 31)
        hidden, targets = hidden.view(1, tokens, 12), targets.view(1, tokens)
        for options in ({}, {"softcap": 3.0, "temperature": 0.5}):
            got, of_got = gradients(compiled, (hidden, weight, targets, bias), learn, **options)
            want, of_want = gradients(results, (hidden, weight, targets, bias), learn, **options)
            assert_close(got, want, 0)
            for name in learn:
                torch.testing.assert_close(of_got[name], of_want[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("keep", [logp_tiles.NOTHING, logp_tiles.MEAN, logp_tiles.MOMENTS])
def test_registration(keep: int, backend: str | None) -> None:
    hidden, weight, targets, bias = problem(6, 12, 31)
    settings = (3.0, 0.5, -100)
    op = torch.ops.crossfade.linear_logp.default
    learn = keep != logp_tiles.NOTHING
    args = hidden.requires_grad_(learn), weight, targets, bias
    torch.library.opcheck(op, (*args, *settings, keep, backend))
    if not learn:
        torch.library.opcheck(
            op,
            (
                hidden.requires_grad_(),
                weight.requires_grad_(),
                targets,
                None,
                *settings,
                0,
                backend,
            ),
        )
    given = (x.detach() for x in op(*args, *settings, keep, backend)[2:])
    of = torch.ones(6), None, torch.ones(6) if keep != logp_tiles.MEAN else None
    wanted = [True, not learn, not learn]
    detached = [x.detach() for x in args]
    detached[0] = detached[0].T.contiguous().T  # gradients are contiguous all the same
    backward = torch.ops.crossfade.linear_logp_backward.default
    torch.library.opcheck(backward, (*detached, *settings, keep, backend, *given, *of, wanted))


@pytest.mark.parametrize("learn", ["h", "hw"])
def test_second_derivatives_are_refused(learn: str) -> None:
    hidden, weight, targets, _ = problem(6, 12, 31)
    hidden.requires_grad_()
    weight.requires_grad_("w" in learn)
    logp = linear_logp(hidden, weight, targets).logp
    (grad,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logp has no second derivative"):
        grad.square().sum().backward()


# torch's own forward mode uses what it has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("at", ["hidden", "weight", "bias"])
def test_forward_mode_derivatives_are_refused(at: str) -> None:
    names = "hidden", "weight", "bias"
    hidden, weight, targets, bias = problem(6, 12, 31)
    tensors = dict(zip(names, (hidden, weight, bias), strict=True))

    def logp_of(x: Tensor, backend: str | None = None) -> Tensor:
        return linear_logp(targets=targets, backend=backend, **{**tensors, at: x}).logp

    x = tangent = tensors[at]
    with pytest.raises(RuntimeError, match="linear_logp has no forward-mode derivative"):
        torch.func.jvp(logp_of, (x,), (tangent,))
    _, found = torch.func.jvp(lambda x: logp_of(x, "reference"), (x,), (tangent,))
    assert found.isfinite().all()
    assert found.any()


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs float32, bfloat16 and float16 where it is built; torch the rest."""
    if KERNEL_MISSING is not None:
        pytest.skip(KERNEL_MISSING)
    calls = []
    kernel = native.logp_forward
    monkeypatch.setattr(native, "logp_forward", lambda *args: calls.append(1) or kernel(*args))
    for dtype in DTYPES:
        linear_logp(*problem(3, 8, 5, dtype)[:3])
    assert len(calls) == 3
    linear_logp(*problem(3, 8, 5, torch.float64)[:3])
    linear_logp(*problem(3, 8, 5)[:3], backend="torch")
    linear_logp(*problem(3, 8, 5)[:3], backend="reference")
    assert len(calls) == 3
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_missing", "as if never built", raising=False)
    hidden, weight, targets, _ = problem(3, 8, 5)
    torch.testing.assert_close(
        linear_logp(hidden, weight, targets).logp, naive(hidden, weight, targets).logp
    )


GOOD = dict(zip(("hidden", "weight", "targets", "bias"), problem(3, 8, 5), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden is a list"),
        (
            {"hidden": torch.ones(3, 8, dtype=torch.int64)},
            TypeError,
            "hidden has dtype torch.int64",
        ),
        ({"hidden": torch.ones(3, 7)}, ValueError, r"hidden has shape \[3, 7\]"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden has shape \[\]"),
        (
            {"hidden": torch.ones(3, 8).double()},
            TypeError,
            "weight has dtype torch.float32 and hidden",
        ),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        (
            {"weight": torch.ones(5, 8).double()},
            TypeError,
            "weight has dtype torch.float64 and hidden",
        ),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \[5\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, r"weight has shape \[0, 8\]"),
        ({"weight": torch.ones(5, 8, device="meta")}, ValueError, "weight is on meta"),
        ({"targets": [1, 2, 3]}, TypeError, "targets is a list"),
        ({"targets": torch.ones(3)}, TypeError, "targets has dtype torch.float32"),
        ({"targets": torch.ones(4, dtype=torch.int64)}, ValueError, r"targets has shape \[4\]"),
        (
            {"targets": torch.tensor([0, 5, 1])},
            ValueError,
            r"targets has 5 at position 1.*\[0, 5\)",
        ),
        ({"targets": torch.tensor([0, 1, -1])}, ValueError, "targets has -1 at position 2"),
        ({"bias": 1.0}, TypeError, "bias is a float"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\]"),
        ({"bias": torch.ones(5).double()}, TypeError, "bias has dtype torch.float64"),
        ({"softcap": "30"}, TypeError, "softcap is '30'"),
        ({"softcap": 0.0}, ValueError, r"softcap is 0\.0"),
        ({"softcap": INF}, ValueError, "softcap is inf"),
        ({"softcap": 1e39}, ValueError, r"softcap is 1e\+39"),  # infinite in float32
        ({"softcap": 1e-46}, ValueError, "softcap is 1e-46"),  # 0 in float32
        ({"temperature": None}, TypeError, "temperature is None"),
        ({"temperature": 0}, ValueError, "temperature is 0"),
        ({"temperature": NAN}, ValueError, "temperature is nan"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index is 1\.0"),
        ({"return_entropy": 1}, TypeError, "return_entropy is 1"),
        ({"mean_only": 1}, TypeError, "mean_only is 1"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear_logp(**{**GOOD, **changes})


def test_backend_that_cannot() -> None:
    exact = problem(3, 8, 5, torch.float64)[:3]
    for name in ("native", "triton"):
        with pytest.raises(ValueError, match=rf"backend is '{name}', which cannot"):
            linear_logp(*exact, backend=name)
    elsewhere = [x.to("meta") for x in problem(3, 8, 5)[:3]]
    with pytest.raises(ValueError, match=r"backend is .native., .* is on meta"):
        linear_logp(*elsewhere, backend="native")
    with pytest.raises(ValueError, match=r"backend is .triton., .* no meta backend"):
        linear_logp(*elsewhere, backend="triton")
