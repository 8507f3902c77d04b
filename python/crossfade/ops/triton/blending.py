"""Launches the Triton kernels of `kernels/`; arguments are checked ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossfade.kernels import blend_sample as kernels
from crossfade.kernels.terms import support_threshold, term_tiles

from .. import check, memory
from ..types import BlendSample, Draw, Inputs

SEARCH_BLOCK = 2048  # tokens a pass of a threshold search takes at a time


@dataclass(frozen=True)
class Tiles:
    """A blend's tiles, as `kernels.blend_tiles` left them."""

    partials: Tensor  # [PLANES, B, count]
    term_partials: Tensor | None  # [2 K, B, count]
    count: int
    block: int

    @property
    def padded(self) -> int:
        return 1 << (self.count - 1).bit_length()


def blend(inputs: Inputs) -> Tensor:
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    scores = floats(device, rows, vocab)
    if rows == 0:
        return scores
    with torch.accelerator.device_index(device.index):
        tiles = blend_tiles(inputs, scores=scores)
        kernels.normalise[rows, tiles.count](
            scores, tiles.partials, rows, vocab, tiles.count, BLOCK=tiles.block, TILES=tiles.padded
        )
    return scores


def blend_sample(inputs: Inputs, draw: Draw, return_term_logprobs: bool) -> BlendSample:
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    out = BlendSample(
        torch.empty(rows, dtype=torch.int64, device=device),
        floats(device, rows),
        floats(device, rows),
        floats(device, rows, len(inputs.logits)) if return_term_logprobs else None,
    )
    if rows == 0:
        return out
    off = (draw.top_k, 0), (draw.top_p, 1), (draw.min_p, 0)
    truncate = draw.do_sample and any(isinstance(x, Tensor) or x != none for x, none in off)
    noise = (*words(draw.seed), *words(draw.stream), words(draw.step)[0])
    temperature, top_p, min_p = (
        x if isinstance(x, Tensor) else float(x) for x in (draw.temperature, draw.top_p, draw.min_p)
    )
    top_k = draw.top_k if isinstance(draw.top_k, Tensor) else min(draw.top_k, vocab)

    with torch.accelerator.device_index(device.index):
        scores = floats(device, rows, vocab) if truncate else None
        tiles = blend_tiles(
            inputs,
            scores=scores,
            term_stats=return_term_logprobs,
            temperature=temperature,
            noise=noise,
            PICK=not truncate,
            SAMPLE=draw.do_sample and not truncate,
        )
        kernels.choose[rows,](
            *out,
            tiles.partials,
            scores,
            tiles.term_partials if return_term_logprobs else None,
            tuple(inputs.logits),
            strides_of(inputs.logits),
            temperature,
            top_k,
            top_p,
            min_p,
            *noise,
            rows,
            vocab,
            tiles.count,
            SAMPLE=draw.do_sample,
            TRUNCATE=truncate,
            TILES=tiles.padded,
            **(search_sizes(vocab) if truncate else {"BLOCKS": 1, "BLOCK": tiles.block}),
        )
    return out


def blend_tiles(
    inputs: Inputs,
    *,
    scores: Tensor | None,
    term_stats: bool = False,
    temperature: float | Tensor = 1.0,
    noise: Sequence[Tensor | int] = (0, 0, 0, 0, 0),
    PICK: bool = False,
    SAMPLE: bool = False,
) -> Tiles:
    logits, values, power = inputs.logits, inputs.values, inputs.power
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    support, mask = inputs.support, inputs.mask
    memory.require(logits=logits, values=values)
    check.columns("logits", logits)
    check.columns("values", values)
    block, num_warps = tile_size(rows, vocab)
    count = -(-vocab // block)
    tiles = Tiles(
        floats(device, kernels.PLANES, rows, count),
        floats(device, 2 * len(logits), rows, count) if term_stats or power else None,
        count,
        block,
    )
    terms, strides = tuple(logits), strides_of(logits)
    if power:
        term_tiles[rows, count](
            tiles.term_partials, terms, strides, rows, vocab, count, BLOCK=block
        )
    supported: tuple[Tensor | int | None, ...] = None, None, None
    if support is not None:
        z, thresholds = logits[support.term], floats(device, rows)
        supported = z, z.stride(0), thresholds
        top_k = min(support.top_k, vocab)
        support_threshold[rows,](
            *supported,
            vocab,
            top_k,
            float(support.top_p),
            float(support.min_p),
            **search_sizes(vocab),
        )
    kernels.blend_tiles[rows, count](
        tiles.partials,
        scores,
        tiles.term_partials,
        terms,
        strides,
        *weights_of(inputs.weights),
        *((tuple(values), strides_of(values)) if values else (None, None)),
        *weights_of(inputs.value_weights),
        mask,
        mask.stride(0) if mask is not None and mask.dim() == 2 else 0,
        *supported,
        power,
        temperature,
        *noise,
        rows,
        vocab,
        count,
        MEAN=power != 0,
        PICK=PICK,
        SAMPLE=SAMPLE,
        BLOCK=block,
        TILES=tiles.padded,
        num_warps=num_warps,
    )
    return tiles


def floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def tile_size(rows: int, vocab: int) -> tuple[int, int]:
    """Tokens and warps of a tile: large ones, unless these are too few to fill a GPU."""
    return (4096, 8) if rows * vocab >= 2**20 else (1024, 4)


def search_sizes(vocab: int) -> dict[str, int]:
    """The sizes of a program that searches a whole row: it has many warps."""
    return {"BLOCKS": -(-vocab // SEARCH_BLOCK), "BLOCK": SEARCH_BLOCK, "num_warps": 16}


def strides_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.stride(0) for t in tensors)


def weights_of(weights: Sequence[float] | Tensor) -> tuple[Any, int | None]:
    """A kernel's `weights` and `weight_stride`: numbers, or a tensor and its row stride."""
    if isinstance(weights, Tensor):
        return weights, weights.stride(0) if weights.dim() == 2 else 0
    return tuple(float(w) for w in weights), None


def words(x: int | Tensor) -> tuple[Tensor | int, int]:
    """A kernel's 64-bit setting: a tensor, or two int32 words, so that its type never varies."""
    if isinstance(x, Tensor):
        return x, 0
    low, high = x & 0xFFFFFFFF, x >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
