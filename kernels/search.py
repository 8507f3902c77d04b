"""What a search does between two chunks, in Triton: it keeps the best rows, and forks caches.

A slot's rank is the number of slots that beat it, so no program sorts. A program of a fork owns
some columns of a head in all rows. It reads what the rows become, waits for all its threads at a
barrier, and writes, so that no row is overwritten before its children have read it. Parents stay on
the device, as ranges of each row do; grids follow from shapes, and from a range that is two
numbers.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "width", "samples"])
def chunk_select(
    parents,  # [P, slots] int64
    scores,  # [P, slots] float32
    finished,  # [P, slots] bool
    slots,
    width,
    samples,
    BLOCK: tl.constexpr,
):
    """Ranks the slots of a prompt, and writes the parents that those it keeps are. Grid (P,
    ceil(slots / BLOCK))."""
    prompt = tl.program_id(0).to(tl.int64) * slots
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = slot < slots
    mine = tl.load(scores + prompt + slot, mask=valid, other=0.0)[:, None]
    ended = tl.load(finished + prompt + slot, mask=valid, other=0) != 0
    rank = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, slots, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        its = tl.load(scores + prompt + other, mask=other < slots, other=0.0)[None, :]
        tie = (its == mine) | ((its != its) & (mine != mine))
        beats = (its > mine) | ((its == its) & (mine != mine))
        beats |= tie & (other[None, :] < slot[:, None])
        rank += tl.sum((beats & (other < slots)[None, :]).to(tl.int32), axis=1)
    kept = valid & (rank < width)
    at = parents + prompt + rank * samples
    for n in range(samples):
        tl.store(at + n, tl.where(ended & (n > 0), -1, slot).to(tl.int64), mask=kept)


@triton.jit(do_not_specialize=["rows", "first", "last", "slabs"])
def fork_cache(
    cache,  # [R, heads, length, DIM], integers
    strides,  # of rows, heads and positions
    parents,  # [R] int64
    start,  # [R] int64, or None: the first position that a row takes
    end,  # [R] int64, or None: the one after the last
    rows,
    first,  # no row takes a position outside [first, last)
    last,
    slabs,  # how many blocks of BLOCK numbers the positions of a head have
    DIM: tl.constexpr,
    ROWS: tl.constexpr,  # rows, padded
    BLOCK: tl.constexpr,
):
    """Forks some columns of a head in all rows. Grid (heads slabs,)."""
    head, slab = tl.program_id(0) // slabs, tl.program_id(0) % slabs
    column = slab.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = first + column // DIM
    row = tl.arange(0, ROWS)
    parent = tl.load(parents + row, mask=row < rows, other=-1)
    moves = (parent >= 0) & (parent < rows) & (parent != row)
    inside = moves[:, None] & (position < last)[None, :]
    if start is not None:
        begin = tl.load(start + row, mask=moves, other=0)
        inside &= position[None, :] >= begin[:, None]
    if end is not None:
        stop = tl.load(end + row, mask=moves, other=0)
        inside &= position[None, :] < stop[:, None]
    at = cache + head.to(tl.int64) * strides[1] + position * strides[2] + column % DIM
    held = tl.load(at[None, :] + parent[:, None] * strides[0], mask=inside)
    tl.debug_barrier()
    tl.store(at[None, :] + row.to(tl.int64)[:, None] * strides[0], held, mask=inside)
