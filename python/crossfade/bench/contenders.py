"""What `crossfade bench ops` compares: our op, plain torch, FlashInfer, and a mere read.

Each contender of a case is a function without arguments, over inputs of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .timing import COLD_BYTES

WEIGHTS = (1.0, 0.8, -0.8)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


@dataclass(frozen=True)
class Case:
    """Three terms with logits `[batch, vocab]`, blended with `WEIGHTS`, sampled by a setting."""

    dtype: str
    batch: int
    vocab: int
    setting: str

    @property
    def bytes(self) -> int:
        """The size of all logits."""
        return len(WEIGHTS) * self.batch * self.vocab * getattr(torch, self.dtype).itemsize


def chain(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor]:
    """What one writes in torch: log-softmaxes, Hugging Face's processors, softmax, multinomial."""
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    if "top_k" in setting:
        processors.append(hf.TopKLogitsWarper(setting["top_k"]))
    if "top_p" in setting:
        processors.append(hf.TopPLogitsWarper(setting["top_p"]))
    ids: Any = torch.zeros(len(logits[0]), 1, dtype=torch.long, device=logits[0].device)

    def sample() -> Tensor:
        blended: Any = sum(
            w * z.float().log_softmax(-1) for w, z in zip(WEIGHTS, logits, strict=True)
        )
        return torch.multinomial(processors(ids, blended).softmax(-1), 1)

    return sample


def flashinfer(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor] | None:
    """FlashInfer's sampler on logits that torch blends; None if there is no FlashInfer or GPU."""
    if logits[0].device.type != "cuda" or util.find_spec("flashinfer") is None:
        return None
    from flashinfer import sampling

    def sample() -> Tensor:
        blended: Any = sum(w * z.float() for w, z in zip(WEIGHTS, logits, strict=True))
        if "top_k" in setting:
            return sampling.top_k_top_p_sampling_from_logits(
                blended, setting["top_k"], setting["top_p"]
            )
        if "top_p" in setting:
            return sampling.top_p_sampling_from_probs(blended.softmax(-1), setting["top_p"])
        return sampling.sampling_from_logits(blended)

    return sample


def contenders(case: Case, device: str) -> dict[str, list[Callable[[], Any]]]:
    """Calls of each contender, each over its own inputs: those of all calls exceed any cache."""
    sets = max(2, -(-COLD_BYTES // case.bytes))
    if device == "cuda":  # a graph holds the launches of all sets, and must stay small
        sets = min(sets, 64)
    dtype, setting = getattr(torch, case.dtype), SETTINGS[case.setting]
    generator = torch.Generator(device).manual_seed(0)
    calls: dict[str, list[Callable[[], Any]]] = {}
    # A graph replays the same launches, so that on a GPU the step is a tensor, as in a decoder.
    step = torch.zeros(case.batch, dtype=torch.int64, device=device) if device == "cuda" else 0
    for _ in range(sets):
        z = [
            (2 * torch.randn(case.batch, case.vocab, generator=generator, device=device)).to(dtype)
            for _ in WEIGHTS
        ]

        def ours(z: list[Tensor] = z, **kw: Any) -> Any:
            return ops.blend_sample(z, WEIGHTS, seed=0, step=step, **setting, **kw)

        ways: dict[str, Callable[[], Any] | None] = {
            "read": read_of(z, device),
            "ours": ours,
            "torch chain": chain(z, setting),
            "flashinfer": flashinfer(z, setting),
        }
        if device == "cuda":
            ways["ours, Triton"] = functools.partial(ours, backend="triton")
        for name, call in ways.items():
            if call is not None:
                calls.setdefault(name, []).append(call)
    return calls


def read_of(z: list[Tensor], device: str) -> Callable[[], Any]:
    """What no contender can be faster than: reading all inputs once.

    On a CPU they are summed up, on a GPU a copy moves as many bytes.
    """
    if device == "cpu":
        rows = [
            t.view(torch.float32) for t in z
        ]  # only bytes count: two bfloat16 are read as one float32
        return lambda: [r.sum() for r in rows]
    source = torch.cat([t.flatten() for t in z])
    half = source.numel() // 2  # a copy both reads and writes, so that half the inputs suffice
    target = torch.empty_like(source[:half])
    return lambda: target.copy_(source[:half])
