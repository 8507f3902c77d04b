"""`linear_logp` as autograd and torch.compile see it, which kernel it takes, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from cases import DTYPES, INF, NAN
from crossfade.ops import LinearLogp, native
from crossfade.ops.logp import tiles as logp_tiles
from heads import (
    KERNEL_MISSING,
    assert_close,
    gradients,
    linear_logp,
    naive,
    problem,
)
from torch import Tensor

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
