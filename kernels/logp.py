"""What `linear_logp` does to a tile of logits between two products, in Triton.

`LogpTile`, `LogpSums`, `LogpMoments` and `LogpGradient` of csrc/crossfade.h say what is computed. A
program of the forward pass holds its row of the tile in registers, so that it reads each logit
once. It computes in float32. Tiles come one after the other, and each adds to the sums of its rows.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """tanh x with a relative error of 3e-7. Near 0 it is the series of Cephes; NaN stays NaN."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, tl.where(x < 0.0, -far, far))


@triton.jit
def load_logits(scores, bias, row, columns, c, softcap, temperature, SOFTCAP: tl.constexpr):
    """A row's logits in columns `c`, -inf past the end, and dz/dx * temperature."""
    inside = c < columns
    x = tl.load(scores + row * columns + c, mask=inside, other=NEG_INF)
    if bias is not None:
        x += tl.load(bias + c, mask=inside, other=0.0)
    slope = 1.0
    if SOFTCAP:
        t = tanh(x / softcap)
        x = t * softcap
        slope = 1.0 - t * t
    return tl.where(inside, x / temperature, NEG_INF), slope


@triton.jit(do_not_specialize=["first"])
def logp_forward(
    scores,  # [R, columns] float32: hidden weight^T
    operand,  # [R, columns]: gets exp(z - max) dz/dx temperature, if there are moments
    second_operand,  # [R, columns]: gets that times (z - max)
    sums,  # [R, 4]: max, sum of exp(z - max), sum of that times (z - max), target's z
    first_moment,  # [R, size] float32, or None: the sum of the tiles before
    second_moment,  # [R, size] float32, or None
    bias,  # [columns] float32, or None
    targets,  # [R] int64
    first,  # the token of the vocabulary that the first column is
    columns,
    size,
    softcap,
    temperature,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,  # columns, padded
    SIZE_BLOCK: tl.constexpr,
):
    """Adds a tile to the sums of its rows. Grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    z, slope = load_logits(scores, bias, row, columns, c, softcap, temperature, SOFTCAP)
    sums += row * 4
    top = tl.load(sums).to(tl.float32)
    total = tl.load(sums + 1).to(tl.float32)
    weighted = tl.load(sums + 2).to(tl.float32)

    bad = tl.max(tl.where(z < float("inf"), 0, 1)) > 0  # NaN or +inf
    most = tl.maximum(top, tl.max(tl.where(z == z, z, NEG_INF)))
    ref = tl.where(most == NEG_INF, 0.0, most)  # -inf - (-inf) would be NaN
    step = tl.where(top == NEG_INF, 0.0, top - ref)
    factor = tl.exp(top - ref)
    x = z - ref
    p = tl.exp(x)
    x = tl.where(z == NEG_INF, 0.0, x)
    new_weighted = (weighted + step * total) * factor + tl.sum(p * x)
    new_total = total * factor + tl.sum(p)
    at = tl.load(targets + row) - first
    here = (at >= 0) & (at < columns)
    its = tl.sum(tl.where(c == tl.where(here, at, -1), z, 0.0))

    if first_moment is not None:
        p = tl.where(bad, float("nan"), p * slope)
        place = row * columns + c
        tl.store(operand + place, p.to(operand.dtype.element_ty), mask=inside)
        if second_moment is not None:
            q = (p * x).to(second_operand.dtype.element_ty)
            tl.store(second_operand + place, q, mask=inside)
        if (most > top) & (top > NEG_INF):  # few tiles raise a row's maximum
            for begin in range(0, size, SIZE_BLOCK):
                i = begin + tl.arange(0, SIZE_BLOCK)
                held = first_moment + row * size + i
                m = tl.load(held, mask=i < size)
                tl.store(held, m * factor, mask=i < size)
                if second_moment is not None:
                    held = second_moment + row * size + i
                    n = tl.load(held, mask=i < size)
                    tl.store(held, (n + step * m) * factor, mask=i < size)

    tl.debug_barrier()  # no thread stores the sums before all have loaded them
    kind = sums.dtype.element_ty
    tl.store(sums, most.to(kind))
    tl.store(sums + 1, tl.where(bad, float("nan"), new_total).to(kind))
    tl.store(sums + 2, new_weighted.to(kind))
    tl.store(sums + 3, its.to(kind), mask=here)


@triton.jit(do_not_specialize=["first"])
def logp_backward(
    scores,  # [R, columns] float32: hidden weight^T
    operand,  # [R, columns]: gets d loss / dx
    of_logits,  # [R, 5] float32: max, log_total, pick, share, tilt
    bias,
    targets,
    first,
    columns,
    softcap,
    temperature,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns a tile into its gradient. Grid (R, ceil(columns / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_logits += row * 5
    top, log_total = tl.load(of_logits), tl.load(of_logits + 1)
    pick, share = tl.load(of_logits + 2), tl.load(of_logits + 3)
    tilt = tl.load(of_logits + 4)
    without = (pick == 0.0) & (share == 0.0) & (tilt == 0.0)
    z, slope = load_logits(scores, bias, row, columns, c, softcap, temperature, SOFTCAP)
    log_p = (z - top) - log_total
    p = tl.exp(log_p)
    log_p = tl.where(log_p == NEG_INF, 0.0, log_p)
    at = tl.load(targets + row) - first
    grad = (p * (share - tilt * log_p) + tl.where(c == at, pick, 0.0)) * slope
    grad = tl.where(without, 0.0, grad)
    tl.store(operand + row * columns + c, grad.to(operand.dtype.element_ty), mask=c < columns)
