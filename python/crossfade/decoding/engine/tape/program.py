"""A recorded forward as native instructions, in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....ops import native
from ..kv_cache import KVCache
from .instructions import KINDS, TEAM, Instead, Instruction, Op, instructions
from .layout import Layout, loops, rows_of, view
from .recording import Call, NotTaped, changing, storage, tensors_of, with_tensors

DIMENSIONS = 5  # `crossfade::kTapeDims`
BLANK = (0,) * DIMENSIONS
WHOLE = {Op.SUM, Op.LAYER_NORM, Op.EMBEDDING}  # They need all of a line.
FIXED, ARENA, INPUTS = 0, 1, 2  # the bases of addresses, and the first one of the inputs

Operand = tuple[int, int, int, Sequence[int]]  # base, kind, offset in bytes, strides
Torch = Callable[[Sequence[Tensor]], None]  # runs an operation, given the inputs


@dataclass(frozen=True)
class Recording:
    """What was recorded of a forward.

    Attributes:
        calls: the operations.
        inputs: tensors whose numbers differ from forward to forward. They may lie elsewhere each
            time, but have the same shapes and strides.
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


@dataclass
class Program:
    """A forward that native code replays, and torch where it has no instruction.

    Attributes:
        tape: the instructions.
        parts: which of them run, and the operations of torch's between these.
        arena: the memory of all temporaries.
        attentions: of each attention of the tape, its number and its layer.
        results: where those of the recording lie after each run.
        called: the names of the operations that torch runs.
        alive: tensors that the tape refers to by their addresses, besides the model's weights.
    """

    tape: Any
    parts: list[tuple[int, int] | Torch]
    arena: Tensor
    attentions: list[tuple[int, int]]
    results: list[Tensor | None]
    called: list[str]
    alive: list[Tensor]

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Replay the forward on other inputs."""
        bases = [0, self.arena.data_ptr(), *(x.data_ptr() for x in inputs)]
        threads = torch.get_num_threads()
        for part in self.parts:
            if isinstance(part, tuple):
                self.tape.run(bases, *part, threads)
            else:
                part(inputs)

    def bind(self, cache: KVCache) -> None:
        """Tell the tape where the caches are now."""
        for index, layer in self.attentions:
            pair = ((x.data_ptr(), x.stride()) for x in cache.layers[layer])
            self.tape.set_cache(index, *pair, cache.capacity)


def program_of(recording: Recording) -> Program:
    """Turn a recording into a program.

    Raises:
        NotTaped: says why that cannot be done.
    """
    return _Writer(recording).program()


class _Writer:
    """Writes the program of a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.rows = recording, recording.rows
        self.tape = native.tape()
        self.inputs: dict[int, int] = {}  # of those that share memory, the first one's number
        for i, x in enumerate(recording.inputs):
            self.inputs.setdefault(storage(x), i)
        self.begins = [int(x.storage_offset()) for x in recording.inputs]
        self.layers = {storage(k): n for n, (k, _) in recording.cache.layers.items()}
        moves = changing(recording.calls, recording.inputs, recording.fixed)
        self.steps: list[Instruction | Instead] = []
        for call in recording.calls:
            if not moves.isdisjoint(call.reads) or not moves.isdisjoint(call.makes):
                found = instructions(call)
                self.steps += [found] if isinstance(found, Instead) else found
        made = {storage(x) for call in recording.calls for x in call.outputs}
        self.products = {
            place: self._add_product(step)
            for place, step in enumerate(self.steps)
            if isinstance(step, Instruction) and step.op in (Op.LINEAR, Op.LINEAR_COLUMNS)
        }
        scratch = {
            place: self.tape.scratch(index)
            for place, index in self.products.items()
            if isinstance(step := self.steps[place], Instruction) and step.op is Op.LINEAR
        }
        kept = {storage(x) for x in recording.results if x is not None}
        temporaries = moves & made - set(self.inputs)
        layout = Layout(self.steps, self.rows, moves, temporaries, kept, scratch)
        self.offsets, self.waits = layout.offsets, layout.waits
        self.arena = torch.empty(layout.bytes, dtype=torch.uint8)
        self.attentions: list[tuple[int, int]] = []

    def program(self) -> Program:
        parts: list[tuple[int, int] | Torch] = []
        alive: list[Tensor] = []
        known = {*self.offsets, *self.recording.fixed}
        called: list[str] = []
        begin = 0
        for place, step in enumerate(self.steps):
            if isinstance(step, Instruction):
                self._add(place, step)
                lora = step.about.get("lora") or ()
                others = step.about.get("weight"), step.about.get("bias"), *lora
                each = (*step.inputs, *tensors_of(others))
                alive += [x for x in each if storage(x) not in known]
                continue
            if begin < len(self.tape):
                parts.append((begin, len(self.tape)))
            begin = len(self.tape)
            parts.append(self._torch(step.call))
            called.append(step.call.name)
        if begin < len(self.tape):
            parts.append((begin, len(self.tape)))
        results = [None if x is None else self._placed(x) for x in self.recording.results]
        return Program(self.tape, parts, self.arena, self.attentions, results, called, alive)

    def _placed(self, x: Tensor) -> Tensor:
        """A tensor where the tape has it."""
        offset = self.offsets.get(storage(x))
        return x if offset is None else view(self.arena, offset, x)

    def _operand(self, x: Tensor, strides: Sequence[int]) -> Operand:
        key, kind = storage(x), KINDS[x.dtype]
        begin = int(x.storage_offset()) * x.element_size()
        number, offset = self.inputs.get(key), self.offsets.get(key)
        if number is not None:
            own = self.begins[number] * x.element_size()
            return INPUTS + number, kind, begin - own, strides
        if offset is None:
            return FIXED, kind, x.data_ptr(), strides
        return ARENA, kind, offset + begin, strides

    def _add(self, place: int, step: Instruction) -> None:
        index, operands = step.index, []
        if step.op in TEAM:
            sizes = [self.rows, *[1] * (DIMENSIONS - 1)]
            operands = [self._operand(x, BLANK) for x in (step.out, *step.inputs)]
            index = self._add_attention(step) if step.op is Op.ATTENTION else self.products[place]
            if step.op is Op.LINEAR:  # x, scale, scratch
                if len(operands) == 2:
                    operands.append((FIXED, 0, 0, BLANK))
                operands.append((ARENA, 0, self.offsets["scratch", place], BLANK))
        else:
            shape = step.out.shape if step.shape is None else step.shape
            tensors = [step.out, *step.inputs]
            table = tensors.pop() if step.op is Op.EMBEDDING else None
            rows = rows_of(step, self.rows)
            found = loops(shape, tensors, rows, DIMENSIONS, whole=step.op in WHOLE)
            if found is None:
                raise NotTaped(f"it computes with tensors of {len(shape)} dimensions")
            sizes, strides = found
            operands = [self._operand(x, s) for x, s in zip(tensors, strides, strict=True)]
            if table is not None:
                operands.append(self._operand(table, (table.stride(0), *BLANK[1:])))
        wait = place in self.waits
        self.tape.add((int(step.op), wait, index, sizes, step.numbers, operands))

    def _add_product(self, step: Instruction) -> int:
        about, x = step.about, step.inputs[0]
        weight, bias, lora = about["weight"], about["bias"], about["lora"]
        packed = None
        if isinstance(weight, ops.Packed):
            out, inner, place = weight.out, weight.inner, (0, 0)
            low = weight.minima
            places = (weight.numbers.data_ptr(), weight.scales.data_ptr())
            minima = 0 if low is None else low.data_ptr()
            packed = (weight.bits, weight.group, *places, minima)
        else:
            out, inner = weight.shape
            columns = step.op is Op.LINEAR_COLUMNS
            place = weight.data_ptr(), weight.stride(1 if columns else 0)
        deltas = None
        if lora is not None:
            a, b, scale = lora
            each = about["rows"] // scale.shape[0]  # rows that have one row of the scale
            where = a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), 0, scale.stride(0)
            deltas = (a.shape[0], *where, each)
        return self.tape.add_linear(
            about["rows"],
            inner,
            out,
            native.DTYPE_CODES[x.dtype],
            inner,
            *place,
            0 if bias is None else bias.data_ptr(),
            deltas,
            packed,
        )

    def _add_attention(self, step: Instruction) -> int:
        about = step.about
        query, key, value = step.inputs[:3]
        keys, values = about["keys"], about["values"]
        rows, heads, tokens, size = query.shape
        slots, kv_heads, capacity, value_size = values.shape
        nowhere = 0
        index = self.tape.add_attention(
            (
                native.DTYPE_CODES[query.dtype],
                *(rows, tokens, heads, kv_heads, size, value_size, slots, capacity),
                *((nowhere, x.stride()) for x in (query, key, value)),
                *((x.data_ptr(), x.stride()) for x in (keys, values)),
                *(nowhere, nowhere),
                *(about["scale"], about["softcap"], about["window"]),
                (nowhere, (tokens * heads * value_size, value_size, heads * value_size)),
            )
        )
        self.attentions.append((index, self.layers[storage(keys)]))
        return index

    def _torch(self, call: Call) -> Torch:
        """A function that lets torch run an operation on the tape's memory."""

        def place(x: Tensor) -> Any:
            number = self.inputs.get(storage(x))
            if number is None:
                return self._placed(x)
            return _Input(number, x, int(x.storage_offset()) - self.begins[number])

        function = call.function
        args, kwargs = with_tensors(call.args, place), with_tensors(call.kwargs, place)
        written = {storage(x) for x in call.written}
        places = [
            self._placed(x) if storage(x) not in written and storage(x) in self.offsets else None
            for x in call.outputs
        ]

        def run(inputs: Sequence[Tensor]) -> None:
            result = function(*_given(args, inputs), **_given(kwargs, inputs))
            for x, place in zip(Call(function, (), {}, result).outputs, places, strict=True):
                if place is not None:
                    place.copy_(x)

        return run


@dataclass(frozen=True)
class _Input:
    """A tensor over an input, among the arguments of an operation."""

    number: int
    like: Tensor
    begin: int

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        x, like = inputs[self.number], self.like
        return torch.as_strided(x, like.shape, like.stride(), x.storage_offset() + self.begin)


def _given(value: Any, inputs: Sequence[Tensor]) -> Any:
    """Arguments of an operation, with the inputs that there are now."""
    if isinstance(value, _Input):
        return value.of(inputs)
    if isinstance(value, (list, tuple)):
        return type(value)(_given(x, inputs) for x in value)
    if isinstance(value, dict):
        return {k: _given(x, inputs) for k, x in value.items()}
    return value
