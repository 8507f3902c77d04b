"""What an op asks before it goes past torch: who else must see the call, and where the numbers are.

Eager calls skip torch's dispatcher, which costs more than the rest of a small call, and hand a
tensor's address to a kernel. Both are wrong of some tensors and at some times. They are all found
here, as no address is taken anywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Under this lies nothing: an address so low is an offset into a storage that was given back.
LOWEST_ADDRESS = 2**40

_dispatch_modes = torch._C._len_torch_dispatch_stack
_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_jit_trace = torch._C._get_tracing_state


class NotPlain(TypeError):
    """A tensor whose numbers do not lie in memory as they are. The dispatcher may know better."""


def recorded() -> bool:
    """Whether a call must go through the dispatcher, so that what records calls sees one.

    That is torch.compile and torch.export, jit.trace, and every dispatch mode: make_fx, fake
    tensors, counters of operations. Wrappers of tensors, as functorch has them, are found by
    `address`.
    """
    return _compiling() or _dispatch_modes() > 0 or _jit_trace() is not None


def unobserved() -> bool:
    """Whether surely nobody looks on: nothing records calls, and autograd is off."""
    return not (
        _compiling()
        or _grad_enabled()
        or _dispatch_modes()
        or _jit_trace() is not None
        or forward_ad._current_level >= 0
    )


def want_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to differentiate by one of them."""
    given = [x for x in tensors if x is not None]
    return (torch.is_grad_enabled() and any(x.requires_grad for x in given)) or _tangent(given)


def check_no_tangents(op: str, advice: str, *tensors: Tensor | None) -> None:
    """Forward-mode derivatives of a registered op would be zeros, as torch has it."""
    if not torch.compiler.is_compiling() and _tangent([x for x in tensors if x is not None]):
        raise RuntimeError(f"{op} has no forward-mode derivative; {advice}")


def _tangent(tensors: Sequence[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def address(x: Tensor, name: str, *, integers: bool = False) -> int:
    """Where a tensor's first number is. A kernel may read all the others from there by strides.

    `integers`: that is their dtype, so that they cannot be the negatives of what lies there.
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
    """The same question, for kernels that take the addresses themselves."""
    for name, given in tensors.items():
        for x in (given,) if isinstance(given, Tensor) else given or ():
            address(x, name)


def check_stored(**tensors: Tensor | None) -> None:
    """Whether tensors that torch's own functions read have their numbers: it does not ask."""
    for name, x in tensors.items():
        if x is not None and x.is_cpu and x.data_ptr() < LOWEST_ADDRESS:
            _check_storage(x, name)


def written(*tensors: Tensor) -> None:
    """Says that tensors are being written into, so that autograd does not use them as they were."""
    torch._C._increment_version(tensors)


def check_places(name: str, x: Tensor) -> None:
    """Whether each number of a tensor that is written into has a place of its own."""
    if any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {list(x.stride())}; it is written into, "
            "so it must have a place for each of its numbers (a clone has)"
        )


def resolved(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that are read, without the negative bit. The dispatcher cannot where others are
    written into."""
    return tuple(x.resolve_neg() for x in tensors)


def check_not_negative(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, x in tensors:
        if x.is_neg():
            raise ValueError(
                f"{name} is a view of the negatives of what lies there; it is written into, so it "
                "must be resolved (`resolve_neg`)"
            )


def check_apart(tensors: Iterable[tuple[str, int]]) -> None:
    """Whether tensors that are written into begin at addresses of their own."""
    seen: dict[int, str] = {}
    for name, at in tensors:
        if at and at in seen:
            raise ValueError(
                f"{name} lies where {seen[at]} does; both are written into, so they must not share "
                "memory"
            )
        seen[at] = name


def check_strided(tensors: Iterable[tuple[str, Any]]) -> None:
    """Asked after an error: it may come of a tensor that is no array of numbers with strides."""
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
