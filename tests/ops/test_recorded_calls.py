"""Who else sees a call of an op: what records calls, torch's own modes, and autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from crossfade import ops
from crossfade.ops import native
from every_op import EACH, FORWARD, LENGTHS, OPS, TARGETS, floats, fresh, result
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)


# ---- Calls that somebody records -----------------------------------------------------------------


@EACH
def test_fake_tensors_have_shapes_alone(op: str) -> None:
    call, tensors = fresh(op)
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = call(*(torch.empty_like(t) for t in tensors))
    want = result(op)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert type(got) is not Tensor


@pytest.mark.parametrize("op", ["blend", "blend_sample", "linear", "linear with deltas"])
def test_fake_tensors_out_of_their_mode(op: str) -> None:
    call, tensors = fresh(op)
    mode = FakeTensorMode()
    got = call(*(mode.from_tensor(t) for t in tensors))
    assert got.shape == result(op).shape


@EACH
def test_real_tensors_under_fake_ones(op: str) -> None:
    """Under this mode all results are fake, also those of real tensors, and no kernel runs."""
    call, tensors = fresh(op)
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = call(*tensors)
    assert torch.equal(got, OPS[op][1][0]) if got is tensors[0] else type(got) is not Tensor


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@EACH
def test_make_fx_records_the_op(op: str, mode: str) -> None:
    call, tensors = fresh(op)
    with torch.no_grad():
        graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*tensors)
    assert "torch.ops.crossfade." in graph.code
    _, tensors = fresh(op)
    torch.testing.assert_close(graph(*tensors), result(op))
    _, tensors = fresh(op)
    torch.testing.assert_close(copy.deepcopy(graph)(*tensors), result(op))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@EACH
def test_jit_trace_records_the_op(op: str) -> None:
    call, tensors = fresh(op)
    if op == "fork_cache_":  # which would not be in the graph, as it has no result
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace leaves out"):
            torch.jit.trace(call, tensors, check_trace=False)
        return
    with torch.no_grad():
        traced = torch.jit.trace(call, tensors, check_trace=False)
    assert "crossfade::" in str(traced.graph)
    others = tuple(t.flip(0).contiguous() for t in fresh(op)[1])
    want = call(*(t.clone() for t in others))
    torch.testing.assert_close(traced(*others), want)


@EACH
def test_modes_that_count_see_the_op(op: str) -> None:
    call, tensors = fresh(op)
    with FlopCounterMode(display=False):
        got = call(*tensors)
    torch.testing.assert_close(got, result(op), rtol=0, atol=0)


@EACH
def test_functionalised(op: str) -> None:
    call, tensors = fresh(op)
    if op in ("attend_", "fork_cache_"):
        with pytest.raises(RuntimeError, match=f"custom .* operator .*crossfade::{op}"):
            torch.func.functionalize(call)(*tensors)
        return
    torch.testing.assert_close(torch.func.functionalize(call)(*tensors), result(op))


@EACH
def test_vmap_is_right_or_refused(op: str) -> None:
    call, tensors = fresh(op)
    try:
        got = torch.vmap(call)(*(t[None] for t in tensors))
    except (RuntimeError, ValueError) as error:
        said = str(error)
    else:
        torch.testing.assert_close(got[0], result(op))
        return
    assert any(word in said for word in ("vmap", "rule", "functorch"))


@EACH
def test_another_default_device(op: str) -> None:
    call, tensors = fresh(op)
    with torch.device("meta"):
        got = call(*tensors)
    assert torch.equal(got, result(op))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference", None], ids=str)
def test_another_default_dtype(dtype: torch.dtype, backend: str | None) -> None:
    """Numbers that become tensors get the default dtype, on which results must not depend."""
    z, weights = floats(3, 40), [0.3, 0.7]
    query, caches = floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1)
    cut = ops.Support(0, top_p=0.937, min_p=0.0011)

    def all_results() -> list[Any]:
        drawn = ops.blend_sample(
            [z, z.flip(1)],
            weights,
            power=-0.3,
            temperature=0.713,
            top_p=0.913,
            min_p=0.0123,
            seed=3,
            step=1,
            support=cut,
            return_term_logprobs=True,
            backend=backend,
        )
        log_p = ops.blend([z, z.flip(1)], weights, [z], [0.123], support=cut, backend=backend)
        pushed = ops.blend_sample(
            [z, z.flip(1)],
            weights,
            [z],
            [0.123],
            seed=3,
            step=1,
            return_pushes=True,
            backend=backend,
        )
        of_head = ops.linear_logp(z, z, TARGETS.new_tensor([0, 1, 2]), backend=backend)
        y = ops.linear(z, z, backend=backend)
        new, keys = query[:, :1], caches.clone()
        attended = ops.attend_(
            query, new, new, keys, keys.clone(), LENGTHS, scale=0.37, softcap=3.3, backend=backend
        )
        return [*drawn[:4], pushed.pushes, log_p, of_head.logp, y, attended]

    want = all_results()
    torch.set_default_dtype(dtype)
    try:
        got = all_results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---- Autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["blend", "blend by rows", "blend_sample"])
def test_backward_through_a_blend_is_refused(op: str) -> None:
    """It does not matter which requires the gradient: logits, values or weights."""
    call, tensors = fresh(op)
    for k in range(len(tensors)):
        given = [t.requires_grad_() if i == k else t.detach() for i, t in enumerate(tensors)]
        got = call(*given)
        torch.testing.assert_close(got, result(op))
        with pytest.raises(NotImplementedError, match=f"{op.split()[0]} has no derivative"):
            (got.sum() + given[k].sum()).backward()


@FORWARD
def test_forward_derivatives_of_a_blend_are_refused() -> None:
    z = floats(2, 9)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="blend has no forward-mode"):
        ops.blend([forward_ad.make_dual(z, z)], [1.0])
    with pytest.raises(RuntimeError, match="blend_sample has no forward-mode"):
        torch.func.jvp(lambda z: ops.blend_sample([z], [1.0], seed=0, step=0).logprobs, (z,), (z,))


@FORWARD
def test_functions_of_gradients_see_a_linear_layer() -> None:
    """`torch.func` differentiates and maps the torch formula instead of the kernel."""
    x, w = floats(2, 9), floats(5, 9, seed=1)
    grad = torch.func.grad(lambda x: ops.linear(x, w).sum())(x)
    torch.testing.assert_close(grad, w.sum(0).expand(2, 9))
    _, tangent = torch.func.jvp(lambda x: ops.linear(x, w), (x,), (x,))
    torch.testing.assert_close(tangent, x @ w.T)
    torch.testing.assert_close(torch.vmap(lambda x: ops.linear(x, w))(x[None])[0], x @ w.T)
