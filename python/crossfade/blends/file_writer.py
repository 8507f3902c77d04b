"""Writes a blend, and where its models came from, as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import reading
from ..checks import did_you_mean
from ..models import SMALL_MODEL, saved, saved_adapters, sources
from ..models.adapters import active_adapters, adapter_configs
from ..models.hf import underlying
from ..models.sources import Source
from ..models.value_heads import value_head
from .file_format import AUTO, DTYPES, FORMAT, Member, check


class _Writer:
    """Finds the sources of a blend's models, and refuses what a file could not name rightly.

    Args:
        path: the file.
        given: the caller's sources, by the names that `Blend.save` tells.

    Attributes:
        asked: the names that the caller may give sources for.
        models: the file's ``models``, by the name of the first member that each of them computes.
        objects: the models themselves.
    """

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self.path, self.given = path, given
        self.asked: set[str] = set()
        self.models: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, Any] = {}

    def write(self, d: dict[str, Any], members: Sequence[Member]) -> dict[str, Any]:
        """What the file holds; `d` is what `Blend.to_dict` gives, whose entries get more keys."""
        for member, entry in zip(members, [*d["terms"], *d["values"]], strict=True):
            key = (self._value if member.is_value else self._term)(member, entry)
            entry |= {"model": key, "tokenizer": self._tokenizer(member, key)}
        for name in self.given:
            if name not in self.asked:
                raise ValueError(
                    f"sources has {name!r}; it must have names of {sorted(self.asked)}"
                    f"{did_you_mean(name, self.asked)}"
                )
        return {"format": FORMAT, **d, "models": self.models}

    def _term(self, member: Member, entry: dict[str, Any]) -> str:
        name, model = member.name, member.model
        key = self._model(name, model)
        if entry["adapter"] == "active" and adapter_configs(model):
            active = sorted(active_adapters(model))
            if len(active) > 1:
                raise ValueError(
                    f"{name} has the adapters {active} active at a time, which a file cannot say; "
                    f"it must have one, as Model(..., adapter={active[0]!r}) has"
                )
            entry["adapter"] = active[0] if active else None
        if entry["adapter"] not in (None, "active"):
            mixed = isinstance(entry["adapter"], dict)
            for adapter in entry["adapter"] if mixed else [entry["adapter"]]:
                self._adapter(key, model, adapter)
        return key

    def _value(self, member: Member, entry: dict[str, Any]) -> str:
        name, model = member.name, member.model
        entry |= {"head": None, "head_dtype": None}
        if not hasattr(underlying(model), "value_kind"):  # It is a whole model.
            return self._model(name, model)
        what = f"the value head {name}"
        head = self._source(name, sources.of_head(model), what, "save_value_head")
        if head is None:
            return self._add(name, model, None)
        self._check(what, name, sources.on_disk(head), sources.changed_head, model)
        dtype = next(value_head(model).parameters()).dtype
        entry |= {"head": self._near(head), "head_dtype": _name_of(dtype)}
        return self._model(name, model, f"{name}@backbone")

    def _model(self, name: str, model: Any, asked: str | None = None) -> str:
        """The key of a model among those of the file, to which it is added if need be.

        Args:
            asked: for the backbone of a value head, the name by which the caller gives its source.
        """
        bare: Any = underlying(model)
        for key, known in self.objects.items():
            if known is bare or (asked is not None and _share(known, bare)):
                return key
        what = f"the model of {name}"
        source = self._source(asked or name, sources.of_model(bare), what, "save_pretrained")
        if source is None:
            return self._add(name, model, None)
        if type(bare).__module__.startswith("transformers_modules"):
            why = "runs code that came with it, which is not loaded"
        elif getattr(bare.config, "quantization_config", None) is not None:
            why = "is quantized, which a file cannot say"
        else:
            why = None
        if why is not None:
            raise ValueError(f"{what} {why}; {_brought(asked or name)}")
        folder = sources.on_disk(source)
        if folder is not None:
            saved.check_model_folder(folder)
        self._check(what, asked or name, folder, sources.changed_weight, bare)
        return self._add(name, model, source)

    def _add(self, name: str, model: Any, source: Source | None) -> str:
        bare = self.objects[name] = underlying(model)
        dtypes = {_name_of(p.dtype) for p in bare.parameters() if p.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else AUTO
        self.models[name] = {
            "source": self._near(source),
            "class": type(bare).__name__,
            "dtype": dtype if dtype in DTYPES else AUTO,
            "adapters": {},
        }
        return name

    def _adapter(self, key: str, model: Any, adapter: str) -> None:
        entry, asked, what = self.models[key], f"{key}@{adapter}", f"the adapter {adapter} of {key}"
        if entry["source"] is None or adapter in entry["adapters"]:
            return
        source = self._source(asked, sources.of_adapter(model, adapter), what, "save_pretrained")
        if source is None:
            raise ValueError(
                f"sources[{asked!r}] is None; it must be a folder, or {key!r} must be None too"
            )
        folder = sources.on_disk(source)
        if folder is not None:
            saved_adapters.check_adapter_folder(folder, what)

        def changed(model: Any, folder: Path) -> str | None:
            return sources.changed_adapter(model, adapter, folder)

        self._check(what, asked, folder, changed, model)
        entry["adapters"][adapter] = self._near(source)

    def _tokenizer(self, member: Member, key: str) -> Any:
        """True for the one in the model's own folder, None for none, or the source of another."""
        if member.tokenizer is None:
            return None
        own, found = self.models[key]["source"], sources.of_tokenizer(member.tokenizer)
        if own is None:
            return True  # It comes with the model.
        if found is None:
            path = getattr(member.tokenizer, "name_or_path", "")
            raise ValueError(
                f"the tokenizer of {member.name} has no known source (its name_or_path is "
                f"{path!r}); save it with save_pretrained, and load it from there"
            )
        return True if self._near(found) == own else self._near(found)

    def _source(self, name: str, found: Source | None, what: str, saves: str) -> Source | None:
        """The source that the caller gives, or else the one that was found.

        Args:
            name: the caller's name for it.
            what: what errors call what it is a source of.
            saves: the function that saves it.

        Returns:
            None if the caller says that it is not to be named.
        """
        self.asked.add(name)
        if name in self.given:
            given = self.given[name]
            if given is not None and not isinstance(given, (str, os.PathLike)):
                raise TypeError(
                    f"sources[{name!r}] is a {type(given).__name__}; it must be a path, a name or "
                    "None"
                )
            found = None if given is None else sources.named(given)
            if given is not None and found is None:
                raise FileNotFoundError(
                    f"sources[{name!r}] is {str(given)!r}; it must be a folder, OWNER/NAME on the "
                    f"Hugging Face hub, {SMALL_MODEL!r}, a guide that ships, or None"
                )
        elif found is None:
            other = "" if "@" in name else f". Or {_brought(name)}"
            raise ValueError(
                f"{what} has no known source; save it with {saves}, and pass "
                f"sources={{{name!r}: FOLDER}}{other}"
            )
        return found

    def _check(
        self,
        what: str,
        name: str,
        folder: Path | None,
        changed: Callable[[Any, Path], str | None],
        model: Any,
    ) -> None:
        """Refuse what has other weights than its source, such as a model that was trained on."""
        weight = None if folder is None else changed(model, folder)
        if weight is not None:
            raise ValueError(
                f"{what} has another {weight} than {str(folder)!r}, which is named as its source; "
                f"a file holds no weights: save them, and pass sources={{{name!r}: FOLDER}}"
            )

    def _near(self, source: Source | None) -> Source | None:
        """A source whose folder is written relative to the file if it is below the file's own."""
        if source is None or "folder" not in source:
            return source
        folder, home = Path(source["folder"]), self.path.resolve().parent
        below = folder == home or home in folder.parents
        return {"folder": (folder.relative_to(home) if below else folder).as_posix()}


def write(
    path: str | os.PathLike[str],
    d: dict[str, Any],
    members: Sequence[Member],
    given: Mapping[str, Any] | None = None,
) -> None:
    """Write a blend, as `Blend.to_dict` gives it, and the sources of its models."""
    file = saved.expanded(path)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"sources is a {type(given).__name__}; it must be a mapping, such as {{'base': FOLDER}}"
        )
    whole = _Writer(file, given or {}).write(d, members)
    # What could not be read again is not written, and a file that is there stays as it is.
    check(whole, str(file))
    reading.check_unicode(whole, str(file))
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _brought(name: str) -> str:
    return f"pass sources={{{name!r}: None}}, and give the model to Blend.load"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share(a: Any, b: Any) -> bool:
    """Whether two models hold the same embeddings, as a value model and its backbone do."""
    layers = [m.get_input_embeddings() for m in (a, b) if hasattr(m, "get_input_embeddings")]
    return len(layers) == 2 and layers[0].weight.data_ptr() == layers[1].weight.data_ptr() != 0
