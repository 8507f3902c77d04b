"""Linear layers of 8 and 4 bits: the layout, the rounding, and the kernel against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, INF, NAN, normal
from crossfade.ops import Lora, Packed, linear, native, packed
from torch import Tensor

BITS = [8, 4]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# in, out, group: less than a block, primes, whole blocks, one more
SHAPES = [(16, 1, 16), (32, 16, 32), (96, 17, 32), (256, 13, 256), (192, 47, 64)]

needs_kernel = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)


def weight_of(inner: int, out: int, bits: int, group: int, minima: bool = False) -> Packed:
    """Random numbers of all values and scales that float16 holds."""
    generator = torch.Generator().manual_seed(inner + out)
    numbers = torch.randint(0, 2**bits, (out, inner), generator=generator).to(torch.uint8)
    scales = normal(out, inner // group, 3, scale=0.1).half()
    low = normal(out, inner // group, 4, scale=0.1).half() if minima else None
    return packed.pack(numbers, scales, low, bits)


def exact(w: Packed) -> Tensor:
    """The weight [out, in] in float64, number by number, as csrc/crossfade.h says."""
    n, k = torch.arange(w.out)[:, None], torch.arange(w.inner)
    block, column, g = n // 16, n % 16, k // w.group
    if w.bits == 8:
        number = w.numbers[block, k // 4, 4 * column + k % 4].int()
    else:
        byte = w.numbers[block, k // 8, 4 * column + k % 4].int()
        number = torch.where(k % 8 >= 4, byte >> 4, byte & 15)
    scale = w.scales[block, g, column].double()
    if w.minima is None:
        return scale * (number - 2 ** (w.bits - 1))
    return scale * number + w.minima[block, g, column].double()


def whole(rows: int, inner: int, group: int, dtype: torch.dtype) -> Tensor:
    """x that 8 bits hold exactly: whole numbers up to 127, which is in each group."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, inner), generator=generator).double()
    x[:, ::group] = 127.0
    return (x * 2.0 ** -(torch.arange(rows)[:, None] % 5)).to(dtype)


def assert_close(got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype
    allowed = 3 * 2.0**-23 * size + ROUNDING[dtype] * want.abs() + 2.0**-24
    error = (got.double() - want).abs()
    assert bool((error <= allowed).all()), f"off by {(error / allowed).max():.3g} times the bound"


@pytest.mark.parametrize(("bits", "minima"), [(8, False), (4, False), (4, True)])
def test_layout(bits: int, minima: bool) -> None:
    for inner, out, group in SHAPES:
        w = weight_of(inner, out, bits, group, minima)
        assert (w.inner, w.group, w.out) == (inner, group, out)
        torch.testing.assert_close(w.dequantized(torch.float64), exact(w), rtol=1e-6, atol=1e-7)
        again = packed.pack(*w.unpacked(), bits)
        assert all(a is b or torch.equal(a, b) for a, b in zip(w[:3], again[:3], strict=True))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "minima"), [(8, False), (4, False), (4, True)])
def test_kernel(bits: int, minima: bool, dtype: torch.dtype) -> None:
    for inner, out, group in SHAPES:
        w = weight_of(inner, out, bits, group, minima)
        bias = normal(1, out, 3, dtype=dtype)[0]
        for rows in (1, 2, 8, 19):
            x = whole(rows, inner, group, dtype)
            want = x.double() @ exact(w).T
            size = x.double().abs() @ exact(w).abs().T * (3 if minima else 1)
            assert_close(linear(x, w, backend="native"), want, size, dtype)
            got = linear(x, w, bias, backend="native")
            assert_close(got, want + bias.double(), size + bias.double().abs(), dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_kernel_deltas(bits: int, dtype: torch.dtype) -> None:
    for rows, inner, out, rank in ((1, 32, 5, 8), (9, 96, 35, 21)):
        w, x = weight_of(inner, out, bits, 32), whole(rows, inner, 32, dtype)
        a, b = normal(rank, inner, 4, dtype=dtype), normal(out, rank, 5, dtype=dtype)
        scale = torch.zeros(rows, rank)
        scale[1::2] = 0.5
        got = linear(x, w, lora=Lora(a, b, scale), backend="native")
        low, up, wide = x.double() @ a.double().T * scale.double(), b.double(), x.double()
        want = wide @ exact(w).T + low @ up.T
        size = wide.abs() @ exact(w).abs().T
        size += (wide.abs() @ a.double().abs().T * scale.double()) @ up.abs().T
        assert_close(got, want, size, dtype)
        assert torch.equal(got[0], linear(x, w, backend="native")[0]), "a row without an adapter"


@needs_kernel
@pytest.mark.parametrize("bits", BITS)
def test_kernel_rounds_x(bits: int) -> None:
    """Each number of x is off by half a step at most, as a step is the largest one / 127."""
    w = weight_of(96, 17, bits, 32)
    for dtype in DTYPES:
        x = normal(7, 96, 1, scale=3.0, dtype=dtype)
        got = linear(x, w, backend="native").double()
        step = x.double().view(7, 3, 32).abs().amax(-1, keepdim=True) / 127
        off = (step.expand(7, 3, 32).reshape(7, 96) * 0.5001) @ exact(w).abs().T
        want = x.double() @ exact(w).T
        assert bool(((got - want).abs() <= off + 2 * ROUNDING[dtype] * want.abs()).all())
        assert not torch.equal(got, want)


@needs_kernel
@pytest.mark.parametrize("bits", BITS)
def test_kernel_rows_alone(bits: int) -> None:
    """A row depends neither on the others nor on the number of threads, to the bit."""
    w, x = weight_of(192, 247, bits, 32), normal(21, 192, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(x, w, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])
    for i in (0, 8, 20):
        assert torch.equal(linear(x[i : i + 1], w, backend="native")[0], results[0][i])
    strided = torch.cat((x, x + NAN), dim=1)[:, :192]
    assert torch.equal(linear(strided, w, backend="native"), results[0])


@needs_kernel
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_kernel_not_finite(value: float) -> None:
    w, x = weight_of(96, 17, 8, 32), normal(3, 96, 1)
    want = linear(x, w, backend="native")
    x[1, 40] = value
    got = linear(x, w, backend="native")
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert torch.equal(linear(torch.zeros(1, 96), w, backend="native"), torch.zeros(1, 17))


def test_gradient_and_compilation() -> None:
    w, x = weight_of(32, 5, 4, 32), normal(3, 32, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, w).sum(), x)
    torch.testing.assert_close(gradient[0], w.dequantized().sum(0))
    with torch.no_grad():
        compiled = torch.compile(lambda x: linear(x, w), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), linear(x, w), rtol=0, atol=0)
        near = linear(x, w, backend="reference")
    torch.testing.assert_close(compiled(x.detach()), near, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("bits", BITS)
def test_quantize(bits: int, group: int) -> None:
    """Every number is within half a step; with 4 bits, positive ones near the top are cut off."""
    weight = normal(37, 256, 1, scale=0.3)
    weight[3, :group] = 0.0
    w = packed.quantize(weight, bits, group)
    assert (w.bits, w.group) == (bits, group)
    most = weight.view(37, -1, group).abs().amax(-1, keepdim=True).expand(37, 256 // group, group)
    step = most.reshape(37, 256) / (127 if bits == 8 else 8)
    off = (w.dequantized() - weight).abs()
    assert bool((off <= step * (0.51 + (0.08 if bits == 8 else 0.5))).all())
    assert bool((off <= step * 0.57).float().mean() > 0.97)
    assert torch.equal(w.dequantized()[3, :group], torch.zeros(group))
    again = packed.quantize(w.dequantized(), bits, group)
    torch.testing.assert_close(again.dequantized(), w.dequantized(), rtol=2e-3, atol=1e-5)


GOOD = weight_of(64, 5, 4, 32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: packed.quantize(torch.ones(2, 32), 5), ValueError, "bits is 5; it must be 4 or 8"),
        (lambda: packed.quantize(torch.ones(2, 32), 4, 24), ValueError, "group is 24"),
        (lambda: packed.quantize(torch.ones(2, 48), 4, 32), ValueError, "group 32 divides in"),
        (lambda: packed.quantize(torch.ones(2, 32).int(), 4), TypeError, "dtype torch.int32"),
        (lambda: packed.quantize(torch.ones(2, 32) * INF, 8), ValueError, "infinite"),
        (lambda: packed.quantize(torch.ones(2, 32) * 1e9, 8), ValueError, "float16 does not hold"),
        (lambda: packed.quantize(torch.ones(2, 32, device="meta"), 8), ValueError, "on meta"),
        (lambda: linear(torch.ones(2, 32), GOOD), ValueError, r"it must be \[\.\.\., 64\]"),
        (lambda: linear(torch.ones(2, 64), GOOD._replace(bits=3)), ValueError, "bits is 3"),
        (lambda: linear(torch.ones(2, 64), GOOD._replace(out=17)), ValueError, "weight.numbers"),
        (
            lambda: linear(torch.ones(2, 64), GOOD._replace(scales=GOOD.scales.float())),
            TypeError,
            "weight.scales has dtype",
        ),
        (
            lambda: linear(torch.ones(2, 64), GOOD._replace(scales=GOOD.scales[:, :0])),
            ValueError,
            "0 groups",
        ),
        (lambda: linear(torch.ones(2, 64), GOOD, torch.ones(4)), ValueError, "bias has shape"),
    ],
)
def test_bad_calls(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
