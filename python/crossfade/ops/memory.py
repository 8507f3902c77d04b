"""What an op asks before it goes past torch: who else must see the call, and where the numbers are.

An eager call skips torch's dispatcher, which costs more than the rest of a small call, and hands
the addresses of tensors to a kernel. Neither is right for every tensor and at every time. This file
finds out when they are not; no address is taken anywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# No memory lies below this: so low an address is an offset into a storage that was given back.
LOWEST_ADDRESS = 2**40

_dispatch_modes = torch._C._len_torch_dispatch_stack
_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_jit_trace = torch._C._get_tracing_state


class NotPlain(TypeError):
    """A tensor has no memory that holds its numbers as they are. The dispatcher may help."""


def recorded() -> bool:
    """Whether a call must go through the dispatcher, so that what records calls sees one.

    Calls are recorded by torch.compile, torch.export, jit.trace, and by every dispatch mode:
    make_fx, fake tensors, counters of operations. `address` finds wrapped tensors, such as those of
    functorch.
    """
    return _compiling() or _dispatch_modes() > 0 or _jit_trace() is not None


def unobserved() -> bool:
    """Whether certainly nothing sees the call: nothing records calls, and autograd is off."""
    return not (
        _compiling()
        or _grad_enabled()
        or _dispatch_modes()
        or _jit_trace() is not None
        or forward_ad._current_level >= 0
    )


def want_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to differentiate by one of these tensors."""
    given = [x for x in tensors if x is not None]
    return (torch.is_grad_enabled() and any(x.requires_grad for x in given)) or _tangent(given)


def check_no_tangents(op: str, advice: str, *tensors: Tensor | None) -> None:
    """Refuses forward-mode derivatives: torch would take those of a registered op to be zeros."""
    if not torch.compiler.is_compiling() and _tangent([x for x in tensors if x is not None]):
        raise RuntimeError(f"{op} has no forward-mode derivative; {advice}")


def _tangent(tensors: Sequence[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def address(x: Tensor, name: str, *, integers: bool = False) -> int:
    """The address of a tensor's first number. By its strides, a kernel finds all others from there.

    With `integers` the numbers are not floats, so they cannot be the negatives of what lies there.
    """
    if type(x) is not Tensor and _has_own_dispatch(type(x)):  # there is no need to try
        raise NotPlain(_why(x, name))
    try:
        at = x.data_ptr()
    except RuntimeError as error:  # a wrapper
        raise NotPlain(_why(x, name)) from error
    if at < LOWEST_ADDRESS:
        _check_storage(x, name)
    if not integers and x.is_neg():
        raise NotPlain(_why(x, name))
    return at


def require(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Checks the same, for kernels that take the addresses themselves."""
    for name, given in tensors.items():
        for x in (given,) if isinstance(given, Tensor) else given or ():
            address(x, name)


def check_stored(**tensors: Tensor | None) -> None:
    """Checks that tensors hold their numbers, as torch's own functions read them unchecked."""
    for name, x in tensors.items():
        if x is not None and x.is_cpu and x.data_ptr() < LOWEST_ADDRESS:
            _check_storage(x, name)


def written(*tensors: Tensor) -> None:
    """Tells autograd that tensors are written into, so that it does not use them as they were."""
    torch._C._increment_version(tensors)


def check_places(name: str, x: Tensor) -> None:
    """Checks that each number of a tensor that is written into has a place of its own."""
    if any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {list(x.stride())}; it is written into, "
            "so it must have a place for each of its numbers (a clone has)"
        )


def resolved(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies without the negative bit, for tensors that are read. The dispatcher makes none where
    other arguments of the op are written into."""
    return tuple(x.resolve_neg() for x in tensors)


def check_not_negative(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, x in tensors:
        if x.is_neg():
            raise ValueError(
                f"{name} is a view of the negatives of what lies there; it is written into, so it "
                "must be resolved (`resolve_neg`)"
            )


def check_apart(tensors: Iterable[tuple[str, int]]) -> None:
    """Checks that no two tensors that are written into begin at the same address."""
    seen: dict[int, str] = {}
    for name, at in tensors:
        if at and at in seen:
            raise ValueError(
                f"{name} lies where {seen[at]} does; both are written into, so they must not share "
                "memory"
            )
        seen[at] = name


def check_strided(tensors: Iterable[tuple[str, Any]]) -> None:
    """Called after an error, which may come from a tensor that has no strides."""
    for name, x in tensors:
        if isinstance(x, Tensor) and (x.is_nested or x.layout is not torch.strided):
            layout = "nested" if x.is_nested else x.layout
            raise TypeError(f"{name} has layout {layout}; it must be {torch.strided}")


@functools.cache
def _has_own_dispatch(kind: type[Tensor]) -> bool:
    """Whether a subclass takes torch's calls itself: fake tensors do, parameters do not."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _check_storage(x: Tensor, name: str) -> None:
    if x.numel() == 0:
        return
    try:
        freed = x.untyped_storage().data_ptr() == 0
    except RuntimeError:  # a wrapper
        freed = True
    if freed and (x.is_meta or x._is_zerotensor() or torch._is_functional_tensor(x)):
        raise NotPlain(_why(x, name))
    if freed:
        raise ValueError(
            f"{name} has shape {list(x.shape)} but its storage is empty, as that of an offloaded "
            "or sharded parameter is; it must have its numbers"
        )


def _why(x: Tensor, name: str) -> str:
    what = f"{name} is a {type(x).__name__} of shape {list(x.shape)} on {x.device}"
    return f"{what} without memory of its own; it must have numbers that a kernel can read"
