"""`ops.linear_logp` against dense float64: values, gradients, dtypes, shapes and edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import DTYPES, EPS, INF, NAN, lay_out, rms
from crossfade.ops.logp import tiles as logp_tiles
from heads import (
    LARGE,
    SMALL,
    WAYS,
    assert_close,
    gradients,
    linear_logp,
    loss_of,
    naive,
    problem,
)
from sweeps import product
from torch import Tensor

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
@pytest.mark.parametrize(
    ("way", "sizes"),
    [*product(WAYS, [(1, 1), (1, 9), (5, 8)], together=1), *product(WAYS, [(33, 67)])],
    ids=str,
)
def test_truth(tiles: None, sizes: tuple[int, int], way: dict[str, Any], backend: str) -> None:
    tokens, vocab = sizes
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


@pytest.mark.parametrize(
    ("way", "learn"),
    product(WAYS, ["h", "w", "b", "hw", "wb", "hb", "hwb"], together=1),
    ids=str,
)
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
