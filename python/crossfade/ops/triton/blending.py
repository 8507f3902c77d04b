"""Launches the Triton kernels of `kernels/`; arguments are checked ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossfade.kernels import blend_sample as kernels
from crossfade.kernels.terms import Blend, support_threshold, term_tiles

from .. import check, memory
from ..noise import GROUP
from ..types import BlendSample, Draw, Inputs, ShardDraw

MOST_AT_ONCE = 1024
MOST_PROGRAMS = 2**15  # on the second axis of a grid
SEARCH = {"BLOCK": 2048, "num_warps": 16}  # the tokens that a search takes at once, and its warps


@dataclass(frozen=True)
class Tiles:
    """A blend's tiles, as `kernels.blend_tiles` left them, and what it was launched with."""

    blend: Blend
    partials: Tensor  # [PLANES, B, groups]
    term_partials: Tensor | None  # [2 K, B, count]
    grid: tuple[int, int, int]
    count: int
    groups: int
    block: int


def blend(inputs: Inputs, raw: bool = False) -> Tensor:
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    scores = floats(device, rows, vocab)
    if rows == 0:
        return scores
    with torch.accelerator.device_index(device.index):
        block, _ = tile_size(rows, vocab)
        tiles = blend_tiles(inputs, scores=scores, group=block)
        kernels.normalise[tiles.grid](
            scores,
            tiles.partials,
            rows,
            vocab,
            tiles.count,
            RAW=raw,
            BLOCK=tiles.block,
            TILES=chunk_of(tiles.count),
        )
    return scores


def blend_sample(
    inputs: Inputs, draw: Draw, return_term_logprobs: bool, return_pushes: bool
) -> BlendSample:
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    terms, both = len(inputs.logits), len(inputs.logits) + len(inputs.values)
    out = BlendSample(
        torch.empty(rows, dtype=torch.int64, device=device),
        floats(device, rows),
        floats(device, rows),
        floats(device, rows, terms) if return_term_logprobs else None,
        floats(device, rows, both) if return_pushes else None,
    )
    if rows == 0:
        return out
    with torch.accelerator.device_index(device.index):
        tiles = choose(inputs, draw, out[:4])
        if out.pushes is not None:
            of_tiles = floats(device, rows, both, tiles.count)
            kernels.push_tiles[tiles.grid](
                of_tiles,
                out.tokens,
                tiles.partials,
                tiles.blend,
                rows,
                vocab,
                tiles.count,
                tiles.groups,
                BLOCK=tiles.block,
                CHUNK=chunk_of(tiles.groups),
                TILES=chunk_of(tiles.count),
            )
            torch.sum(of_tiles, dim=-1, out=out.pushes)
    return out


def draw_shard(inputs: Inputs, draw: Draw) -> ShardDraw:
    rows, device = inputs.rows, inputs.device
    out = ShardDraw(
        torch.empty(rows, dtype=torch.int64, device=device),
        floats(device, rows, kernels.FACTS.value),
    )
    if rows > 0:
        with torch.accelerator.device_index(device.index):
            choose(inputs, draw, (out.tokens, None, None, None), out.facts)
    return out


def choose(
    inputs: Inputs, draw: Draw, out: Sequence[Tensor | None], facts: Tensor | None = None
) -> Tiles:
    """Fills `out`, the first four of `kernels.choose`; or with the `facts` of a shard the first."""
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    off = (draw.top_k, 0), (draw.top_p, 1), (draw.min_p, 0)
    truncate = draw.do_sample and any(isinstance(x, Tensor) or x != none for x, none in off)
    noise = (*words(draw.seed), *words(draw.stream), words(draw.step)[0])
    temperature, top_p, min_p = (
        x if isinstance(x, Tensor) else float(x) for x in (draw.temperature, draw.top_p, draw.min_p)
    )
    top_k = draw.top_k if isinstance(draw.top_k, Tensor) else min(draw.top_k, vocab)

    scores = floats(device, rows, vocab) if truncate else None
    tiles = blend_tiles(
        inputs,
        scores=scores,
        term_stats=out[3] is not None,
        temperature=temperature,
        SAMPLE=draw.do_sample and not truncate,
    )
    kernels.choose[rows,](
        *out,
        facts,
        tiles.partials,
        scores,
        integers(device, rows, tiles.groups) if truncate else None,
        tiles.term_partials,
        tiles.blend,
        temperature,
        top_k,
        top_p,
        min_p,
        *noise,
        draw.first_token,
        rows,
        vocab,
        tiles.count,
        tiles.groups,
        MEAN=inputs.power != 0,
        NORMED=normalises(inputs),
        SAMPLE=draw.do_sample,
        TRUNCATE=truncate,
        GROUP=GROUP,
        CHUNK=chunk_of(tiles.groups),
        TILES=chunk_of(tiles.count),
        **(SEARCH if truncate else {"BLOCK": GROUP, "num_warps": 8}),
    )
    return tiles


def blend_tiles(
    inputs: Inputs,
    *,
    scores: Tensor | None,
    term_stats: bool = False,
    temperature: float | Tensor = 1.0,
    group: int = GROUP,
    SAMPLE: bool = False,
) -> Tiles:
    logits, values, power = inputs.logits, inputs.values, inputs.power
    rows, vocab, device = inputs.rows, inputs.vocab_size, inputs.device
    support, mask = inputs.support, inputs.mask
    memory.require(logits=logits, values=values)
    check.columns("logits", logits)
    check.columns("values", values)
    supported: tuple[Any, Any, Any] = None, None, None
    if support is not None:
        z, thresholds = logits[support.term], floats(device, rows)
        supported = z, z.stride(0), thresholds
        top_k, parts = min(support.top_k, vocab), -(-vocab // GROUP)
        support_threshold[rows,](
            *supported,
            floats(device, rows, parts),
            integers(device, rows, parts),
            vocab,
            parts,
            top_k,
            float(support.top_p),
            float(support.min_p),
            GROUP=GROUP,
            CHUNK=chunk_of(parts),
            **SEARCH,
        )
    block, num_warps = tile_size(rows, vocab)
    splits = -(-vocab // (block * MOST_PROGRAMS))
    count = -(-vocab // (block * splits)) * splits
    groups = count * (block // group)
    added: tuple[Any, Any, Any, Any] = None, None, None, None
    if values:
        added = tuple(values), strides_of(values), *weights_of(inputs.value_weights)
    joined: tuple[Any, Any, Any] = None, None, None
    if inputs.parts:
        flat = tuple(float(x) for part in inputs.parts for x in part)
        joined = flat, *weights_of(inputs.part_weights)
    normed = normalises(inputs)
    reads_terms = inputs.log_z is None and (normed or term_stats)
    tiles = Tiles(
        Blend(
            tuple(logits),
            strides_of(logits),
            *weights_of(inputs.weights),
            *added,
            mask,
            mask.stride(0) if mask is not None and mask.dim() == 2 else 0,
            *supported,
            power,
            *joined,
            inputs.log_z,
        ),
        floats(device, kernels.PLANES, rows, groups),
        floats(device, 2 * len(logits), rows, count) if reads_terms else None,
        (rows, count // splits, splits),
        count,
        groups,
        block,
    )
    if normed and reads_terms:
        terms, strides = tiles.blend.terms, tiles.blend.strides
        term_tiles[tiles.grid](tiles.term_partials, terms, strides, rows, vocab, count, BLOCK=block)
    kernels.blend_tiles[tiles.grid](
        tiles.partials,
        scores,
        tiles.term_partials,
        tiles.blend,
        temperature,
        rows,
        vocab,
        count,
        MEAN=power != 0,
        NORMED=normed,
        SAMPLE=SAMPLE,
        GROUP=group,
        BLOCK=block,
        TILES=chunk_of(count),
        num_warps=num_warps,
    )
    return tiles


def normalises(inputs: Inputs) -> bool:
    """Whether a blend takes the normalisers of its terms."""
    return inputs.power != 0 or bool(inputs.parts)


def floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def integers(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def tile_size(rows: int, vocab: int) -> tuple[int, int]:
    """Tokens and warps of a tile: large ones, unless these are too few to fill a GPU."""
    return (4096, 8) if rows * vocab >= 2**20 else (1024, 4)


def chunk_of(count: int) -> int:
    """How many of a row's groups or tiles a program takes at once: noise comes in fours."""
    return min(MOST_AT_ONCE, max(4, 1 << (count - 1).bit_length()))


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
