"""What torch is asked to do in a forward, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NotTaped(Exception):
    """Says why a step cannot be replayed. Its modules can run it."""


class Call(NamedTuple):
    """An operation of torch's that was called, and what it gave."""

    function: Any  # an OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return str(self.function)

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors_of((self.args, self.kwargs)))

    @property
    def outputs(self) -> list[Tensor]:
        return list(tensors_of(self.result))

    @property
    def written(self) -> list[Tensor]:
        """The arguments that the operation writes into."""
        schema = self.function._schema
        found: list[Tensor] = []
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                found += tensors_of(value)
        return found


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
        for x in value.values():
            yield from tensors_of(x)


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
    made = {storage(x) for call in calls for x in call.outputs}
    found = {storage(x) for x in inputs}
    found |= {storage(x) for c in calls for x in c.inputs} - made - fixed
    count = -1
    while count != len(found):
        count = len(found)
        for call in calls:
            moves = any(storage(x) in found for x in call.inputs)
            if not (moves or any(storage(x) in found for x in call.outputs)):
                continue
            _check(call, moves, fixed)
            # A tensor that is filled before it is written into is filled anew each time.
            found |= {storage(x) for x in (*call.outputs, *call.written)}
    return found


def _shape_depends_on_numbers(call: Call) -> bool:
    if call.name == "aten.index.Tensor":  # Its tag is for masks.
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(call.args[1]))
    tags = call.function.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _check(call: Call, moves: bool, fixed: set[int]) -> None:
    tags = call.function.tags
    if torch.Tag.nondeterministic_seeded in tags:
        raise NotTaped(f"it draws numbers ({call.name})")
    if moves and _shape_depends_on_numbers(call):
        raise NotTaped(f"what it does depends on its numbers ({call.name})")
    if any(storage(x) in fixed for x in call.written):
        raise NotTaped(f"it writes into its weights ({call.name})")
