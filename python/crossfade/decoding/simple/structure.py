"""Remembers what was found out about a model, for as long as the model stays as it was.

Some findings take a few forwards, such as whether the engine can run a model. They hold until
something of the model changes that they may depend on: that is its `structure`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from ...models.hf import text_config

# Libraries whose hooks do not count their calls, so that they may see more forwards than asked for.
LIBRARIES = {"torch", "transformers", "peft", "accelerate", "trl", "crossfade"}
KEPT = 8  # how many findings of a model are remembered: each adapter may have some of its own

Structure = tuple[list[object], dict[str, object]]

# Of each model, by the question that was asked: its structure then, and the finding.
_found: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[object, Any]]]
_found = weakref.WeakKeyDictionary()


def remembered(
    model: nn.Module, now: object, question: Hashable, find: Callable[[], tuple[Any, bool]]
) -> Any:
    """What was found of a model with the structure `now`, or what `find` gives.

    Where it depends on other models too, `now` is the list of all their structures.

    Args:
        find: gives what it finds, and whether that may be kept for later calls.
    """
    then, found = _found.get(model, {}).get(question, (None, None))
    if then == now:
        return found
    found, may_keep = find()
    if may_keep:
        keep(model, now, question, found)
    else:
        _found.get(model, {}).pop(question, None)
    return found


def known(model: nn.Module, now: object, question: Hashable) -> Any:
    """What was found of a model with the structure `now`; None if nothing was."""
    then, found = _found.get(model, {}).get(question, (None, None))
    return found if then == now else None


def keep(model: nn.Module, now: object, question: Hashable, found: Any) -> None:
    """Remember what was found of a model with the structure `now`."""
    findings = _found.setdefault(model, {})
    findings.pop(question, None)
    findings[question] = now, found
    for old in list(findings)[:-KEPT]:
        findings.pop(old, None)  # Another thread may have dropped it already.


def structure(model: nn.Module) -> Structure:
    """A description that stays equal until a model's modules, hooks, modes or config change.

    Weights are not looked at, only their dtypes and devices. The description holds modules and
    functions by weak references alone, so that remembering it keeps nothing alive.
    """
    return list(map(_of_module, model.modules())), dict(vars(text_config(model)))


def _of_module(module: Any) -> tuple[object, ...]:
    own = vars(module)
    forward = own.get("forward")
    adapters: tuple[object, ...] = ()
    if "_active_adapter" in own:  # It is a layer of PEFT's, with adapters on, off or merged.
        merged = tuple(own.get("merged_adapters", ()))
        adapters = str(own["_active_adapter"]), own.get("_disable_adapters"), merged
    return (
        weakref.ref(module),
        _reference(type(module).forward),
        forward and _reference(forward),
        tuple(own["_forward_hooks"]),  # Torch numbers hooks, and no number comes twice.
        tuple(own["_forward_pre_hooks"]),
        own["training"],
        [(type(p), p.dtype, p.device) for p in own["_parameters"].values() if p is not None],
        adapters,
    )


def _reference(x: Any) -> object:
    """What an object is known by: it equals no other object's, even if that has its old address."""
    try:
        return weakref.ref(x)
    except TypeError:  # None, and objects of C, have no weak references.
        return x


def why_as_it_is(model: nn.Module) -> str | None:
    """Why a model must be called as `model.generate` calls it, and in no other way.

    A hook may count its calls, or change the last token of what it takes for a prompt; a compiled
    module runs what it has compiled, whatever its forward has become since; dropout draws numbers
    for each call.
    """
    module: Any
    for module in model.modules():
        own = vars(module)
        kind = type(module)
        compiled = "forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable")
        if compiled or kind.__name__ == "OptimizedModule":
            return f"{_place(model, module)} is compiled"
        if issubclass(kind, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return "it has dropout and is in training mode"
        hooks = own["_forward_hooks"], own["_forward_pre_hooks"]
        if any(hooks) and not all(_is_known(hook) for each in hooks for hook in each.values()):
            return f"{_place(model, module)} has a forward hook"
    if not all(map(_is_known, _global_hooks())):
        return "all modules have a forward hook"
    return None


def foreign_module(model: nn.Module) -> str | None:
    """The name of a module whose forward is of the caller's own, and may do more than compute.

    None where all are of libraries, or of a model's own code on the hub.
    """
    for name, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if "forward" in vars(module) or package not in {*LIBRARIES, "transformers_modules"}:
            return name or "it"
    return None


def _global_hooks() -> Iterator[Any]:
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        yield from getattr(torch.nn.modules.module, name).values()


def _is_known(hook: Callable[..., Any]) -> bool:
    function: Any = hook
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    return name.partition(".")[0] in LIBRARIES


def _place(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, m in model.named_modules() if m is module and name), "it")
