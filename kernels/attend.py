"""Attention to caches in Triton, which also appends to them.

A program takes a kv head of a row with all query heads that share it, a tile of the new tokens and
a split of the cache's slots. The grid follows from shapes alone, so that a CUDA graph can hold it;
a program whose split lies past its row's length returns at once. New tokens are read from the
arguments, never from the cache: the one program that has both a token and its slot writes it there.
Splits leave partial results, which `combine` puts together in the order of the splits.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028235e38)  # below all scores, and finite, so that differences are


@triton.jit
def slots_seen(length, first, last, window, capacity):
    """The slots [begin, end) that the new tokens [first, last] of a row see."""
    end = tl.minimum(length + last + 1, capacity)
    begin = tl.where(window > 0, tl.maximum(length + first + 1 - window, 0), 0)
    return tl.minimum(begin, end), end


@triton.jit
def length_of(lengths, b, capacity):
    return tl.minimum(tl.maximum(tl.load(lengths + b), 0), capacity).to(tl.int32)


@triton.jit
def load_slots(cache, slot_stride, new, token_stride, slot, length, end, d, size):
    """Slots [BLOCK, D]: old ones from the cache, new ones from new tokens, zeros from `end` on."""
    inside = (slot < end)[:, None] & (d < size)[None, :]
    is_old = (slot < length)[:, None]
    token = tl.maximum(slot - length, 0)
    at_old = cache + slot.to(tl.int64)[:, None] * slot_stride + d[None, :]
    at_new = new + token.to(tl.int64)[:, None] * token_stride + d[None, :]
    old = tl.load(at_old, mask=inside & is_old, other=0.0)
    return tl.where(is_old, old, tl.load(at_new, mask=inside & ~is_old, other=0.0))


@triton.jit
def product(a, b, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def store_slots(cache, slot_stride, slot, mine, d, size, x):
    at = cache + slot.to(tl.int64)[:, None] * slot_stride + d[None, :]
    tl.store(at, x, mask=mine[:, None] & (d < size)[None, :])


@triton.jit
def store_result(
    out, acc, total, b, h, token, tokens, r, value_size, dv, KV_HEADS, GROUP: tl.constexpr, valid
):
    """Writes the results of query rows to out [B, n, Hq, Dv]."""
    head = h * GROUP + r % GROUP
    row = (b.to(tl.int64) * tokens + token) * (KV_HEADS * GROUP) + head
    at = out + row[:, None] * value_size + dv[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(at, result, mask=valid[:, None] & (dv < value_size)[None, :])


@triton.jit(do_not_specialize=["window", "tokens", "capacity"])
def attend_splits(
    out,  # [B, n, Hq, Dv]
    partials,  # [B, Hkv, splits, ROWS, DV] float32, or None where there is one split
    stats,  # [B, Hkv, splits, 2, ROWS] float32: the largest score, the sum of exponentials below it
    query,  # [B, Hq, n, D]
    query_strides,  # of rows, heads and tokens, as those of all tensors here
    key,  # [B, Hkv, n, D]
    key_strides,
    value,  # [B, Hkv, n, Dv]
    value_strides,
    keys,  # [S, Hkv, C, D]
    keys_strides,
    values,  # [S, Hkv, C, Dv]
    values_strides,
    lengths,  # [B] int64
    rows,  # [B] int64, or None
    scale,
    softcap,
    window,
    tokens,
    capacity,
    size,
    value_size,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a kv head
    TILE: tl.constexpr,  # tokens of a tile
    SPLIT: tl.constexpr,  # slots of a split, a multiple of BLOCK; 0: one split has all slots
    ROWS: tl.constexpr,  # at least GROUP TILE, for tl.dot
    BLOCK: tl.constexpr,
    D: tl.constexpr,  # size and value_size, padded
    DV: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32, as the interpreter cannot in bfloat16
):
    """Attends to a split, and appends the new tokens whose slots are in it. Grid (B Hkv, tiles,
    splits)."""
    pair, split = tl.program_id(0), tl.program_id(2)
    b, h = pair // KV_HEADS, pair % KV_HEADS
    first = tl.program_id(1) * TILE
    last = tl.minimum(first + TILE, tokens) - 1
    length = length_of(lengths, b, capacity)
    begin, end = slots_seen(length, first, last, window, capacity)
    begin = begin // BLOCK * BLOCK
    if SPLIT > 0:
        begin = tl.maximum(begin, split * SPLIT)
        end = tl.minimum(end, (split + 1) * SPLIT)
        if begin >= end:
            return

    r, d, dv = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, DV)
    token = first + r // GROUP
    valid = (r < GROUP * TILE) & (token < tokens)
    position = length + token
    row = tl.load(rows + b) if rows is not None else b.to(tl.int64)
    query += b.to(tl.int64) * query_strides[0] + h * GROUP * query_strides[1]
    at = (r % GROUP).to(tl.int64) * query_strides[1] + token.to(tl.int64) * query_strides[2]
    asked = valid[:, None] & (d < size)[None, :]
    q = tl.load(query + at[:, None] + d[None, :], mask=asked, other=0.0)
    key += b.to(tl.int64) * key_strides[0] + h * key_strides[1]
    value += b.to(tl.int64) * value_strides[0] + h * value_strides[1]
    keys += row * keys_strides[0] + h * keys_strides[1]
    values += row * values_strides[0] + h * values_strides[1]

    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV], tl.float32)
    for start in range(begin, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mine = (slot >= length + first) & (slot <= length + last) & (slot < end)
        k = load_slots(keys, keys_strides[2], key, key_strides[2], slot, length, end, d, size)
        store_slots(keys, keys_strides[2], slot, mine, d, size, k)
        score = product(q, tl.trans(k), WIDEN) * scale
        if SOFTCAP:  # softcap tanh(score / softcap)
            e = tl.exp(tl.minimum(score * (2.0 / softcap), 60.0))
            capped = softcap - 2.0 * softcap / (e + 1.0)
            score = tl.where(score == score, capped, score)  # tl.minimum loses a NaN
        seen = (slot[None, :] <= position[:, None]) & (slot < end)[None, :]
        seen &= (window == 0) | (slot[None, :] > position[:, None] - window)
        score = tl.where(seen, score, LOWEST)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp(top - new_top)
        p = tl.where(seen, tl.exp(score - new_top[:, None]), 0.0)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_slots(
            values, values_strides[2], value, value_strides[2], slot, length, end, dv, value_size
        )
        store_slots(values, values_strides[2], slot, mine, dv, value_size, v)
        acc = acc * shrink[:, None] + product(p.to(v.dtype), v, WIDEN)
        top = new_top

    if partials is None:
        store_result(
            out, acc, total, b, h, token, tokens, r, value_size, dv, KV_HEADS, GROUP, valid
        )
    else:
        here = pair.to(tl.int64) * tl.num_programs(2) + split
        tl.store(partials + (here * ROWS + r)[:, None] * DV + dv[None, :], acc)
        tl.store(stats + here * (2 * ROWS) + r, top)
        tl.store(stats + here * (2 * ROWS) + ROWS + r, total)


@triton.jit(do_not_specialize=["window", "tokens", "capacity", "splits"])
def combine(
    out,
    partials,
    stats,
    lengths,
    window,
    tokens,
    capacity,
    splits,
    value_size,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
):
    """Puts together the partial results of the splits that a row reaches. Grid (B Hkv,)."""
    pair = tl.program_id(0)
    b, h = pair // KV_HEADS, pair % KV_HEADS
    length = length_of(lengths, b, capacity)
    begin, end = slots_seen(length, 0, tokens - 1, window, capacity)
    r, dv = tl.arange(0, ROWS), tl.arange(0, DV)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV], tl.float32)
    for split in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
        here = pair.to(tl.int64) * splits + split
        its_top = tl.load(stats + here * (2 * ROWS) + r)
        new_top = tl.maximum(top, its_top)
        shrink, grow = tl.exp(top - new_top), tl.exp(its_top - new_top)
        total = total * shrink + tl.load(stats + here * (2 * ROWS) + ROWS + r) * grow
        its = tl.load(partials + (here * ROWS + r)[:, None] * DV + dv[None, :])
        acc = acc * shrink[:, None] + its * grow[:, None]
        top = new_top
    token = r // GROUP
    store_result(
        out, acc, total, b, h, token, tokens, r, value_size, dv, KV_HEADS, GROUP, token < tokens
    )
