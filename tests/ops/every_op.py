"""One call of every op, as functions of tensors alone, for tests that hold for all ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import normal
from crossfade import ops
from crossfade.ops import packed
from torch import Tensor

LENGTHS = torch.tensor([1, 3])
TARGETS = torch.tensor([4, 2])


def floats(*shape: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(shape).numel(), seed, scale=1.0).view(shape)


PACKED = packed.quantize(floats(5, 32, seed=1), 4)
# The kernel for packed weights rounds x to 8 bits, which hold these numbers exactly.
WHOLE = torch.stack((127.0 - 2.0 * torch.arange(32), torch.arange(32) - 127.0))


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
    "linear of 4 bits": (lambda x: ops.linear(x, PACKED), (WHOLE,)),
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
