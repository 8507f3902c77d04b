"""Saved value heads: weights and settings, and the adapter of the backbone if there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import reading
from .hf import is_peft, underlying
from .saved import load
from .saved_adapters import ADAPTER, ADAPTER_CONFIG, add_adapter, fill_adapter
from .value_heads import DTYPES, KINDS, LowRankHead, value_head, value_model

FORMAT = 1
WEIGHTS, SETTINGS = "value_head.safetensors", "value_head.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER)
# The attribute of a value model that says which folder it was last saved in or loaded from.
LOADED_FROM = "crossfade_loaded_from"


def save_value_head(
    model: Any, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Save the head of a value model, and the adapter of its backbone if there is one.

    The folder gets ``value_head.safetensors``, ``value_head.json`` (kind, rank, hidden size,
    vocabulary, and where the backbone was loaded from) and PEFT's own files. The backbone itself is
    not saved, and the folder may be that of the backbone.

    Args:
        model: what `value_model` gave, or a `peft.PeftModel` around it.
        dtype: what the head is stored in; None stores it as it is. A head of rank 8 over 49,152
            tokens and 576 hidden numbers takes 0.8 MB in bfloat16.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    head = value_head(model)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16, float16 or None")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_peft(model):
        if len(model.peft_config) != 1:
            raise ValueError(
                f"model has the adapters {sorted(model.peft_config)}; it must have one, which the "
                "head was trained with"
            )
        (name,) = model.peft_config
        # without save_embedding_layers=False PEFT would look for the backbone on the hub
        model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        if name != "default":  # PEFT made a folder of that name; the files belong beside the head
            for file in ADAPTER_FILES:
                (folder / name / file).replace(folder / file)
    save_file(
        {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    settings = {"format": FORMAT, **_settings(model), "adapter": is_peft(model)}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    _note(model, folder)


def load_value_head(
    folder: str | os.PathLike[str], base: Any = None, *, dtype: torch.dtype = torch.float32
) -> Any:
    """The value model that `save_value_head` saved, in eval mode.

    `ValueTrainer` can train its head, and its adapter if it has one, further.

    Args:
        folder: the folder that it was saved in.
        base: the causal LM that the head is over. The value model shares its weights, see
            `value_model`. None loads it from where it was when the head was saved, safely as
            `crossfade.models.load` does.
        dtype: of the head.

    Returns:
        A value model, or a `peft.PeftModel` around one if an adapter was saved.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read; names it.
        ValueError: a file is not as it must be, or `base` has another hidden size or vocabulary.
        TypeError, NotImplementedError: `value_model` refuses `base`.
    """
    folder = Path(folder)
    settings = _read_settings(folder / SETTINGS)
    weights = _read_weights(folder / WEIGHTS)
    if settings["adapter"]:
        for name in ADAPTER_FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"there is no {folder / name}; {SETTINGS} says that the backbone has an "
                    "adapter (pickled weights are not loaded)"
                )
    if base is None:
        base = _load_backbone(settings["backbone"], folder / SETTINGS)
    model = value_model(base, settings["kind"], rank=settings["rank"], dtype=dtype)
    given = _settings(model)
    for key in ("hidden_size", "vocabulary"):
        if settings[key] != given[key]:
            raise ValueError(
                f"{folder / SETTINGS} has {key} {settings[key]}; it must be {given[key]}, as base "
                "has"
            )
    fill_head(model, weights, folder / WEIGHTS)
    if settings["adapter"]:
        model = add_adapter(model, folder, "the value head's folder", trainable=True)
        value_head(model).requires_grad_(True)  # PEFT has frozen everything but the adapter
    _note(model, folder)
    return model.eval()


def _note(model: Any, folder: Path) -> None:
    """Note at a value model where it is saved, so that a saved blend can name it."""
    setattr(underlying(model), LOADED_FROM, str(folder.resolve()))


def load_into(model: Any, folder: str | os.PathLike[str]) -> None:
    """Load the weights of a saved head, and of its adapter if it has one, into a value model."""
    folder = Path(folder)
    settings = _read_settings(folder / SETTINGS)
    given = {**_settings(model), "adapter": is_peft(model)}
    for key in ("kind", "rank", "hidden_size", "vocabulary", "adapter"):
        if settings[key] != given[key]:
            raise ValueError(
                f"{folder / SETTINGS} has {key} {settings[key]!r}; it must be {given[key]!r}, as "
                "model has"
            )
    fill_head(model, _read_weights(folder / WEIGHTS), folder / WEIGHTS)
    if is_peft(model):
        fill_adapter(model, folder)


def note_adapter(folder: Path) -> None:
    """Note in the folder of a value head that the adapter beside it belongs to its backbone."""
    file = folder / SETTINGS
    file.write_text(json.dumps({**_read_settings(file), "adapter": True}, indent=2) + "\n")


def fill_head(model: Any, weights: dict[str, Tensor], file: Path) -> None:
    """Copy weights into the head of a model. `file` is what errors say they are from."""
    own = value_head(model).state_dict()
    if set(weights) != set(own):
        raise ValueError(f"{file} has the tensors {sorted(weights)}; it must have {sorted(own)}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} in {file} is {tensor.dtype} {list(tensor.shape)}; it must be floats "
                f"{list(own[name].shape)}"
            )
        own[name].copy_(tensor)  # these tensors are the parameters themselves, not copies


def _settings(model: Any) -> dict[str, Any]:
    bare: Any = underlying(model)
    head = bare.get_output_embeddings()
    return {
        "kind": bare.value_kind,
        "rank": head.a.shape[0] if isinstance(head, LowRankHead) else None,
        "hidden_size": head.in_features,
        "vocabulary": bare.get_input_embeddings().weight.shape[0],
        "backbone": str(getattr(bare.config, "name_or_path", "") or ""),
    }


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; the folder must be of save_value_head")
    settings = reading.parse_json(reading.read_text(file), str(file))
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is {settings!r:.80}; it must be what save_value_head writes")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{file} has format {settings.get('format')!r}; it must be {FORMAT}")
    if settings.get("kind") not in KINDS:
        raise ValueError(f"{file} has kind {settings.get('kind')!r}; it must be 'q' or 'scalar'")
    wanted: dict[str, tuple[type, ...]] = {"rank": (int, type(None)), "hidden_size": (int,)}
    wanted |= {"vocabulary": (int,), "backbone": (str,), "adapter": (bool,)}
    for key, kinds in wanted.items():
        if type(settings.get(key, ...)) not in kinds:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            found = repr(settings[key]) if key in settings else "missing"
            raise ValueError(f"{key} in {file} is {found}; it must be of type {names}")
    return settings


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; the folder must be of save_value_head")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be read as safetensors: {error}") from error


def _load_backbone(name: str, file: Path) -> Any:
    if not name:
        raise ValueError(f"base is None, and {file} names no backbone; base must be its model")
    try:
        return load(name, dtype="auto")[0]
    except (OSError, ValueError) as error:
        raise OSError(
            f"the backbone {name!r} that {file} names could not be loaded; give base=... "
            f"({str(error).strip().splitlines()[0]:.200})"
        ) from error
