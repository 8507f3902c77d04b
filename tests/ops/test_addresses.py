"""Tensors whose numbers do not lie in memory as they are, and calls that somebody records.

Eager calls hand addresses to kernels. Here nothing has an address of its own, or one that is not to
be used so: each call gives what it gives of plain tensors, or an error that says what is wrong.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INF, normal
from crossfade import ops
from crossfade.ops import memory, native
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)

LENGTHS = torch.tensor([1, 3])
TARGETS = torch.tensor([4, 2])


def floats(*shape: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(shape).numel(), seed, scale=1.0).view(shape)


def attend(query: Tensor, keys: Tensor) -> Tensor:
    new = query[:, :1]
    return ops.attend_(query, new, new, keys, keys.clone(), LENGTHS, scale=0.4)


def fork(cache: Tensor) -> Tensor:
    ops.fork_cache_([cache], torch.ones(2, dtype=torch.int64, device=cache.device))
    return cache


Op = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
OPS: dict[str, Op] = {
    "blend": (lambda z, q: ops.blend([z], [0.9], [q], [0.5]), (floats(2, 9), floats(2, 9, seed=1))),
    "blend by rows": (
        lambda z, w: ops.blend([z, z], w, power=0.0),
        (floats(2, 9), floats(2, 2, seed=1)),
    ),
    "blend_sample": (
        lambda z: ops.blend_sample([z], [0.9], top_p=0.9, seed=2**64 - 1, step=2).logprobs,
        (floats(2, 9),),
    ),
    "linear": (
        lambda x, w, b: ops.linear(x, w, b),
        (floats(2, 9), floats(5, 9, seed=1), floats(5, seed=2)),
    ),
    "linear with deltas": (
        lambda x, w, a, b, s: ops.linear(x, w, lora=ops.Lora(a, b, s)),
        (floats(2, 9), floats(5, 9), floats(3, 9), floats(5, 3), floats(2, 3)),
    ),
    "attend_": (attend, (floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1))),
    "linear_logp": (
        lambda h, w: ops.linear_logp(h, w, TARGETS).logp,
        (floats(2, 8), floats(9, 8, seed=1)),
    ),
    "chunk_select": (lambda s: ops.chunk_select(s, s > 1, 2), (floats(2, 6),)),
    "fork_cache_": (fork, (floats(2, 1, 5, 8),)),
}
# torch's own forward mode uses what it has deprecated
FORWARD = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
EACH = pytest.mark.parametrize("op", OPS)


def fresh(op: str) -> Op:
    """The op, and copies of its arguments: some are written into."""
    call, tensors = OPS[op]
    return call, tuple(t.clone() for t in tensors)


def result(op: str) -> Tensor:
    call, tensors = fresh(op)
    return call(*tensors)


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
        of_head = ops.linear_logp(z, z, TARGETS.new_tensor([0, 1, 2]), backend=backend)
        y = ops.linear(z, z, backend=backend)
        new, keys = query[:, :1], caches.clone()
        attended = ops.attend_(
            query, new, new, keys, keys.clone(), LENGTHS, scale=0.37, softcap=3.3, backend=backend
        )
        return [*drawn, log_p, of_head.logp, y, attended]

    want = all_results()
    torch.set_default_dtype(dtype)
    try:
        got = all_results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---- Tensors without an address of their own -----------------------------------------------------


@EACH
def test_views_with_the_negative_bit(op: str) -> None:
    """The numbers of such a tensor are the negatives of what lies in its memory."""
    call, tensors = fresh(op)
    if op in ("attend_", "fork_cache_"):
        cache = torch._neg_view(tensors[-1])
        with pytest.raises(ValueError, match=r"(keys|tensors\[0\]) is a view of the negatives"):
            call(*tensors[:-1], cache)
        if op == "attend_":
            query = tensors[0].neg()
            torch.testing.assert_close(attend(torch._neg_view(query), tensors[1]), result(op))
        return
    negative = tuple(torch._neg_view(t) for t in tensors)
    plain = tuple(-t for t in fresh(op)[1])
    torch.testing.assert_close(call(*negative), call(*plain))


@EACH
def test_storage_that_was_given_back(op: str) -> None:
    """Offloaded and sharded parameters are such; so is a view that begins in a storage's middle."""
    if op == "linear_logp":
        pytest.skip("torch's own products come first")
    for begin in (0, 100):
        call, tensors = fresh(op)
        whole = torch.cat([torch.zeros(begin), tensors[-1].flatten()])
        last = whole[begin:].view(tensors[-1].shape)
        whole.untyped_storage().resize_(0)
        if op == "attend_":  # which copies it
            new = tensors[0][:, :1]
            with pytest.raises(ValueError, match=r"keys has .* storage is empty"):
                ops.attend_(tensors[0], new, new, last, tensors[1], LENGTHS, scale=0.4)
            continue
        if op == "chunk_select":
            with pytest.raises(ValueError, match=r"scores has .* storage is empty"):
                ops.chunk_select(last, torch.zeros(2, 6, dtype=torch.bool), 2)
            continue
        with pytest.raises(ValueError, match="storage is empty"):
            call(*tensors[:-1], last)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("backend", ["native", "torch", None])
def test_linear_logp_refuses_what_was_given_back(name: str, backend: str | None) -> None:
    """It is made of torch's own products, which would read address 0."""
    given = {"hidden": torch.randn(5, 8), "weight": torch.randn(11, 8), "bias": torch.randn(11)}
    given[name].untyped_storage().resize_(0)
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{name} has shape .* storage is empty"):
        ops.linear_logp(targets=targets, **given, backend=backend)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3), torch.ones(5)], layout=layout)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "rows": lambda: torch.eye(4).to_sparse_csr(),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "mkldnn": lambda: torch.eye(4).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_without_strides(layout: str) -> None:
    x, plain = LAYOUTS[layout](), torch.eye(4)
    four = plain.view(1, 1, 4, 4)
    calls: dict[str, Callable[[], Any]] = {
        r"logits\[1\]": lambda: ops.blend([plain, x], [1.0, 1.0]),
        r"values\[0\]": lambda: ops.blend_sample([plain], [1.0], [x], [1.0], seed=0, step=0),
        "x": lambda: ops.linear(x, plain, backend="native"),
        "keys": lambda: ops.attend_(four, four, four, x, four, LENGTHS[:1], scale=1.0),
        "hidden": lambda: ops.linear_logp(x, plain, TARGETS),
        "scores": lambda: ops.chunk_select(x, plain > 0, 2),
        r"tensors\[0\]": lambda: ops.fork_cache_([x], LENGTHS),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} has layout .*; it must be torch.strided"):
            call()


def test_inference_tensors() -> None:
    for op in OPS:
        with torch.inference_mode():
            call, tensors = fresh(op)
            got = call(*tensors)
        assert torch.equal(got, result(op)), op


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


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_written_into_is_a_new_version(backend: str) -> None:
    """Their version rises, so that a backward pass that needs what they held before raises."""
    query, cache, parents = floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1), torch.tensor([1, 0])
    for write in (
        lambda keys: ops.attend_(
            query, query[:, :1], query[:, :1], keys, keys.clone(), LENGTHS, scale=1, backend=backend
        ),
        lambda values: ops.attend_(
            query, query[:, :1], query[:, :1], cache.clone(), values, LENGTHS, scale=1.0
        ),
        lambda x: ops.fork_cache_([x.clone(), x], parents, backend=backend),
    ):
        x, factor = cache.clone(), torch.ones(8, requires_grad=True)
        product = (x * factor).sum()
        with torch.no_grad():
            write(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("backend", ["native", "reference", None], ids=str)
def test_leaves_are_not_written_into(backend: str | None) -> None:
    query, cache = floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1).requires_grad_()
    new, before = query[:, :1], cache.detach().clone()
    for name, caches in (("keys", (cache, before)), ("values", (before.clone(), cache))):
        with pytest.raises(ValueError, match=f"{name} is a leaf that requires a gradient"):
            ops.attend_(query, new, new, *caches, LENGTHS, scale=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"tensors\[0\] requires a gradient"):
        ops.fork_cache_([cache], LENGTHS - 1, backend=backend)
    assert torch.equal(cache, before)
    with torch.no_grad():  # as torch has it
        ops.fork_cache_([cache], torch.tensor([1, 0]), backend=backend)
    assert torch.equal(cache, before.flip(0))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_caches_have_a_place_for_each_number(backend: str) -> None:
    query, cache = floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1)
    new, shared = query[:, :1], cache[:1].expand(2, 1, 5, 8)
    for name, caches in (("keys", (shared, cache)), ("values", (cache, shared))):
        with pytest.raises(ValueError, match=f"{name} has .* a place for each of its numbers"):
            ops.attend_(query, new, new, *caches, LENGTHS, scale=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"tensors\[1\] has .* a place for each"):
        ops.fork_cache_([cache, shared], torch.tensor([1, 0]), backend=backend)


def test_caches_lie_apart() -> None:
    query, cache = floats(2, 2, 1, 8), floats(2, 1, 5, 8, seed=1)
    new = query[:, :1]
    with pytest.raises(ValueError, match="values lies where keys does"):
        ops.attend_(query, new, new, cache, cache, LENGTHS, scale=1.0)
    with pytest.raises(ValueError, match=r"tensors\[2\] lies where tensors\[0\] does"):
        ops.fork_cache_([cache, cache.clone(), cache], torch.tensor([1, 0]))


# ---- Numbers that no kernel can hold -------------------------------------------------------------

HUGE = [2**31, 2**63, 2**64, 2**70, -(2**70), 10**400]


@pytest.mark.parametrize("x", HUGE, ids=lambda x: f"{x:.3e}" if abs(x) < 2**80 else "10^400")
def test_huge_integers(x: int) -> None:
    """Each call gives a result, or an error that names the argument."""
    z, query, cache = floats(2, 9), floats(2, 2, 1, 8), floats(2, 1, 5, 8)
    new = query[:, :1]

    def draw(**changes: Any) -> Any:
        return ops.blend_sample([z], [1.0], **{"seed": 0, "step": 0, **changes})

    def attended(**changes: Any) -> Any:
        given = {"scale": 1.0, **changes}
        return ops.attend_(query, new, new, cache.clone(), cache.clone(), LENGTHS, **given)

    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: draw(**{name: x})
        for name in (
            *("seed", "stream", "step", "top_k", "temperature", "top_p", "min_p"),
            *("power", "vocab_size"),
        )
    }
    calls |= {
        "Support.top_k": lambda: draw(support=ops.Support(top_k=x)),
        "upport.term": lambda: draw(support=ops.Support(term=x)),
        "window": lambda: attended(window=x),
        "scale": lambda: attended(scale=x),
        "softcap": lambda: attended(softcap=x),
        "ignore_index": lambda: ops.linear_logp(z, z, TARGETS % 2, ignore_index=x),
        "width": lambda: ops.chunk_select(z, z > 0, x),
        "start": lambda: ops.fork_cache_([cache.clone()], LENGTHS * 0, x),
        "end": lambda: ops.fork_cache_([cache.clone()], LENGTHS * 0, 0, x),
        "weights": lambda: ops.blend([z], [x]),
    }
    for name, call in calls.items():
        said = error_of(call)
        assert said is None or (name in said and "must" in said)


def error_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("changes", [{"scale": INF}, {"scale": "1"}, {"window": 1.0}], ids=str)
def test_settings_of_attention(changes: dict[str, Any]) -> None:
    query, cache = floats(2, 2, 1, 8), floats(2, 1, 5, 8)
    given = {"scale": 1.0, **changes}
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(changes))} is .*; it must be"):
        ops.attend_(query, query[:, :1], query[:, :1], cache, cache.clone(), LENGTHS, **given)


# ---- float64 -------------------------------------------------------------------------------------


@EACH
def test_float64(op: str) -> None:
    """Models of float64 run: in float64, or rounded for a blend, whose results are float32."""
    call, tensors = fresh(op)
    got = call(*(t.double() if t.shape != (2, 3) else t for t in tensors))
    want = result(op)
    torch.testing.assert_close(got, want, check_dtype=False)
    blended = op.startswith("blend") or not want.is_floating_point()
    assert got.dtype == (want.dtype if blended else torch.float64)


def test_float64_keeps_its_digits() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 0.0]], dtype=torch.float64)
    assert ops.chunk_select(scores, scores > 9, 2).tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"scores has dtype torch\.float64"):
        ops.chunk_select(scores, scores > 9, 2, backend="native")
    x, w = floats(2, 9).double(), floats(5, 9).double()
    torch.testing.assert_close(ops.linear(x, w), x @ w.T, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        ops.linear(x, w, backend="native")
    query, cache = floats(2, 2, 1, 8).double(), floats(2, 1, 5, 8).double()
    new = query[:, :1]
    out = ops.attend_(query, new, new, cache.clone(), cache.clone(), LENGTHS, scale=0.4)
    seen = cache[:1, :, :2].clone()
    seen[:, :, 1] = new[0, :, 0]
    want = (0.4 * query[0] @ seen[0].mT).softmax(-1) @ seen[0]
    torch.testing.assert_close(out[0], want.transpose(0, 1), rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"query has dtype torch\.float64"):
        ops.attend_(query, new, new, cache, cache.clone(), LENGTHS, scale=0.4, backend="native")


# ---- Memory that is not to be had ----------------------------------------------------------------

TOO_LITTLE = """
import resource, torch
from crossfade import ops
z = torch.zeros(1, 40_000_000, dtype=torch.bfloat16)
ops.blend_sample([z[:, :100]], [1.0], seed=0, step=0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    ops.blend_sample([z], [1.0], seed=0, step=0)
except torch.OutOfMemoryError as error:
    print("out of memory" in str(error))
print(ops.blend_sample([z[:, :100]], [1.0], seed=0, step=0).tokens.shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_memory_is_torchs_own_error() -> None:
    """It raises what loops that halve their batches wait for, and the next call works."""
    done = subprocess.run([sys.executable, "-c", TOO_LITTLE], capture_output=True, text=True)
    assert done.stdout == "True\ntorch.Size([1])\n", done.stderr[-2000:]


def test_addresses_are_taken_in_one_place() -> None:
    x = floats(3)
    assert memory.address(x, "x") == x.data_ptr()
    assert memory.address(x[:0], "x") == 0 or x[:0].data_ptr() != 0
    with pytest.raises(memory.NotPlain, match="x is a FakeTensor of shape"):
        memory.address(FakeTensorMode().from_tensor(x), "x")
