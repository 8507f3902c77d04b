"""Tensors that have no memory of their own, share it, or are written into; no memory at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossfade import ops
from crossfade.ops import memory, native
from every_op import EACH, LENGTHS, OPS, TARGETS, attend, floats, fresh, result
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)


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
