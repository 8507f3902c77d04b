"""What torch is asked to do in a forward, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NotTaped(Exception):
    """Says why a step cannot be replayed. Its modules can run it."""


class Call:
    """An operation of torch's that was called, and what it gave.

    Attributes:
        function: the operation, an `OpOverload`.
        inputs, outputs: the tensors among its arguments, and among what it gave.
        written: the tensors among its arguments that it writes into.
        reads, makes: the storages of `inputs`, and of `outputs` and `written`.
    """

    def __init__(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        self.function, self.args, self.kwargs, self.result = function, args, kwargs, result
        self.inputs = [*tensors_of(args), *tensors_of(kwargs)]
        self.outputs = list(tensors_of(result))
        self.written: list[Tensor] = []
        if function._schema.is_mutable:
            for i, argument in enumerate(function._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(argument.name)
                    self.written += tensors_of(value)
        self.reads = {storage(x) for x in self.inputs}
        self.makes = {storage(x) for x in (*self.outputs, *self.written)}

    @property
    def name(self) -> str:
        return str(self.function)


class Recorder(TorchDispatchMode):
    """Runs operations as they are, and keeps them. Composite ones are kept as what they consist of.

    Attributes:
        calls: what was called, in order. Tensors stay alive, so that no two share an address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # In inference mode composite operations come whole.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        self.calls.append(Call(func, args, kwargs, result))
        return result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from tensors_of(x)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def with_tensors(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """Nested lists, tuples and dicts with other things in the place of tensors."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(x, replace) for x in value)
    if isinstance(value, dict):
        return {k: with_tensors(x, replace) for k, x in value.items()}
    return value


def storage(x: Tensor) -> int:
    """What is equal for tensors that share memory."""
    return x.untyped_storage()._cdata


def changing(calls: Sequence[Call], inputs: Sequence[Tensor], fixed: set[int]) -> set[int]:
    """The storages whose numbers may differ from one forward to the next.

    These are the inputs, what is computed from them, and tensors of nobody's that the forward only
    reads: somebody may write into them.

    Args:
        fixed: the storages of a model's weights and buffers.

    Raises:
        NotTaped: names an operation whose results cannot be replayed.
    """
    made = {key for call in calls for x in call.outputs for key in (storage(x),)}
    found = {storage(x) for x in inputs}
    found |= {key for call in calls for key in call.reads} - made - fixed
    count = -1
    while count != len(found):
        count = len(found)
        for call in calls:
            moves = not found.isdisjoint(call.reads)
            # A tensor that is filled before it is written into is filled anew each time.
            if moves or not found.isdisjoint(call.makes):
                _check(call, moves, fixed)
                found |= call.makes
    return found


def _check(call: Call, moves: bool, fixed: set[int]) -> None:
    if torch.Tag.nondeterministic_seeded in call.function.tags:
        raise NotTaped(f"it draws numbers ({call.name})")
    if moves and _shape_depends_on_numbers(call):
        raise NotTaped(f"what it does depends on its numbers ({call.name})")
    if any(storage(x) in fixed for x in call.written):
        raise NotTaped(f"it writes into its weights ({call.name})")


def _shape_depends_on_numbers(call: Call) -> bool:
    if call.name == "aten.index.Tensor":  # Its tag is for masks.
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(call.args[1]))
    tags = call.function.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
