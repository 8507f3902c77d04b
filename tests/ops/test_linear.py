"""`ops.linear` against float64, and what it promises of rows, threads, gradients and errors."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import DTYPES, INF, NAN, lay_out, normal
from crossfade.ops import Lora, linear, native
from torch import Tensor

ON_CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# in, out: less than a vector, primes, whole vectors, tails of every tile
SHAPES = [(1, 1), (3, 7), (16, 8), (31, 5), (64, 33), (97, 13), (577, 41)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13]

pytestmark = pytest.mark.skipif(
    native.why_not(ON_CPU) is not None, reason=str(native.why_not(ON_CPU))
)


def scales(rows: int, ranks: list[int]) -> Tensor:
    """Row r uses adapter r % (adapters + 1) - 1, -1 being none, with a scaling of its own."""
    scale = torch.zeros(rows, sum(ranks))
    for row in range(rows):
        adapter = row % (len(ranks) + 1) - 1
        if adapter >= 0:
            start = sum(ranks[:adapter])
            scale[row, start : start + ranks[adapter]] = 0.5 + row % 5
    return scale


def problem(
    rows: int, inner: int, out: int, dtype: torch.dtype, ranks: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Lora | None]:
    x, weight = normal(rows, inner, 1, dtype=dtype), normal(out, inner, 2, scale=1.0, dtype=dtype)
    bias = normal(1, out, 3, dtype=dtype)[0]
    if ranks is None:
        return x, weight, bias, None
    a = normal(sum(ranks), inner, 4, scale=0.3, dtype=dtype)
    b = normal(out, sum(ranks), 5, scale=0.3, dtype=dtype)
    return x, weight, bias, Lora(a, b, scales(rows, ranks))


def truth(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of magnitudes that its rounding in float32 grows with."""
    x, weight = x.double(), weight.double()
    y, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    if lora is not None:
        a, b, scale = (t.double() for t in lora)
        y = y + (x @ a.T * scale) @ b.T
        size = size + (x.abs() @ a.abs().T * scale.abs()) @ b.abs().T
    return y, size


def assert_right(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> None:
    want, size = truth(x, weight, bias, lora)
    assert (got.shape, got.dtype) == (want.shape, x.dtype)
    # the sums in float32, whose errors are of both signs, then one rounding to x's dtype
    allowed = 3 * 2.0**-23 * size + ROUNDING[x.dtype] * want.abs() + 2.0**-24
    error = (got.double() - want).abs()
    assert bool((error <= allowed).all()), f"off by {(error / allowed).max():.3g} times the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "out"), SHAPES)
def test_truth(inner: int, out: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, weight, bias, _ = problem(rows, inner, out, dtype)
        got = linear(x, weight, bias, backend="native")
        assert_right(got, x, weight, bias, None)
        assert_right(linear(x, weight, backend="native"), x, weight, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [[1], [8], [16, 5], [3, 64, 8], [64]], ids=str)
def test_deltas(ranks: list[int], dtype: torch.dtype) -> None:
    for rows, inner, out in ((1, 31, 5), (3, 64, 33), (7, 97, 13), (13, 33, 16)):
        args = problem(rows, inner, out, dtype, ranks)
        got = linear(*args[:3], lora=args[3], backend="native")
        assert_right(got, *args)
        base = linear(*args[:3], backend="native")
        assert torch.equal(got[0], base[0]), "a row without an adapter is the plain layer's"
        assert rows == 1 or not torch.equal(got[1], base[1])


@pytest.mark.parametrize("ranks", [None, [5, 16, 3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_alone(dtype: torch.dtype, ranks: list[int] | None) -> None:
    """A row does not depend on the others, to the bit; many rows are cut for the cache too."""
    for rows, inner, out in ((13, 577, 41), (48, 3001, 13)):
        x, weight, bias, lora = problem(rows, inner, out, dtype, ranks)
        y = linear(x, weight, bias, lora=lora, backend="native")
        for i in range(rows):
            own = lora and lora._replace(scale=lora.scale[i : i + 1])
            alone = linear(x[i : i + 1], weight, bias, lora=own, backend="native")
            assert torch.equal(alone[0], y[i]), f"row {i}"
        some = slice(2, 7)
        own = lora and lora._replace(scale=lora.scale[some])
        assert torch.equal(linear(x[some], weight, bias, lora=own, backend="native"), y[some])


@pytest.mark.parametrize("rows", [1, 7])
def test_threads_alone(rows: int) -> None:
    """A row does not depend on the number of threads: three of them share 41 columns unevenly."""
    args = problem(rows, 1031, 201, torch.float32, [5, 16, 3])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(*args[:3], lora=args[3], backend="native"))
    finally:
        torch.set_num_threads(before)
    assert_right(results[0], *args)
    assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["sliced", "offset"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Views with NaN around them."""
    x, weight, bias, lora = problem(5, 37, 19, dtype, [7, 9])
    assert lora is not None
    a, b, scale = (lay_out(t, layout) for t in lora)
    args = lay_out(x, layout), lay_out(weight, layout), lay_out(bias[None], layout)[0]
    got = linear(*args, lora=Lora(a, b, scale), backend="native")
    assert_right(got, x, weight, bias, lora)
    assert_right(linear(x.T.contiguous().T, *args[1:], backend="native"), x, weight, bias, None)


def test_leading_dimensions() -> None:
    x, weight, bias, lora = problem(6, 37, 19, torch.float32, [7, 9])
    assert lora is not None
    y = linear(x, weight, bias, lora=lora, backend="native")
    for backend in ("native", "reference"):
        got = linear(x.view(3, 2, 37), weight, bias, lora=lora, backend=backend)
        torch.testing.assert_close(got, y.view(3, 2, 19))
        groups = lora._replace(scale=lora.scale[1:4])
        got = linear(x.view(3, 2, 37), weight, bias, lora=groups, backend=backend)
        each = lora._replace(scale=groups.scale.repeat_interleave(2, dim=0))
        want = linear(x, weight, bias, lora=each, backend="native")
        torch.testing.assert_close(got, want.view(3, 2, 19))
        one = linear(x[0], weight, bias, backend=backend)
        torch.testing.assert_close(one, linear(x[:1], weight, bias)[0])
        assert linear(x[:0], weight, bias, backend=backend).shape == (0, 19)
    turned = x.view(3, 2, 37).transpose(0, 1)
    got = linear(turned, weight, backend="native")
    torch.testing.assert_close(got, turned @ weight.T)


def test_scale_that_is_expanded() -> None:
    x, weight, bias, lora = problem(4, 20, 19, torch.float32, [7])
    assert lora is not None
    wide = lora._replace(scale=torch.tensor([[2.0]]).expand(4, 7))
    got = linear(x, weight, bias, lora=wide, backend="native")
    assert_right(got, x, weight, bias, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "a", "b"])
def test_not_finite(where: str, value: float, dtype: torch.dtype) -> None:
    """They pass through as in torch, in whole vectors and in the rest."""
    for place in (0, 18):
        x, weight, bias, lora = problem(3, 19, 19, dtype, [19])
        assert lora is not None
        lora = lora._replace(scale=torch.full((3, 19), 0.5))
        tensors = {"x": x, "weight": weight, "bias": bias, "a": lora.a, "b": lora.b}
        tensors[where][..., place] = value
        got = linear(x, weight, bias, lora=lora, backend="native")
        want = truth(x, weight, bias, lora)[0]
        assert torch.equal(got.isnan(), want.isnan())
        infinite = want.isinf()
        assert torch.equal(got[infinite].double(), want[infinite])
        assert bool((infinite | want.isnan()).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding(dtype: torch.dtype) -> None:
    """Results are rounded as torch rounds float32: ties, denormals, overflow, signs.

    One CPU instruction takes denormals of bfloat16 for zeros.
    """
    tiny, ulp = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    terms = [(1.0, ulp / 2), (1.0, ulp * 1.5), (1.0, ulp * 0.4999), (-1.0, -ulp / 2), (-0.0, -0.0)]
    if dtype is torch.float16 or native._native.cpu_isa() != "avx512_bf16":
        terms += [(tiny / 2, tiny * ulp / 2), (tiny / 2, tiny * ulp * 1.5), (tiny, -tiny * ulp)]
    largest = torch.finfo(dtype).max
    terms += [(largest, largest * ulp / 4), (largest, largest), (-largest, -largest)]
    weight = torch.tensor(terms).to(dtype)
    got = linear(torch.ones(1, 2, dtype=dtype), weight, backend="native")[0]
    torch.testing.assert_close(got, weight.float().sum(-1).to(dtype), rtol=0, atol=0)


def test_gradients_take_the_formula() -> None:
    x, weight, bias, lora = problem(3, 20, 19, torch.float64, [7])
    assert lora is not None
    leaves = [t.float().requires_grad_() for t in (x, weight, bias, *lora)]
    y = linear(*leaves[:3], lora=Lora(*leaves[3:]))
    y.square().sum().backward()
    exact = [t.double().detach().requires_grad_() for t in leaves]
    truth(*exact[:3], Lora(*exact[3:]))[0].square().sum().backward()
    for got, want in zip(leaves, exact, strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"backend is .native., .* requires a gradient"):
        linear(*leaves[:3], backend="native")
    with torch.no_grad():
        assert_right(linear(*leaves[:3], backend="native"), *leaves[:3], None)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes few rows; torch takes many rows, and columns that are not contiguous."""
    calls = []
    kernel = native.linear
    monkeypatch.setattr(native, "linear", lambda *args: calls.append(1) or kernel(*args))
    x, weight, bias, lora = problem(600, 20, 19, torch.float32, [7])
    assert lora is not None
    linear(x[:4], weight, bias)
    assert len(calls) == 1
    apart = lora.a.T.contiguous().T
    for args, options in (
        ((x, weight, bias), {"lora": lora}),
        ((x[:7], weight.T.contiguous().T, bias), {}),
        ((x[:7], weight, bias), {"lora": Lora(apart, lora.b, lora.scale[:7])}),
        ((x[:7], weight, bias), {"backend": "reference"}),
    ):
        torch.testing.assert_close(
            linear(*args, **options).double(),
            truth(*args, options.get("lora"))[0],  # type: ignore
            check_dtype=False,
            rtol=1e-4,
            atol=1e-4,
        )
    assert len(calls) == 1
    with pytest.raises(ValueError, match="weight has column stride 19"):
        linear(x, weight.T.contiguous().T, backend="native")
    with pytest.raises(ValueError, match=r"lora\.a has column stride 7"):
        linear(x, weight, lora=Lora(apart, lora.b, lora.scale), backend="native")


GOOD = dict(zip(("x", "weight", "bias", "lora"), problem(3, 8, 5, torch.float32, [4]), strict=True))
LORA = GOOD["lora"]
assert isinstance(LORA, Lora)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(3, 8).double()}, TypeError, "weight has dtype torch.float32"),
        ({"x": torch.ones(3, 7)}, ValueError, r"x has shape \[3, 7\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\]"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"weight": torch.ones(5, 8).half()}, TypeError, "weight has dtype torch.float16"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \[5\]"),
        ({"weight": torch.ones(5, 0)}, ValueError, r"weight has shape \[5, 0\]"),
        ({"weight": torch.ones(5, 8, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": 1.0}, TypeError, "bias is a float"),
        ({"bias": torch.ones(5).bfloat16()}, TypeError, "bias has dtype"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\]"),
        ({"bias": torch.ones(10)[::2], "backend": "native"}, ValueError, "bias has stride 2"),
        ({"lora": tuple(LORA)}, TypeError, "lora is a tuple"),
        ({"lora": LORA._replace(a=torch.ones(4, 7))}, ValueError, r"lora\.a has shape \[4, 7\]"),
        ({"lora": LORA._replace(a=torch.ones(4, 8).half())}, TypeError, r"lora\.a has dtype"),
        ({"lora": LORA._replace(b=torch.ones(5, 3))}, ValueError, r"lora\.b has shape \[5, 3\]"),
        ({"lora": LORA._replace(b=None)}, TypeError, r"lora\.b is a NoneType"),
        ({"lora": LORA._replace(scale=torch.ones(2, 4))}, ValueError, r"lora\.scale has shape"),
        ({"lora": LORA._replace(scale=torch.ones(3, 4).half())}, TypeError, r"lora\.scale has d"),
        ({"backend": "triton"}, ValueError, "backend is 'triton'"),
    ],
)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear(**{**GOOD, **changes})


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiled(graph: str) -> None:
    """One graph holds the kernel; where gradients are wanted there is another."""
    torch._dynamo.reset()
    x, weight, bias, lora = problem(3, 20, 19, torch.float32, [7])

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x * 2, weight, bias, lora=lora).relu()

    compiled = torch.compile(layer, fullgraph=True, backend=graph)
    torch.testing.assert_close(compiled(x, weight), layer(x, weight), rtol=0, atol=0)
    weight.requires_grad_()
    (got,) = torch.autograd.grad(compiled(x, weight).sum(), weight)
    (want,) = torch.autograd.grad(layer(x, weight).sum(), weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["native", None])
@pytest.mark.parametrize("deltas", [False, True])
def test_registration(deltas: bool, backend: str | None) -> None:
    x, weight, bias, lora = problem(6, 20, 19, torch.float32, [7] if deltas else None)
    a, b, scale = lora or (None, None, None)
    op = torch.ops.crossfade.linear.default
    torch.library.opcheck(op, (x, weight, bias, a, b, scale, backend))
    scale = None if scale is None else scale[:3]
    torch.library.opcheck(op, (x.view(3, 2, 20), weight, None, a, b, scale, backend))
