"""`linear_logp(mean_only=True)`: gradients of a sum in the forward pass, of other losses too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import EPS, INF, NAN, rms
from crossfade import ops
from crossfade.ops import LinearLogp, native
from crossfade.ops.logp import tiles as logp_tiles
from heads import assert_close, loss_of, naive, problem, profiled
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernel is not built"
)

LOSSES: dict[str, Callable[[LinearLogp], Tensor]] = {
    "mean": lambda results: -results.logp.mean(),
    "sum": lambda results: results.logp.sum(),
    "nothing": lambda results: 0 * results.logp.sum(),
    "a weight each": loss_of,
    "half of them": lambda results: results.logp[::2].sum(),
    "lse": lambda results: results.logp.sum() + results.lse.sum(),
    "entropy": lambda results: results.logp.sum() - results.entropy.sum(),
}


@pytest.fixture(params=[None, (7, 12)], ids=["one tile", "7 x 12"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(logp_tiles, "tile_size", lambda device: request.param)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def mean_only(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> LinearLogp:
    return ops.linear_logp(hidden, weight, targets, mean_only=True, **options)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("ignored", [(), (1, 4), range(33)], ids=["all", "but 2", "none"])
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.usefixtures("tiles")
def test_truth(tokens: int, ignored: Any, loss: Callable[[LinearLogp], Tensor]) -> None:
    """Gradients are those of float64, also of losses that are no sum."""
    hidden, weight, targets, _ = problem(tokens, 12, 67)
    targets[[i for i in ignored if i < tokens]] = -100
    found = leaves(hidden, weight)
    results = mean_only(*found, targets, return_entropy=True)
    loss(results).backward()
    truth = leaves(hidden.double(), weight.double())
    exact = naive(*truth, targets)
    assert_close(results, exact)
    loss(exact).backward()
    for x, want in zip(found, truth, strict=True):
        torch.testing.assert_close(x.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


def test_error() -> None:
    """In root mean square, one step of float32 times what a number is a sum of: see there."""
    hidden, weight, targets, _ = problem(600, 64, 3001)
    exact = leaves(hidden.double(), weight.double())
    naive(*exact, targets).logp.mean().backward()
    found = leaves(hidden, weight)
    mean_only(*found, targets).logp.mean().backward()
    h, w = (x.detach() for x in exact)
    g = ((h @ w.T).softmax(-1) - F.one_hot(targets, 3001)) / 600
    off = g.abs() * (1 + h.abs() @ w.abs().T)
    sums = off @ w.abs(), off.T @ h.abs()
    for x, want, size in zip(found, exact, sums, strict=True):
        assert rms(x.grad.double() - want.grad) <= EPS * rms(size)


def test_bits() -> None:
    """Results are those without it, if torch's products do not depend on the number of rows."""
    hidden, weight, targets, _ = problem(1100, 96, 2100)
    targets[::3] = -100
    products = hidden @ weight.T
    if not all(torch.equal(hidden[:n] @ weight.T, products[:n]) for n in (16, 92, 96, 367, 550)):
        pytest.skip("a row of torch.mm depends on the number of rows here")
    want = ops.linear_logp(hidden, weight, targets, return_entropy=True)
    got = mean_only(*leaves(hidden, weight), targets, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dtypes_of_hidden() -> None:
    """Under autocast hidden has 16 bits."""
    hidden, weight, targets, _ = problem(20, 12, 31)
    of_hidden, of_weight = leaves(hidden.bfloat16(), weight)
    loss = mean_only(of_hidden, of_weight, targets).logp.sum()
    assert profiled(loss.backward)[0] == 0
    truth = leaves(hidden.bfloat16().float(), weight)
    naive(*truth, targets).logp.sum().backward()
    assert of_hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(of_hidden.grad.float(), truth[0].grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(of_weight.grad, truth[1].grad, rtol=1e-4, atol=1e-4)


def test_views_and_a_second_backward() -> None:
    hidden, weight, targets, _ = problem(20, 12, 31)
    turned = leaves(hidden.T.contiguous().T, weight.T.contiguous().T)
    loss = mean_only(*turned, targets).logp.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    truth = leaves(hidden, weight)
    (2 * naive(*truth, targets).logp.sum()).backward()
    for x, want in zip(turned, truth, strict=True):
        torch.testing.assert_close(x.grad, want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [Tensor.nansum, Tensor.sum, lambda x: x.sum().nan_to_num(), lambda x: INF * x.sum()],
    ids=["without it", "with it", "times 0", "times infinity"],
)
def test_a_bad_row(loss: Callable[[Tensor], Tensor]) -> None:
    """It spoils the gradients that it spoils without `mean_only`, and no others."""
    hidden, weight, targets, _ = problem(20, 12, 31)
    hidden[3, 5] = hidden[7, 0] = NAN
    targets[7] = -100
    at, same = leaves(hidden, weight), leaves(hidden, weight)
    for call, x in ((mean_only, at), (ops.linear_logp, same)):
        results = call(*x, targets)
        assert results.logp.isnan().nonzero().tolist() == [[3]]
        loss(results.logp).backward()
    assert at[0].grad[7].eq(0).all()
    for x, want in zip(at, same, strict=True):
        torch.testing.assert_close(x.grad, want.grad, equal_nan=True)


def test_former_name() -> None:
    """It is taken for one release, with a warning that says what to write."""
    hidden, weight, targets, _ = problem(5, 8, 6)
    got, want = leaves(hidden, weight), leaves(hidden, weight)
    with pytest.warns(FutureWarning, match="uniform is now called mean_only"):
        ops.linear_logp(*got, targets, uniform=True).logp.mean().backward()
    mean_only(*want, targets).logp.mean().backward()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.grad, b.grad)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(TypeError, match="uniform is 1; it must be True or False"),
    ):
        ops.linear_logp(hidden, weight, targets, uniform=1)


# ---- What it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learn", "changes", "forward", "backward"),
    [
        ("hw", {}, 3, 0),
        ("hw", {"loss": "a weight each"}, 3, 3),
        ("hw", {"bias": True}, 1, 3),
        ("hw", {"softcap": 3.0}, 1, 3),
        ("hw", {"temperature": 0.5}, 1, 3),
        ("hw", {"backend": "torch"}, 1, 3),
        ("hw", {"dtype": torch.bfloat16}, 1, 3),
        ("hw", {"dtype": torch.float64}, 1, 3),
        ("w", {}, 1, 2),
        ("h", {}, 2, 0),
        ("", {}, 1, 0),
    ],
    ids=str,
)
def test_products(
    monkeypatch: pytest.MonkeyPatch,
    learn: str,
    changes: dict[str, Any],
    forward: int,
    backward: int,
) -> None:
    monkeypatch.setattr(logp_tiles, "ROWS", 64)
    monkeypatch.setattr(logp_tiles, "COLUMNS", 128)
    options = dict(changes)
    loss = LOSSES[options.pop("loss", "mean")]
    hidden, weight, targets, bias = problem(512, 64, 1024, options.pop("dtype", torch.float32))
    if options.pop("bias", False):
        options["bias"] = bias
    hidden.requires_grad_("h" in learn)
    weight.requires_grad_("w" in learn)
    tiles = 8 * 8
    products, _, results = profiled(lambda: mean_only(hidden, weight, targets, **options))
    assert products == forward * tiles
    if learn:
        products, _, _ = profiled(loss(results).backward)
        assert products == backward * tiles


def test_ignored_tokens_cost_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_tiles, "ROWS", 16)
    hidden, weight, targets, _ = problem(160, 8, 64)
    targets[32:] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    assert profiled(lambda: mean_only(hidden, weight, targets))[0] == 3 * 2 + 8


@pytest.mark.parametrize("size", [64, 256])
def test_memory(size: int) -> None:
    """Twice the weight's: for its gradient, and for logits of H tokens. Nothing else has size V."""
    hidden, weight, targets, _ = problem(512, size, 8192)
    hidden.requires_grad_()
    weight.requires_grad_()
    taken = []
    for _ in range(2):  # libraries keep buffers of their own
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            results = mean_only(hidden, weight, targets)
        given = [e.self_cpu_memory_usage for e in seen.events()]
        taken.append(sum(x for x in given if x > 0))
    small = 4 * hidden.nbytes + 100 * len(hidden)
    assert 2 * weight.nbytes <= taken[-1] <= 2 * weight.nbytes + small
    _, most, _ = profiled(results.logp.mean().backward)
    assert most <= weight.nbytes


# ---- Registration --------------------------------------------------------------------------------


def test_registration() -> None:
    hidden, weight, targets, _ = problem(20, 12, 31)
    op = torch.ops.crossfade.linear_logp.default
    args, settings = (*leaves(hidden, weight), targets, None), (0.0, 1.0, -100)
    torch.library.opcheck(op, (*args, *settings, logp_tiles.SUM, None))
    kept = [x.detach() for x in op(*args, *settings, logp_tiles.SUM, None)[2:]]
    backward = torch.ops.crossfade.linear_logp_backward.default
    of_each = torch.ones(20), torch.linspace(0, 1, 20)
    for of_logp in of_each:
        torch.library.opcheck(
            backward,
            (
                hidden,
                weight,
                targets,
                None,
                *settings,
                logp_tiles.SUM,
                None,
                *kept,
                of_logp,
                None,
                None,
                [True, True, False],
            ),
        )


def test_compiled() -> None:
    torch._dynamo.reset()
    call = torch.compile(mean_only, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 33):
        tensors = problem(tokens, 12, 31)[:3]
        tensors[2][4:6] = -100
        found, want = leaves(*tensors[:2]), leaves(*tensors[:2])
        loss = call(*found, tensors[2]).logp.mean()
        assert profiled(loss.backward)[0] == 0
        mean_only(*want, tensors[2]).logp.mean().backward()
        for x, y in zip(found, want, strict=True):
            assert torch.equal(x.grad, y.grad)
