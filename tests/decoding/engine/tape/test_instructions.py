"""Each instruction of a tape against torch's operation, on other numbers than were recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossfade.decoding.engine.tape.recording import NotTaped
from tapes import record, replayed
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 3


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(dtype)


def check(f: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype, exact: bool) -> None:
    """A function's replay gives what the function gives, by instructions alone if `exact`."""
    first = [draw(s, dtype, seed) for seed, s in enumerate(shapes)]
    then = [draw(s, dtype, seed + 9) for seed, s in enumerate(shapes)]
    program = record(f, first)
    assert bool(program.called) is not exact
    expected = f(*then)
    for found, own in zip(
        replayed(f, first, then),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        assert found.dtype == own.dtype
        # Results are rounded once, as torch's are: a step of the dtype where sums differ in order.
        tolerance = max(8 * torch.finfo(own.dtype).eps, 1e-5) if own.is_floating_point() else 0
        torch.testing.assert_close(found, own, atol=tolerance, rtol=tolerance, equal_nan=True)


NUMBERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "square": lambda x: x.pow(2),
    "cube": lambda x: torch.pow(x, 3.0),
    "power": lambda x: x.abs().pow(1.7),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1e-3),
    "reciprocal": lambda x: (x.abs() + 0.1).reciprocal(),
    "exp": torch.exp,
    "cos": lambda x: (1000 * x).cos(),
    "sin": lambda x: (1000 * x).sin(),
    "tanh": lambda x: torch.tanh(3 * x),
    "small tanh": lambda x: torch.tanh(0.01 * x),
    "erf": torch.erf,
    "sigmoid": lambda x: torch.sigmoid(5 * x),
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "clamp": lambda x: x.clamp(-1, 0.5),
    "clamp above": lambda x: x.clamp(max=0.5),
    "scalars": lambda x: 2 - (x * 3 + 1) / 7,
    "to float": lambda x: x.float() * 1.5,
    "in place": lambda x: (x + 1).mul_(2).add_(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMBERWISE)
def test_numberwise(name: str, dtype: torch.dtype) -> None:
    check(NUMBERWISE[name], (ROWS, 1, 37), dtype=dtype, exact=True)


BETWEEN: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "add": (torch.add, ((3, 5, 17), (3, 5, 17))),
    "alpha": (lambda x, y: torch.sub(x, y, alpha=3), ((3, 5, 17), (3, 5, 17))),
    "a row for all": (torch.mul, ((3, 5, 17), (17,))),
    "a number a row": (torch.mul, ((3, 5, 17), (3, 1, 1))),
    "crosswise": (torch.mul, ((3, 1, 17), (1, 5, 1))),
    "div": (lambda x, y: x / (y.abs() + 1), ((3, 17), (3, 17))),
    "maximum": (torch.maximum, ((3, 17), (3, 17))),
    "minimum": (torch.minimum, ((3, 17), (17,))),
    "mean": (lambda x: x.mean(-1, keepdim=True), ((3, 2, 67),)),
    "mean without a dimension": (lambda x: x.mean(-1), ((3, 2, 67),)),
    "sum": (lambda x: x.sum(dim=-1), ((3, 2, 67),)),
    "norm": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        ((3, 1, 576), (576,)),
    ),
    "sum over rows": (lambda x: (x * 2).sum(0) + x, ((3, 5, 17),)),
    "mean over the middle": (lambda x: x.mean(1, keepdim=True) + x, ((3, 5, 17),)),
    "comparisons": (
        lambda x, y: torch.where(x > y, x, torch.where(y == 2, 1.0, (x <= 0) * y)),
        ((3, 17), (3, 17)),
    ),
    "masks": (lambda x: (x < 0, x >= 1), ((3, 17),)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (67,), w, b), ((3, 2, 67), (67,), (67,))),
    "layer norm alone": (lambda x: F.layer_norm(x, (67,)), ((3, 2, 67),)),
    "transposed": (lambda x, y: x.transpose(1, 2) + y, ((3, 4, 17), (3, 17, 4))),
    "contiguous": (lambda x: x.view(3, 2, 2, 17).transpose(1, 2).reshape(3, 68), ((3, 4, 17),)),
    "cat": (lambda x, y: torch.cat([-x[..., 9:], y, x[..., :9]], dim=-1), ((3, 4, 17), (3, 4, 2))),
    "cat of rows": (lambda x: torch.cat([x[1:], x[:1]]), ((3, 17),)),
    "stack": (lambda x, y: torch.stack([x, y], dim=1), ((3, 17), (3, 17))),
    "split": (lambda x: torch.mul(*x.split([9, 9], -1)), ((3, 18),)),
    "many dimensions": (lambda x: (x.permute(0, 3, 1, 2, 4) * 2)[:, ::2], ((3, 2, 3, 4, 5),)),
    "rows crosswise": (lambda x, y: x[:, None] * y[None], ((3, 17), (3, 17))),
    "repeat": (lambda x: x[:, None].repeat(1, 4, 1) + 1, ((3, 17),)),
    "one number": (lambda x: (x * 2)[0, 0] + x, ((3, 17),)),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", BETWEEN)
def test_over_tensors(name: str, dtype: torch.dtype) -> None:
    f, shapes = BETWEEN[name]
    check(f, *shapes, dtype=dtype, exact=True)


LEFT_TO_TORCH: dict[str, Callable[..., Any]] = {
    "softmax": lambda x: torch.softmax(x * 2, -1) + 1,
    "topk": lambda x: x.topk(3, dim=-1).values * 2,
    "filled, then written": lambda x: x.new_zeros(3, 20).index_fill_(1, torch.tensor([1]), 7) + x,
    "written in part": lambda x: torch.zeros(3, 40).index_copy_(1, torch.arange(20) * 2, x) * 2,
    "of an input": lambda x: x.flip(-1) + 1,
    "in place": lambda x: (x * 2).index_fill_(1, torch.tensor([0, 3]), 5.0) * 2,
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_torch_computes_in_between(name: str) -> None:
    check(LEFT_TO_TORCH[name], (3, 20), dtype=torch.float32, exact=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 17, 5), (3, 64, 130)])
def test_products_by_transposed_weights(
    rows: int, inner: int, out: int, bias: bool, dtype: torch.dtype
) -> None:
    weight, b = draw((inner, out), dtype, 1), draw((out,), dtype, 2)

    def f(x: Tensor) -> Tensor:
        return (torch.addmm(b, x, weight) if bias else x @ weight) * 1

    check(f, (rows, inner), dtype=dtype, exact=True)


def test_embeddings_and_ids() -> None:
    table = draw((11, 7))

    def f(ids: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(ids, table) * positions[..., None].float()

    first = torch.tensor([[1], [2], [3]]), torch.tensor([[5], [6], [7]])
    then = torch.tensor([[10], [0], [4]]), torch.tensor([[0], [1], [1 << 20]])
    assert torch.equal(replayed(f, first, then)[0], f(*then))
    program = record(f, first)
    with pytest.raises(IndexError, match=r"token 11 is not within \[0, 11\)"):
        program.run([torch.tensor([[1], [11], [3]]), then[1]])


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "chance": (lambda x: x + torch.rand_like(x), "draws numbers"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), "draws numbers"),
    "a branch": (lambda x: x * 2 if x.sum().item() > 0 else x, "depends on its numbers"),
    "a mask": (lambda x: x[x > 0], "depends on its numbers"),
    "places": (lambda x: (x * 2).nonzero(), "depends on its numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused(name: str) -> None:
    f, why = REFUSED[name]
    with pytest.raises(NotTaped, match=why):
        record(f, [draw((3, 5))])


def test_weights_that_a_forward_writes_into_are_refused() -> None:
    weight = draw((5,))
    with pytest.raises(NotTaped, match="writes into its weights"):
        record(lambda x: weight.add_(x[0]) * 1, [draw((3, 5))], fixed=[weight])


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    weight = draw((5,))
    program = record(lambda x: x * (1 + weight.float()), [draw((3, 5))], fixed=[weight])
    assert len(program.tape) == 1


def test_tensors_of_nobodys_are_read_anew() -> None:
    """What somebody else writes into is no weight."""
    setting = draw((5,))
    program = record(lambda x: x * (1 + setting), [draw((3, 5))])
    setting.fill_(3)
    x = draw((3, 5), seed=4)
    program.run([x])
    torch.testing.assert_close(program.results[0], x * 4)
