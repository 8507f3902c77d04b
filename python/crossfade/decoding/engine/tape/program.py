"""A recorded forward as native instructions, in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .... import _native
from ....ops.native import DTYPE_CODES
from ..kv_cache import KVCache
from .instructions import KINDS, TEAM, Instead, Instruction, Op, instructions
from .layout import Layout, loops, rows_of, view
from .recording import Call, NotTaped, changing, storage, with_tensors

DIMENSIONS = 5  # `crossfade::kTapeDims`
WHOLE = {Op.SUM, Op.LAYER_NORM, Op.EMBEDDING}  # They need all of a line.
FIXED, ARENA = 0, 1  # the first bases; those of the inputs follow


@dataclass(frozen=True)
class Recording:
    """What was recorded of a forward.

    Attributes:
        calls: the operations.
        inputs: tensors whose numbers differ from forward to forward: the ids come first. They may
            lie elsewhere each time, but have the same shapes and strides.
        results: what is read of the forward; None where there is nothing.
        cache: where its attention keeps keys and values.
        fixed: the storages of weights and buffers.
        rows: of the batch.
    """

    calls: Sequence[Call]
    inputs: Sequence[Tensor]
    results: Sequence[Tensor | None]
    cache: KVCache
    fixed: set[int]
    rows: int


class Program:
    """A forward that native code replays, and torch where it has no instruction.

    Attributes:
        called: the names of the operations that torch runs.
        results: where these lie after each run.
    """

    def __init__(self, recording: Recording) -> None:
        self.rows = recording.rows
        moves = changing(recording.calls, recording.inputs, recording.fixed)
        self._inputs: dict[int, int] = {}  # of those that share memory, the first one's number
        for i, x in enumerate(recording.inputs):
            self._inputs.setdefault(storage(x), i)
        self._begins = [x.storage_offset() for x in recording.inputs]
        self._layers = {storage(k): n for n, (k, _) in recording.cache.layers.items()}
        steps: list[Instruction | Instead] = []
        for call in recording.calls:
            touched = (*call.inputs, *call.outputs)
            if any(storage(x) in moves for x in touched):
                found = instructions(call)
                steps += [found] if isinstance(found, Instead) else found
        caches = {storage(x) for pair in recording.cache.layers.values() for x in pair}
        made = {storage(x) for c in recording.calls for x in c.outputs}
        others = moves - made - caches - set(self._inputs)
        given = caches | set(self._inputs) | others
        self._tape = _native.Tape()
        self._steps = steps
        kept = {storage(x) for x in recording.results if x is not None}
        self._products = {
            place: self._add_product(step)
            for place, step in enumerate(self._steps)
            if isinstance(step, Instruction) and step.op in (Op.LINEAR, Op.LINEAR_COLUMNS)
        }
        scratch = {
            place: self._tape.scratch(index)
            for place, index in self._products.items()
            if self._steps[place].op is Op.LINEAR  # type: ignore[union-attr]
        }
        self._layout = Layout(self._steps, self.rows, moves, given, kept, scratch)
        self._arena = torch.empty(self._layout.bytes, dtype=torch.uint8)
        self._moves, self._given = moves, given
        self._attentions: list[tuple[int, int]] = []  # of each, its number and its layer
        self._parts: list[tuple[int, int] | Callable[[Sequence[Tensor]], None]] = []
        self.called: list[str] = []
        begin = 0
        for place, step in enumerate(self._steps):
            if isinstance(step, Instead):
                if begin < len(self._tape):
                    self._parts.append((begin, len(self._tape)))
                begin = len(self._tape)
                self._parts.append(self._torch(step.call))
                self.called.append(step.call.name)
            else:
                self._add(place, step)
        if begin < len(self._tape):
            self._parts.append((begin, len(self._tape)))
        # What the tape refers to by address must stay alive.
        self._alive = [
            x
            for step in self._steps
            if isinstance(step, Instruction)
            for x in (step.out, *step.inputs, *_fixed_parts(step))
            if storage(x) not in self._layout.offsets
        ]
        self.results = [None if x is None else self._placed(x) for x in recording.results]
        self._steps = []

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Replay the forward on other inputs."""
        bases = [0, self._arena.data_ptr(), *(x.data_ptr() for x in inputs)]
        threads = torch.get_num_threads()
        for part in self._parts:
            if isinstance(part, tuple):
                self._tape.run(bases, *part, threads)
            else:
                part(inputs)

    def bind(self, cache: KVCache) -> None:
        """Tell the tape where the caches are now."""
        for index, layer in self._attentions:
            keys, values = cache.layers[layer]
            pair = ((x.data_ptr(), x.stride()) for x in (keys, values))
            self._tape.set_cache(index, *pair, cache.capacity)

    # ---- Making it ----------------------------------------------------------------------------

    def _placed(self, x: Tensor) -> Tensor:
        """A tensor where the tape has it."""
        offset = self._layout.offsets.get(storage(x))
        return x if offset is None else view(self._arena, offset, x)

    def _operand(self, x: Tensor, strides: Sequence[int]) -> tuple[int, int, int, Sequence[int]]:
        key, begin = storage(x), x.storage_offset() * x.element_size()
        if key in self._inputs:
            number = self._inputs[key]
            begin -= self._begins[number] * x.element_size()
            return 2 + number, KINDS[x.dtype], begin, strides
        offset = self._layout.offsets.get(key)
        if offset is None:
            return FIXED, KINDS[x.dtype], x.data_ptr(), strides
        return ARENA, KINDS[x.dtype], offset + begin, strides

    def _add(self, place: int, step: Instruction) -> None:
        index = step.index
        tensors = [step.out, *step.inputs]
        if step.op in TEAM:
            sizes = [self.rows, 1, 1, 1, 1]
            operands = [self._operand(x, [0] * DIMENSIONS) for x in tensors]
            if step.op is Op.ATTENTION:
                index = self._add_attention(step)
            else:
                index = self._products[place]
            if step.op is Op.LINEAR:
                blank = [0] * DIMENSIONS
                if len(operands) == 2:  # There is no scale.
                    operands.append((FIXED, 0, 0, blank))
                at = self._layout.offsets["scratch", place]
                operands.append((ARENA, 0, at, blank))
        else:
            rows = rows_of(step, self.rows)
            shape = step.out.shape if step.shape is None else step.shape
            looped = tensors[:2] if step.op is Op.EMBEDDING else tensors
            found = loops(shape, looped, rows, DIMENSIONS, step.op in WHOLE)
            if found is None:
                raise NotTaped(f"tensors of shape {list(shape)} have too many dimensions")
            sizes, strides = found
            operands = [self._operand(x, s) for x, s in zip(looped, strides, strict=True)]
            if step.op is Op.EMBEDDING:
                table = tensors[2]
                operands.append(self._operand(table, [table.stride(0), 0, 0, 0, 0]))
        wait = place in self._layout.waits
        self._tape.add((int(step.op), wait, index, sizes, step.numbers, operands))

    def _add_product(self, step: Instruction) -> int:
        about, x = step.about, step.inputs[0]
        weight, bias, lora = about["weight"], about["bias"], about["lora"]
        transposed = step.op is Op.LINEAR_COLUMNS
        out, inner = weight.shape
        deltas = None
        if lora is not None:
            a, b, scale = lora
            rank = a.shape[0]
            deltas = (
                rank,
                a.data_ptr(),
                a.stride(0),
                b.data_ptr(),
                b.stride(0),
                0,
                scale.stride(0),
                about["rows"] // scale.shape[0],
            )
        return self._tape.add_linear(
            about["rows"],
            inner,
            out,
            DTYPE_CODES[x.dtype],
            inner,
            weight.data_ptr(),
            weight.stride(1) if transposed else weight.stride(0),
            0 if bias is None else bias.data_ptr(),
            deltas,
        )

    def _add_attention(self, step: Instruction) -> int:
        about = step.about
        query, key, value = step.inputs[:3]
        keys, values = about["keys"], about["values"]
        rows, heads, tokens, size = query.shape
        slots, kv_heads, capacity, value_size = values.shape
        index = self._tape.add_attention(
            (
                DTYPE_CODES[query.dtype],
                *(rows, tokens, heads, kv_heads, size, value_size, slots, capacity),
                (0, query.stride()),
                (0, key.stride()),
                (0, value.stride()),
                (keys.data_ptr(), keys.stride()),
                (values.data_ptr(), values.stride()),
                0,
                0,
                about["scale"],
                about["softcap"],
                about["window"],
                (0, (tokens * heads * value_size, value_size, heads * value_size)),
            )
        )
        self._attentions.append((index, self._layers[storage(keys)]))
        return index

    def _torch(self, call: Call) -> Callable[[Sequence[Tensor]], None]:
        """A function that lets torch run an operation on the tape's memory."""

        def place(x: Tensor) -> Any:
            number = self._inputs.get(storage(x))
            if number is None:
                return self._placed(x)
            return _Input(number, x, x.storage_offset() - self._begins[number])

        args, kwargs = with_tensors(call.args, place), with_tensors(call.kwargs, place)
        written = {storage(x) for x in call.written}
        results = [
            (i, self._placed(x))
            for i, x in enumerate(call.outputs)
            if storage(x) not in written and storage(x) in self._layout.offsets
        ]
        function = call.function

        def run(inputs: Sequence[Tensor]) -> None:
            now = _given(args, inputs), _given(kwargs, inputs)
            found = Call(function, (), {}, function(*now[0], **now[1])).outputs
            for i, out in results:
                out.copy_(found[i])

        return run


@dataclass(frozen=True)
class _Input:
    """The place of an input among the arguments of an operation."""

    number: int
    like: Tensor
    begin: int

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        x = inputs[self.number]
        return torch.as_strided(
            x, self.like.shape, self.like.stride(), x.storage_offset() + self.begin
        )


def _given(value: Any, inputs: Sequence[Tensor]) -> Any:
    if isinstance(value, _Input):
        return value.of(inputs)
    if isinstance(value, (list, tuple)):
        return type(value)(_given(x, inputs) for x in value)
    if isinstance(value, dict):
        return {k: _given(x, inputs) for k, x in value.items()}
    return value


def _fixed_parts(step: Instruction) -> list[Tensor]:
    about = step.about
    lora = about.get("lora") or ()
    return [x for x in (about.get("weight"), about.get("bias"), *lora) if x is not None]
