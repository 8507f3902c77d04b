"""Where models, adapters, value heads and tokenizers came from, so that a file can name them.

A source is a small object of JSON, with one of these keys:

- ``{"folder": PATH}``;
- ``{"hub": "OWNER/NAME", "revision": COMMIT}``, the revision only where it is known;
- ``{"model": "smollm2"}``, the small model that `crossfade.models.smollm2` gives;
- ``{"guide": NAME}``, an adapter or a value head that comes with crossfade.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..extras import require
from . import saved, saved_adapters, saved_value_heads, small_model
from .adapters import adapter_configs
from .hf import underlying
from .value_heads import value_head

Source = dict[str, str]

KINDS = ("folder", "hub", "model", "guide")
# A folder of the Hugging Face cache, which names the model and its revision.
SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$")
ROWS = 2  # of each tensor in a file that are compared with the model's


def named(name: str | os.PathLike[str]) -> Source | None:
    """The source that a text means, which is a folder, an id on the hub, "smollm2" or a guide.

    None: it is none of these.
    """
    if not name:
        return None
    folder = saved.expanded(name)
    if folder.is_dir():
        path = folder.resolve()
        if path == small_model.path().resolve():
            return {"model": small_model.SMALL_MODEL}
        for guide in small_model.GUIDES:
            if path == small_model.guide(guide).resolve():
                return {"guide": guide}
        if found := SNAPSHOT.search(str(path)):
            owner, model, revision = found.groups()
            return {"hub": f"{owner}/{model}", "revision": revision}
        return {"folder": str(path)}
    if name == small_model.SMALL_MODEL:
        return {"model": small_model.SMALL_MODEL}
    if name in small_model.GUIDES:
        return {"guide": str(name)}
    if isinstance(name, str) and saved.HUB_ID.fullmatch(name) and not folder.parent.exists():
        return {"hub": name}
    return None


def of_model(model: Any) -> Source | None:
    """Where a model was loaded from, as Transformers and `crossfade.models.load` note it."""
    config = underlying(model).config
    source = named(str(getattr(config, "name_or_path", "") or ""))
    commit = getattr(config, "_commit_hash", None)
    if source is not None and "hub" in source and commit:
        source.setdefault("revision", commit)
    return source


def of_tokenizer(tokenizer: Any) -> Source | None:
    """Where a tokenizer was loaded from."""
    return named(str(getattr(tokenizer, "name_or_path", "") or ""))


def of_adapter(model: Any, adapter: str) -> Source | None:
    """Where an adapter was loaded from, if it was by `crossfade.models.with_adapters`."""
    folder = getattr(adapter_configs(model)[adapter], saved_adapters.LOADED_FROM, None)
    return None if folder is None else named(folder)


def of_head(model: Any) -> Source | None:
    """Where a value head was last saved or loaded by `save_value_head` or `load_value_head`."""
    folder = getattr(underlying(model), saved_value_heads.LOADED_FROM, None)
    return None if folder is None else named(folder)


def folder_of(source: Source, beside: Path) -> Path:
    """The folder of a source, which is downloaded if it is on the hub and not in the cache.

    Args:
        beside: what paths that are not absolute begin at.

    Raises:
        OSError: there is no such folder.
    """
    if "folder" in source:
        folder = beside / saved.expanded(source["folder"])
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")
        return folder
    if "hub" in source:
        return saved.download(source["hub"], source.get("revision"))
    if "guide" in source:
        return small_model.guide(source["guide"])
    return small_model.folder_of(source["model"])


def on_disk(source: Source) -> Path | None:
    """The folder of a source if it is on this machine; nothing is downloaded or built."""
    if "hub" in source:
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    source["hub"], revision=source.get("revision"), local_files_only=True
                )
            )
        except Exception:  # the hub's client raises errors of many kinds
            return None
    if "model" in source:
        return small_model.path() if small_model.is_cached() else None
    return folder_of(source, Path())


def changed_weight(model: Any, folder: Path) -> str | None:
    """A weight of a model that is not as in the folder that it came from; None if all seem to be.

    The first rows of each tensor are compared, those of floats in the model's dtype. Adapters are
    not looked at.
    """
    own = {_plain(name): x for name, x in underlying(model).state_dict().items()}
    for name, shape, rows in _saved_rows(folder):
        x = own.get(name)
        if not isinstance(x, Tensor) or x.is_meta:
            continue
        if list(x.shape) != shape:
            return name
        y = rows()
        alike = x.is_floating_point() == y.is_floating_point()
        if not (alike and torch.equal((x[:ROWS] if shape else x).cpu(), y.to(x.dtype))):
            return name
    return None


def changed_adapter(model: Any, adapter: str, folder: Path) -> str | None:
    """A weight of an adapter that is not as in a folder; None if there is none."""
    peft = require("peft", "adapters")
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return _difference(state, load_file(folder / saved_adapters.ADAPTER))


def changed_head(model: Any, folder: Path) -> str | None:
    """A weight of a value head, or of its adapter, that is not as in a folder."""
    found = _difference(
        value_head(model).state_dict(), load_file(folder / saved_value_heads.WEIGHTS)
    )
    for adapter in adapter_configs(model):
        there = (folder / saved_adapters.ADAPTER).is_file()
        found = found or (changed_adapter(model, adapter, folder) if there else adapter)
    return found


def _difference(own: dict[str, Tensor], there: dict[str, Tensor]) -> str | None:
    for name, x in own.items():
        y = there.get(name)
        if y is None or x.shape != y.shape or not torch.equal(x.detach().cpu(), y.to(x.dtype)):
            return name
    return None


def _plain(name: str) -> str:
    """The name that a weight has without PEFT's layers around it."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _saved_rows(folder: Path) -> Iterator[tuple[str, list[int], Any]]:
    """The name, the shape and a reader of the first rows of each tensor in a model's folder."""
    for file in saved.weight_files(folder):
        if not file.endswith(".safetensors"):
            continue
        with saved.errors_of(folder), safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                part = opened.get_slice(name)
                shape = list(part.get_shape())

                def rows(name: str = name, part: Any = part, shape: list[int] = shape) -> Tensor:
                    return part[:ROWS] if shape else opened.get_tensor(name)

                yield name, shape, rows
