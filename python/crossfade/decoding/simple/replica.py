"""A copy of a model's modules over the same weights, which can be changed where a model cannot."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
# Dicts of every module that each copy has for itself, as somebody may write into them.
OWN = {
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
}
OWN |= HOOKS
SHARED = set(vars(nn.Module())) - OWN - {"_compiled_call_impl"}
AS_THEY_ARE = {bool, int, float, str, type(None)}  # Attributes of these types hold no modules.


class Replica:
    """The modules and configs of a model, copied; the weights are the model's own.

    Decoding runs a model in ways of its own: by other kernels, with attention over its own caches,
    under the adapter of a term. It does so in a replica that lasts for one call. So the model
    itself is never changed: other threads, hooks and callbacks may run it, or decode with it, at
    any time. The call keeps the adapters and hooks that the model has when it starts.

    Attributes:
        model: the copy of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._twins: dict[Any, nn.Module] = {m: object.__new__(type(m)) for m in _tree(model)}
        configs: dict[int, Any] = {}
        for module, twin in self._twins.items():
            state = twin.__dict__
            state.update(module.__dict__)
            for name, value in module.__dict__.items():
                if name in SHARED or type(value) in AS_THEY_ARE:
                    continue
                if name in OWN and not value:  # Most are empty.
                    state[name] = type(value)()
                else:
                    state[name] = self._attribute(module, name, value, configs)
        self.model: Any = self._twins[model]

    def __getitem__(self, module: nn.Module) -> Any:
        """The copy of one of the model's modules."""
        return self._twins[module]

    def install(self, forwards: Mapping[Any, Callable[..., Any]]) -> None:
        """Give the copies of some of the model's modules other forwards.

        A forward must not refer to a copy, which would then stay in memory until the garbage
        collector finds it.
        """
        for module, forward in forwards.items():
            self._twins[module].__dict__["forward"] = forward

    def silence(self) -> None:
        """Let no module warn of padding: it would look at the ids of every forward."""
        for twin in self._twins.values():
            if isinstance(twin, PreTrainedModel):
                twin.__dict__["warn_if_padding_and_no_attention_mask"] = _no_warning

    def _attribute(self, module: nn.Module, name: str, value: Any, configs: dict[int, Any]) -> Any:
        """What the copy of `module` gets as one of its attributes."""
        if name in ("_parameters", "_buffers"):
            return value.copy()
        if name in OWN:
            own = value.copy()
            for key, x in value.items():
                own[key] = self._hook(module, x) if name in HOOKS else self._mapped(x)
            return own
        if name == "_compiled_call_impl":  # `Module.compile` made it for the model's own forward.
            return None
        if isinstance(value, PreTrainedConfig):
            return copy.deepcopy(value, configs)
        return self._mapped(value)

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook as the copy has it: a module's method becomes its copy's, any other is still shown
        the module that it was made for."""
        own = self._mapped(hook) if type(hook) is types.MethodType else hook
        return functools.partial(_show, module, hook) if own is hook else own

    def _mapped(self, value: Any) -> Any:
        """`value` with copies in place of the model's modules; itself where it has none."""
        if isinstance(value, nn.Module):
            return self._twins.get(value, value)
        kind = type(value)
        if kind is types.MethodType:
            owner, function = self._mapped(value.__self__), self._mapped(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if kind is functools.partial:
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = mapped = tuple(map(self._mapped, parts))
            return value if _same(mapped, parts) else functools.partial(func, *args, **keywords)
        if kind is types.FunctionType and value.__closure__:
            return self._function(value)
        if kind in (list, tuple):
            items = [self._mapped(x) for x in value]
            return value if _same(items, value) else kind(items)
        if kind is dict:
            items = [self._mapped(x) for x in value.values()]
            return value if _same(items, value.values()) else dict(zip(value, items, strict=True))
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function that somebody put into a module, closing over modules or their methods."""
        cells = tuple(map(self._cell, function.__closure__ or ()))
        if _same(cells, function.__closure__ or ()):
            return function
        copied = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied

    def _cell(self, cell: Any) -> Any:
        try:
            content = cell.cell_contents
        except ValueError:  # The cell is empty.
            return cell
        if not isinstance(content, (nn.Module, types.MethodType)):
            return cell
        mapped = self._mapped(content)
        return cell if mapped is content else types.CellType(mapped)


def _no_warning(*_: Any, **__: Any) -> None:
    pass


def _tree(module: nn.Module, found: dict[nn.Module, None] | None = None) -> dict[nn.Module, None]:
    """A module and all below it, each once."""
    found = {} if found is None else found
    if module not in found:
        found[module] = None
        for child in module._modules.values():
            if child is not None:
                _tree(child, found)
    return found


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _show(
    module: nn.Module, hook: Callable[..., Any], twin: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Call a hook with the module that it was made for, where the copy ran."""
    return hook(module, *args, **kwargs)
