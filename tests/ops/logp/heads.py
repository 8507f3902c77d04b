"""What the tests of `linear_logp` share: backends, problems, the same in plain torch, counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import INF, normal
from crossfade import ops
from crossfade.ops import LinearLogp, backends, native
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


def profiled(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Products of a call, its largest allocation in bytes, and what it gave."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = seen.events()
    products = sum(e.name in ("aten::mm", "aten::addmm_") for e in events)
    return products, max(e.self_cpu_memory_usage for e in events), result
