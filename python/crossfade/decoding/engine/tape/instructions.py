"""What a tape consists of, and what operations of torch's become on it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....ops.linear import has_few_rows
from ....ops.packed import Packed
from .recording import Call, storage

# `crossfade::Kind`: the numbers that instructions read and write.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.bool: 4}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}


class Op(enum.IntEnum):
    """In the order of `crossfade::TapeOp` in csrc/cpu/tape.h."""

    COPY = 0
    CONVERT = enum.auto()
    NEG = enum.auto()
    ABS = enum.auto()
    POW = enum.auto()
    SQRT = enum.auto()
    RSQRT = enum.auto()
    RECIPROCAL = enum.auto()
    EXP = enum.auto()
    COS = enum.auto()
    SIN = enum.auto()
    TANH = enum.auto()
    ERF = enum.auto()
    SIGMOID = enum.auto()
    SILU = enum.auto()
    RELU = enum.auto()
    GELU = enum.auto()
    GELU_TANH = enum.auto()
    CLAMP = enum.auto()
    ADD = enum.auto()
    SUB = enum.auto()
    MUL = enum.auto()
    DIV = enum.auto()
    MAXIMUM = enum.auto()
    MINIMUM = enum.auto()
    EQUAL = enum.auto()
    LESS = enum.auto()
    AT_MOST = enum.auto()
    WHERE = enum.auto()
    SUM = enum.auto()
    LAYER_NORM = enum.auto()
    EMBEDDING = enum.auto()
    LINEAR = enum.auto()
    LINEAR_COLUMNS = enum.auto()
    ATTENTION = enum.auto()


TEAM = {Op.LINEAR, Op.LINEAR_COLUMNS, Op.ATTENTION}  # shared out in ways of their own


@dataclass
class Instruction:
    """One native operation.

    Attributes:
        out: the tensor that is written.
        inputs: the tensors that are read. Each has the shape of the loops, maybe by `expand`.
        shape: of the loops; None: that of `out`.
        numbers: settings.
        index: how many rows an embedding's table has.
        about: the operands of a product or of attention that stay where they are.
    """

    op: Op
    out: Tensor
    inputs: Sequence[Tensor]
    shape: torch.Size | None = None
    numbers: tuple[float, float] = (0.0, 0.0)
    index: int = 0
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Instead:
    """An operation that has no instruction. It is called as it is, between those that have."""

    call: Call


Rule = Callable[[Call], "list[Instruction] | None"]
RULES: dict[str, Rule] = {}


def instructions(call: Call) -> list[Instruction] | Instead:
    """What a call becomes on a tape. Views become nothing, as they are read where they lie."""
    outputs, written = call.outputs, call.written
    if not written and outputs and _are_views(call):
        return []
    name = call.function._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    found = rule(call) if rule is not None else None
    return Instead(call) if found is None else found


def _are_views(call: Call) -> bool:
    shared = {storage(x) for x in call.inputs}
    return all(storage(x) in shared for x in call.outputs)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x))


def _out(call: Call) -> Tensor:
    """Where the result goes: of an operation in place, its first argument."""
    return call.written[0] if call.written else call.result


def _each(
    call: Call, op: Op, inputs: Sequence[Any], numbers: tuple[float, float] = (0.0, 0.0)
) -> list[Instruction] | None:
    """One instruction for each number of the result."""
    out = _out(call)
    if out.dtype not in FLOATS or not all(isinstance(x, Tensor) or _is_number(x) for x in inputs):
        return None
    return _loop(op, out, inputs, numbers)


def _loop(
    op: Op, out: Tensor, inputs: Sequence[Any], numbers: tuple[float, float] = (0.0, 0.0)
) -> list[Instruction] | None:
    tensors = [_as_tensor(x) for x in inputs]
    if any(x.dtype not in KINDS for x in tensors):
        return None
    return [Instruction(op, out, [x.expand(out.shape) for x in tensors], numbers=numbers)]


def _unary(op: Op) -> Rule:
    return lambda call: _each(call, op, call.args[:1])


def _binary(op: Op) -> Rule:
    return lambda call: _each(call, op, call.args[:2], (call.kwargs.get("alpha", 1.0), 0.0))


def _comparison(op: Op, *, swapped: bool = False) -> Rule:
    def rule(call: Call) -> list[Instruction] | None:
        """A comparison of floating-point numbers."""
        inputs = call.args[1::-1] if swapped else call.args[:2]
        floats = [x.dtype in FLOATS for x in inputs if isinstance(x, Tensor)]
        if not all(floats) or _out(call).dtype is not torch.bool:
            return None
        return _loop(op, _out(call), inputs)

    return rule


def _copy(source: Tensor, out: Tensor) -> list[Instruction] | None:
    source = source.expand(out.shape)
    if source.dtype == out.dtype and out.dtype in KINDS:
        return [Instruction(Op.COPY, out, [source])]
    if out.dtype in FLOATS and source.dtype in KINDS:
        return [Instruction(Op.CONVERT, out, [source])]
    return None


for _name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "cos", "sin", "tanh", "erf"):
    RULES[_name] = _unary(Op[_name.upper()])
for _name in ("sigmoid", "silu", "relu"):
    RULES[_name] = _unary(Op[_name.upper()])
for _name in ("add", "sub", "mul", "maximum", "minimum"):
    RULES[_name] = _binary(Op[_name.upper()])
RULES["eq"] = _comparison(Op.EQUAL)
RULES["lt"], RULES["gt"] = _comparison(Op.LESS), _comparison(Op.LESS, swapped=True)
RULES["le"], RULES["ge"] = _comparison(Op.AT_MOST), _comparison(Op.AT_MOST, swapped=True)
for _name in ("_to_copy", "clone", "contiguous", "_reshape_copy", "_reshape_alias"):
    RULES[_name] = lambda call: _copy(call.args[0], call.result)
RULES["copy_"] = lambda call: _copy(call.args[1], call.args[0])
for _name in ("empty", "new_empty", "empty_like"):
    RULES[_name] = lambda call: []
RULES["where"] = lambda call: _each(call, Op.WHERE, call.args) if len(call.args) == 3 else None


def rule(name: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return keep


@rule("div")
def _div(call: Call) -> list[Instruction] | None:
    return None if call.kwargs.get("rounding_mode") else _each(call, Op.DIV, call.args[:2])


@rule("rsub")
def _rsub(call: Call) -> list[Instruction] | None:
    return _each(call, Op.SUB, call.args[1::-1], (call.kwargs.get("alpha", 1.0), 0.0))


@rule("pow")
def _pow(call: Call) -> list[Instruction] | None:
    x, exponent = call.args
    if not isinstance(x, Tensor) or not _is_number(exponent):
        return None
    return _each(call, Op.POW, [x], (float(exponent), 0.0))


@rule("gelu")
def _gelu(call: Call) -> list[Instruction] | None:
    by_tanh = call.kwargs.get("approximate", "none") == "tanh"
    return _each(call, Op.GELU_TANH if by_tanh else Op.GELU, call.args[:1])


@rule("clamp")
def _clamp(call: Call) -> list[Instruction] | None:
    least, most = (*call.args[1:], None, None)[:2]
    least, most = call.kwargs.get("min", least), call.kwargs.get("max", most)
    if isinstance(least, Tensor) or isinstance(most, Tensor):
        return None
    ends = -torch.inf if least is None else least, torch.inf if most is None else most
    return _each(call, Op.CLAMP, call.args[:1], ends)


@rule("mean")
def _mean(call: Call) -> list[Instruction] | None:
    return _over_one(call, mean=True)


@rule("sum")
def _sum(call: Call) -> list[Instruction] | None:
    return _over_one(call, mean=False)


def _over_one(call: Call, *, mean: bool) -> list[Instruction] | None:
    """The sum or the mean over one dimension."""
    x, dims, keep = (*call.args, None, False)[:3]
    keep = call.kwargs.get("keepdim", keep)
    if x.dtype not in FLOATS or call.result.dtype not in FLOATS or x.dim() == 0:
        return None
    if dims is None or len(dims) != 1:
        return None
    dim = dims[0] % x.dim()
    line = x.movedim(dim, -1)
    out = call.result.movedim(dim, -1) if keep else call.result.unsqueeze(-1)
    factor = 1.0 / x.shape[dim] if mean else 1.0
    return [Instruction(Op.SUM, out.expand(line.shape), [line], line.shape, (factor, 0.0))]


@rule("native_layer_norm")
def _layer_norm(call: Call) -> list[Instruction] | None:
    x, normalized, weight, bias, eps = call.args
    out = call.result[0]
    if len(normalized) != 1 or x.dtype not in FLOATS:
        return None
    weight = torch.ones(()) if weight is None else weight
    bias = torch.zeros(()) if bias is None else bias
    inputs = [x, weight.expand(x.shape), bias.expand(x.shape)]
    return [Instruction(Op.LAYER_NORM, out, inputs, numbers=(eps, 0.0))]


@rule("embedding")
def _embedding(call: Call) -> list[Instruction] | None:
    table, ids = call.args[:2]
    if ids.dtype != torch.int64 or table.dtype not in KINDS or table.stride(1) != 1:
        return None
    out = call.result
    inputs = [ids.unsqueeze(-1).expand(out.shape), table]
    return [Instruction(Op.EMBEDDING, out, inputs, index=len(table))]


@rule("cat")
def _cat(call: Call) -> list[Instruction] | None:
    parts, dim = (*call.args, 0)[:2]
    dim = call.kwargs.get("dim", dim)
    parts = [x for x in parts if x.numel()]
    places = call.result.split([x.shape[dim] for x in parts], dim)
    return _all(_copy(x, place) for x, place in zip(parts, places, strict=True))


@rule("stack")
def _stack(call: Call) -> list[Instruction] | None:
    parts, dim = (*call.args, 0)[:2]
    places = call.result.unbind(call.kwargs.get("dim", dim))
    return _all(_copy(x, place) for x, place in zip(parts, places, strict=True))


@rule("repeat")
def _repeat(call: Call) -> list[Instruction] | None:
    x, times = call.args
    out = call.result
    if x.dim() != len(times):
        return None
    if any(n != 1 and size != 1 for n, size in zip(times, x.shape, strict=True)):
        return None
    return _copy(x, out)


def _all(found: Any) -> list[Instruction] | None:
    each = list(found)
    return None if None in each else [x for some in each for x in some]


# ---- Products and attention -------------------------------------------------------------------


def product(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, out: Tensor, lora: Any = None
) -> list[Instruction] | None:
    """``out = x weightᵀ + bias``, for a weight ``[out, in]`` or the transpose of ``[in, out]``."""
    dtype = weight.dtype if isinstance(weight, Tensor) else x.dtype
    if x.dtype not in FLOATS or {x.dtype, out.dtype} != {dtype} or not x.is_contiguous():
        return None
    if not out.is_contiguous() or (bias is not None and bias.stride() != (1,)):
        return None
    rows = x.numel() // x.shape[-1]
    about = {"rows": rows, "weight": weight, "bias": bias, "lora": lora}
    scale = [] if lora is None else [lora[2]]
    if not isinstance(weight, Tensor) or weight.stride(1) == 1 or weight.shape[1] == 1:
        return [Instruction(Op.LINEAR, out, [x, *scale], about=about)]
    if weight.stride(0) == 1 and lora is None:
        return [Instruction(Op.LINEAR_COLUMNS, out, [x], about=about)]
    return None


@rule("crossfade::linear")
def _linear(call: Call) -> list[Instruction] | None:
    x, weight, bias, a, b, scale, backend = call.args
    if backend == "reference" or not has_few_rows(x, weight, weight.shape[1]):
        return None
    return product(x, weight, bias, call.result, None if a is None else (a, b, scale))


@rule("crossfade::linear_packed")
def _linear_packed(call: Call) -> list[Instruction] | None:
    x, numbers, scales, minima, out, bits, bias, a, b, scale, backend = call.args
    if backend == "reference":
        return None
    weight = Packed(numbers, scales, minima, out, bits)
    return product(x, weight, bias, call.result, None if a is None else (a, b, scale))


@rule("mm")
def _mm(call: Call) -> list[Instruction] | None:
    return product(call.args[0], call.args[1].t(), None, call.result)


@rule("addmm")
def _addmm(call: Call) -> list[Instruction] | None:
    bias, x, weight = call.args
    if call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1 or bias.dim() != 1:
        return None
    return product(x, weight.t(), bias, call.result)


@rule("crossfade::attend_")
def _attend(call: Call) -> list[Instruction] | None:
    names = [x.name for x in call.function._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    if given["backend"] == "reference":
        return None
    if given["query"].dtype not in FLOATS:
        return None
    inputs = [given[name] for name in ("query", "key", "value", "lengths", "rows")]
    inputs = [x for x in inputs if x is not None]
    return [Instruction(Op.ATTENTION, call.result, inputs, about=given)]
