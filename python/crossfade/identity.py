"""The identity of a run: a hash of all that decides its tokens, the same in every process.

Only the run that began a file of results may go on with it. Which run that is, is said here and
nowhere else. The hash depends on

- the blend and the search: their formulas, names, prompts and settings; of each model the class,
  config, saved generation settings, adapters, hooks and every byte of the weights; of each
  tokenizer the vocabulary, rules and chat template;
- the seed, and the settings that `generate` was called with, as they were given;
- functions: their compiled code, their defaults, and the values that they close over or read from
  their module. A function of an installed package counts by its name, so that an update of the
  package does not make a new run;
- the version of crossfade, because its loops and its noise draw the tokens.

It does not depend on where a model was loaded from, the device, the batch size, or the versions of
other packages, which change no more than the rounding of numbers.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

CHUNK = 1 << 26  # bytes of a tensor that are copied from a device at a time
# Keys of configs that say where a model was saved or how it runs, and not what it computes.
PLACES = {
    *("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype"),
    *(
        "architectures",
        "use_cache",
        "_attn_implementation",
        "_experts_implementation",
        "_from_model_config",
    ),
    *("base_model_name_or_path", "revision", "inference_mode"),  # PEFT's
}
# Attributes of PEFT's layers that change what these compute and are not tensors.
LAYER_STATE = ("scaling", "active_adapters", "merged_adapters", "disable_adapters")


def run_id(**parts: Any) -> str:
    """The hash of a run that is made of some parts, such as its blend, seed and settings.

    Raises:
        TypeError: a part holds something that cannot be compared between processes, such as an open
            file; names the part.
        ValueError: a model has weights without data, on the "meta" device.
    """
    return run_ids([parts])[0]


def run_ids(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The hash of each of several runs, as `run_id` gives it. What they share is read once."""
    describer = _Describer()
    version = metadata.version("crossfade")
    found = [{name: describer.of(x, name) for name, x in parts.items()} for parts in runs]
    return [_digest([version, parts])[:16] for parts in found]


class _Describer:
    """Describes objects as JSON: plain data as it is, everything else by a hash of its parts."""

    def __init__(self) -> None:
        self.done: dict[int, str] = {}
        self.under_way: list[int] = []
        # hashes of tensors' bytes by their place in memory, as models may share weights
        self.hashes: dict[Any, str] = {}
        # all objects that were described: while they live, nothing else has their id or memory
        self.kept: list[Any] = []

    def of(self, x: Any, where: str) -> Any:
        if x is None or (isinstance(x, (bool, int, float, str)) and not isinstance(x, enum.Enum)):
            return x
        if id(x) in self.under_way:
            return f"cycle {len(self.under_way) - self.under_way.index(id(x))}"
        if id(x) not in self.done:
            self.kept.append(x)
            self.under_way.append(id(x))
            try:
                parts = self._parts(x, where)
            except RecursionError:
                raise _unknown(where, x) from None
            finally:
                self.under_way.pop()
            self.done[id(x)] = _digest(parts)
        return self.done[id(x)]

    def _parts(self, x: Any, where: str) -> Any:
        if isinstance(x, enum.Enum):
            return ["enum", _name(type(x)), x.name]
        if isinstance(x, (bytes, bytearray)):
            return ["bytes", hashlib.sha256(x).hexdigest()]
        if isinstance(x, (torch.dtype, torch.device, torch.layout, PurePath)):
            return [type(x).__name__, str(x)]
        if isinstance(x, Tensor):
            return self._tensor(x, where)
        if isinstance(x, Mapping):
            pairs = [[self.of(k, where), self.of(v, f"{where}[{k!r:.40}]")] for k, v in x.items()]
            return ["mapping", _sorted(pairs)]
        if isinstance(x, (list, tuple)):
            return ["list", [self.of(y, where) for y in x]]
        if isinstance(x, (set, frozenset)):
            return ["set", _sorted([self.of(y, where) for y in x])]
        if isinstance(x, PreTrainedTokenizerBase):
            return self._tokenizer(x, where)
        if isinstance(x, nn.Module):
            return self._model(x, where)
        if isinstance(x, (PretrainedConfig, GenerationConfig)):
            return [_name(type(x)), self.of(_without_places(x.to_dict()), where)]
        if isinstance(x, types.CodeType):
            return self._code(x, where)
        if isinstance(x, types.FunctionType):
            return self._function(x, where)
        if isinstance(x, types.MethodType):
            return ["method", self.of(x.__func__, where), self.of(x.__self__, f"self of {where}")]
        if isinstance(x, type):
            return self._class(x, where)
        if isinstance(x, types.ModuleType):
            return ["module", x.__name__]
        if isinstance(x, types.BuiltinFunctionType) and isinstance(
            x.__self__, (types.ModuleType, type(None))
        ):
            return ["builtin", _name(x)]
        if dataclasses.is_dataclass(x):
            fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
            if hasattr(x, "peft_type"):
                fields = _without_places(fields)
            return [
                self.of(type(x), where),
                {name: self.of(y, f"{name} of {where}") for name, y in fields.items()},
            ]
        return self._reduced(x, where)

    def _reduced(self, x: Any, where: str) -> Any:
        """Describe an object by what pickle would save of it; nothing is pickled."""
        try:
            reduced = x.__reduce_ex__(4)
        except Exception:
            raise _unknown(where, x) from None
        if isinstance(reduced, str):
            wrapped = getattr(x, "__wrapped__", None)  # the function inside functools.cache
            return ["global", _name(type(x)), reduced, self.of(wrapped, where)]
        make, arguments, *rest = reduced
        state, items, pairs = (*rest, None, None, None)[:3]
        return [
            self.of(type(x), where),
            self.of(make, where),
            self.of(arguments, where),
            self.of(state, where),
            self.of(None if items is None else list(items), where),
            self.of(None if pairs is None else dict(pairs), where),
        ]

    def _model(self, model: nn.Module, where: str) -> Any:
        tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        self.kept.append(tensors)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            hashes = pool.map(lambda n: self._tensor(tensors[n], f"{n} of {where}"), tensors)
            weights = dict(zip(tensors, hashes, strict=True))
        settings = [
            self.of(getattr(model, name, None), f"{name} of {where}")
            for name in ("config", "generation_config", "peft_config")
        ]
        layers = []
        for name, module in model.named_modules():
            state = {
                key: getattr(module, key)
                for key in LAYER_STATE
                if "merged_adapters" in vars(module) and hasattr(module, key)  # only PEFT's layers
            }
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            if state or hooks:
                layers.append([name, self.of([state, hooks], f"{name} of {where}")])
        return [self.of(type(model), where), weights, settings, layers]

    def _tensor(self, x: Tensor, where: str) -> Any:
        """Describe a tensor by its dtype, shape and bytes, and not by its device."""
        if x.is_meta:
            raise ValueError(
                f"{where} is a tensor without data, on the device meta; it must be loaded"
            )
        form = [str(x.dtype), list(x.shape)]
        try:
            place = (x.data_ptr(), x.device, x.stride(), *form[:1], x.shape)
            if place not in self.hashes:
                digest = hashlib.sha256()
                data = x.detach().contiguous().reshape(-1).view(torch.uint8)
                for part in data.split(CHUNK):
                    digest.update(part.cpu().numpy())
                self.hashes[place] = digest.hexdigest()
        except (
            RuntimeError,
            TypeError,
            NotImplementedError,
        ):  # it has no plain bytes
            raise _unknown(where, x) from None
        return [*form, self.hashes[place]]

    def _tokenizer(self, tokenizer: Any, where: str) -> Any:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is not None:
            # before "added_tokens" stand padding and truncation, as the last call left them
            rules: Any = core.to_str().partition('"added_tokens"')[1:]
        else:
            rules = tokenizer.get_vocab()
        kept = {
            name: getattr(tokenizer, name, None)
            for name in ("chat_template", "add_bos_token", "add_eos_token")
        }
        special = {name: str(x) for name, x in tokenizer.special_tokens_map.items()}
        return [_name(type(tokenizer)), _digest(rules), special, self.of(kept, where)]

    def _function(self, fn: types.FunctionType, where: str) -> Any:
        name = [fn.__module__, fn.__qualname__]
        if _is_installed(fn.__module__) and fn.__closure__ is None and _is_global(fn):
            return ["function", name]
        values = dict(zip(fn.__code__.co_freevars, map(_cell, fn.__closure__ or ()), strict=True))
        closed = {key: self.of(x, f"{key!r} in {where}") for key, x in values.items()}
        return [
            *("function", name, self.of(fn.__code__, where), closed),
            self.of([fn.__defaults__, fn.__kwdefaults__], f"a default in {where}"),
            None if _is_installed(fn.__module__) else self._globals(fn, where),
        ]

    def _globals(self, fn: types.FunctionType, where: str) -> Any:
        """Describe the names of its module that a function uses.

        Plain data, and functions and classes of the same module, are described by what they hold;
        everything else by its name.
        """
        found = {}
        for name in sorted(_global_names(fn.__code__) & fn.__globals__.keys()):
            x = fn.__globals__[name]
            own = getattr(x, "__module__", None) == fn.__module__
            if _is_plain(x) or (own and isinstance(x, (types.FunctionType, type))):
                found[name] = self.of(x, f"{name!r} in {where}")
            else:
                found[name] = _name(x if hasattr(x, "__qualname__") else type(x))
        return found

    def _class(self, cls: type, where: str) -> Any:
        name = ["class", _name(cls)]
        if _is_installed(cls.__module__):
            return name
        members = {key: getattr(x, "__func__", x) for key, x in vars(cls).items()}
        members = {key: getattr(x, "fget", x) for key, x in members.items()}
        described = {}
        for key, x in members.items():
            if key in ("__doc__", "__firstlineno__"):
                continue
            if isinstance(x, types.FunctionType):
                try:
                    described[key] = self.of(x, f"{key} of {where}")
                except TypeError:  # it closes over what cannot be compared; its code can
                    described[key] = self.of(x.__code__, where)
            elif _is_plain(x):
                described[key] = self.of(x, f"{key} of {where}")
        return [name, described, [self.of(base, where) for base in cls.__bases__]]

    def _code(self, code: types.CodeType, where: str) -> Any:
        return [
            code.co_code.hex(),
            [self.of(x, where) for x in code.co_consts],
            [code.co_names, code.co_varnames, code.co_freevars],
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
        ]


def _digest(x: Any) -> str:
    return hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()


def _sorted(parts: list[Any]) -> list[Any]:
    return sorted(parts, key=lambda part: json.dumps(part, sort_keys=True))


def _name(x: Any) -> str:
    return f"{getattr(x, '__module__', None)}.{getattr(x, '__qualname__', x)}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has not been set yet
        return "empty cell"


def _is_plain(x: Any) -> bool:
    if isinstance(x, (list, tuple, set, frozenset)):
        return all(map(_is_plain, x))
    if isinstance(x, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in x.items())
    return x is None or isinstance(x, (bool, int, float, complex, str, bytes))


def _without_places(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_places(x) if isinstance(x, Mapping) else x
        for name, x in fields.items()
        if name not in PLACES and x is not None
    }


def _global_names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))


def _is_global(fn: Any) -> bool:
    """Whether a function can be found in its module by its name, and is not a local one."""
    found: Any = sys.modules.get(fn.__module__)
    for name in fn.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is fn


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to crossfade, to Python itself, or to an installed package."""
    top = (module or "").partition(".")[0]
    if top == "crossfade" or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None or top == "__main__":
        return False
    path = Path(file).resolve()
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    packages = {"site-packages", "dist-packages"}
    return not packages.isdisjoint(path.parts) or not library.isdisjoint(path.parents)


def _unknown(where: str, x: Any) -> TypeError:
    return TypeError(
        f"{where} is or holds a {type(x).__name__}, and no other process could tell whether it has "
        "the same, so that the run has no identity; it must be made of plain data, models, "
        "tokenizers and functions of these"
    )
