"""Saved adapters of PEFT, read from safetensors alone, never from pickles, and put onto a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from ..extras import old_names, require
from .hf import is_peft
from .saved import errors_of, expanded, read_object

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT names them
POLICY = "policy.json"  # in a folder of several adapters, as ConditionedPolicy.save makes it
# The attribute of an adapter's config that says which folder it was loaded from.
LOADED_FROM = "crossfade_loaded_from"


def with_adapters(model: Any, folders: Mapping[str, str | os.PathLike[str]]) -> Any:
    """A `peft.PeftModel` around `model` with the adapters saved in `folders`, in eval mode.

    ``cf.Model(it, adapter=name)`` is a term with one of the adapters, and ``adapter=None`` is one
    without any. All these terms share the weights of `model`. PEFT replaces layers in `model`
    itself, so only what is returned should be used from then on.

    Args:
        folders: the folder of each adapter, by the adapter's name.

    Raises:
        FileNotFoundError: a folder lacks the adapter's weights as safetensors (pickles are not
            loaded) or its config; names the folder.
        ValueError: `folders` is empty, or an adapter is incomplete or made for another model.
        ImportError: PEFT is not installed.
    """
    if not folders:
        raise ValueError("folders is empty; it must have at least one adapter")
    for name, folder in folders.items():
        check_adapter_folder(folder, f"folders[{name!r}]")
    for name, folder in folders.items():
        model = add_adapter(model, folder, f"folders[{name!r}]", name)
    return model.eval()


def add_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    where: str,
    name: str = "default",
    *,
    trainable: bool = False,
) -> Any:
    """The `peft.PeftModel` around a model, with one more adapter.

    Args:
        where: what errors call the folder.
        name: the adapter's name in the model.
        trainable: whether the adapter's weights require a gradient.
    """
    check_adapter_folder(folder, where)
    peft, path = require("peft", "adapters"), expanded(folder)
    options = {"adapter_name": name, "is_trainable": trainable, "local_files_only": True}
    kind = type(model.get_base_model() if is_peft(model) else model).__name__
    must = f"it must be an adapter of a model like this {kind}"
    with errors_of(folder, f"{where} is {str(folder)!r}; {must}"):
        with old_names():
            warnings.filterwarnings("ignore", ".*Found missing adapter keys")  # an error below
            if is_peft(model):
                model.load_adapter(str(path), **options)
            else:
                model = peft.PeftModel.from_pretrained(model, str(path), **options)
        odd = _odd_tensor(model, name, path / ADAPTER)
    if odd is not None:
        raise ValueError(f"{where} is {str(folder)!r}, which has {odd}; {must}")
    setattr(model.peft_config[name], LOADED_FROM, str(path.resolve()))
    return model


def fill_adapter(model: Any, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Load an adapter's weights from a folder into a `peft.PeftModel` that has such an adapter.

    Args:
        name: of the adapter in the model; None where it has one adapter.
    """
    peft, file = require("peft", "adapters"), Path(folder) / ADAPTER
    if name is None:
        (name,) = model.peft_config
    must = "it must be of an adapter as the model has"
    with errors_of(folder, f"{file} cannot be loaded; {must}"):
        peft.set_peft_model_state_dict(model, load_file(file), adapter_name=name)
        odd = _odd_tensor(model, name, file)
    if odd is not None:
        raise ValueError(f"{file} has {odd}; {must}")


def check_adapter_folder(folder: str | os.PathLike[str], where: str) -> None:
    """Require a folder with an adapter that can be loaded safely, from the disk alone.

    Args:
        where: what errors call the folder.
    """
    path = expanded(folder)
    for file in (ADAPTER, ADAPTER_CONFIG):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{where} is {str(folder)!r}; it must be a folder with an {ADAPTER} and an "
                f"{ADAPTER_CONFIG} (pickled weights are not loaded)"
            )
    kind = read_object(path / ADAPTER_CONFIG).get("peft_type")
    known = [str(k.value) for k in require("peft", "adapters").PeftType]
    if kind == "XLORA" or kind not in known:  # the config of an X-LoRA names adapters to download
        raise ValueError(
            f"{path / ADAPTER_CONFIG} has the peft_type {kind!r}; it must be LORA, or another of "
            "PEFT's except XLORA"
        )


def _odd_tensor(model: Any, name: str, file: Path) -> str | None:
    """A tensor that an adapter's file lacks, or one that the model has no place for; or None."""
    peft = require("peft", "adapters")
    now = set(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(file, "pt") as saved:
        keys = set(saved.keys())
    if lacks := sorted(now - keys):
        return f"no weights for {lacks[0]}"
    # PEFT also stores weights of the model itself beside an adapter, such as embeddings that grew
    if excess := sorted(keys - now - set(model.state_dict())):
        return f"weights for what is not there: {excess[0]}"
    return None
