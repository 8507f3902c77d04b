"""Who takes part in search.py: crossfade's chunk beam search, and the official algorithm.

The official code of arXiv:2405.19262 has the base read the prompt on all rows and decode them with
its cache, which it reorders at every boundary. There both value models read every sequence from its
first token on, without a cache, and take a log-softmax of all their logits. Written out here in
plain torch, it is spared what it need not do: masks, truncation, logits of the prompt under the
base, caches of the value models, and the way from tokens to text and back. No row ends early.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import crossfade as cf
import numpy as np
import torch
from decode_peers import Wrong, last
from torch import Tensor
from transformers import DynamicCache

TEMPERATURE = 0.7
# Nats a token in float32, where products are sums of hundreds. For other dtypes it is 0.1.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Shape:
    """A search of `width` beams of `samples` rows, with a boundary each `chunk_length` tokens."""

    width: int
    samples: int
    chunk_length: int
    prompt: int
    new: int

    @property
    def rows(self) -> int:
        return self.width * self.samples

    @property
    def chunks(self) -> list[int]:
        return [min(self.chunk_length, self.new - t) for t in range(0, self.new, self.chunk_length)]


@dataclass(frozen=True)
class Found:
    """A search's best response, its value, and what it cost.

    Attributes:
        base_tokens, value_tokens: those that the base read, and both value models together.
        scoring: the part of the seconds that scoring took, where that can be told.
    """

    response: list[int]
    value: float
    seconds: float
    base_tokens: int
    value_tokens: int
    scoring: float | None = None
    cache_bytes: int | None = None
    notes: tuple[str, ...] = ()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def log_probs(model: Any, sequences: Tensor, prompt: int) -> Tensor:
    """The log-prob ``[rows]`` of what follows the first `prompt` tokens of each sequence."""
    logits = model(input_ids=sequences, use_cache=False).logits.float()
    each = logits.log_softmax(-1)[:, :-1].gather(2, sequences[:, 1:, None])
    return each[:, prompt - 1 :, 0].sum(-1)


def implicit_values(models: Sequence[Any], sequences: Tensor, prompt: int) -> Tensor:
    """log p_tuned - log p_ref of each response: ``[rows]``."""
    _, tuned, ref = models
    return log_probs(tuned, sequences, prompt) - log_probs(ref, sequences, prompt)


def parents_of(values: Tensor, shape: Shape) -> Tensor:
    """The row that each row becomes a copy of: each of the best `width`, `samples` times."""
    best = values.argsort(descending=True, stable=True)[: shape.width]
    return best.repeat_interleave(shape.samples)


def scored(boundaries: int, every: int) -> list[int]:
    """The boundaries that are timed: every so many, and the last one."""
    return sorted({*range(0, boundaries, every), boundaries - 1})


def summed_up(times: dict[int, float], boundaries: int) -> float:
    """The time of all boundaries, which is interpolated between those that were timed."""
    return float(np.interp(range(boundaries), list(times), list(times.values())).sum())


@torch.inference_mode()
def official(models: Sequence[Any], ids: Tensor, shape: Shape, every: int = 1) -> Found:
    """The official algorithm: `models` are base, tuned and reference, `ids` ``[1, prompt]``.

    It decodes every token. With `every` above 1 the value models score only so many boundaries; at
    the others the first rows are kept, and the time of scoring is interpolated.
    """
    start = now(ids.device)
    cache = DynamicCache(config=models[0].config)
    sequences = unread = ids.repeat(shape.rows, 1)
    base_tokens = value_tokens = 0
    times: dict[int, float] = {}
    for i, chunk in enumerate(shape.chunks):
        for _ in range(chunk):
            base_tokens += unread.numel()
            logits = last(models[0], unread, cache).float()
            unread = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)
            sequences = torch.cat([sequences, unread], dim=1)
        value_tokens += 2 * sequences.numel()
        values = torch.zeros(shape.rows, device=ids.device)
        if i in scored(len(shape.chunks), every):
            before = now(ids.device)
            values = implicit_values(models, sequences, shape.prompt)
            times[i] = now(ids.device) - before
        parents = parents_of(values, shape)
        sequences, unread = sequences[parents], unread[parents]
        cache.reorder_cache(parents)
    scoring = summed_up(times, len(shape.chunks))
    return Found(
        response=sequences[0, shape.prompt :].tolist(),
        value=values.max().item(),
        seconds=now(ids.device) - start - sum(times.values()) + scoring,
        base_tokens=base_tokens,
        value_tokens=value_tokens,
        scoring=scoring,
    )


def ours(models: Sequence[Any], ids: Tensor, shape: Shape, blended: bool = False) -> Found:
    """crossfade's search. `blended` decodes base + tuned - reference, whose terms score as well."""
    base, tuned, ref = map(cf.Model, models)
    start = now(ids.device)
    out = cf.generate(
        base + (tuned - ref) if blended else base,
        ids,
        attention_mask=torch.ones_like(ids),
        search=cf.ChunkBeamSearch(
            width=shape.width,
            samples=shape.samples,
            chunk_length=shape.chunk_length,
            value=cf.LogRatio(tuned, ref, beta=1.0),
        ),
        max_new_tokens=shape.new,
        do_sample=True,
        temperature=TEMPERATURE,
        seed=0,
    )
    seconds = now(ids.device) - start
    first, *others = out.stats.models
    return Found(
        response=out.responses[0],
        value=out.values[0].item(),
        seconds=seconds,
        base_tokens=first.tokens,
        value_tokens=sum(m.tokens for m in others),
        cache_bytes=out.stats.cache_bytes,
        notes=out.stats.notes,
    )


@torch.inference_mode()
def check(name: str, models: Sequence[Any], ids: Tensor, shape: Shape, found: Found) -> None:
    """Check that a response is whole and that both scorers give it the value that was found.

    Raises:
        Wrong: names the contender.
    """
    if len(found.response) != shape.new:
        raise Wrong(f"{name} wrote {len(found.response)} tokens of {shape.new}")
    sequence = torch.cat([ids, ids.new_tensor([found.response])], dim=1)
    tuned, ref = (
        cf.score(m, ids.tolist(), [found.response]).logprobs.sum().item() for m in models[1:]
    )
    truths = {
        "the official scorer": implicit_values(models, sequence, shape.prompt).item(),
        "crossfade.score": tuned - ref,
    }
    whole = models[0].dtype == torch.float32
    tolerance = max(1e-3, TOLERANCE * shape.new) if whole else 0.1 * shape.new**0.5
    for scorer, truth in truths.items():
        if not abs(found.value - truth) <= tolerance:
            raise Wrong(f"{name}: the best row's value is {found.value}, by {scorer} {truth}")
