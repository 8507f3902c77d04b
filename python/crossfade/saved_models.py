"""Saved models, tokenizers and adapters: whole, of safetensors alone, and never code or pickles.

What is given as a path is read from the disk, and nothing is asked of the network for it. An id on
the Hugging Face hub is brought to the disk first, without pickles, and then read in the same way.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import reading
from .extras import old_names, require
from .hf import is_peft

logger = getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT names them
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FROM_DISK: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# classes whose weights are no language model's, even where none is missing for one
CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def folder_of(name: str | os.PathLike[str]) -> Path:
    """The folder of a saved model, given as a path or as an id on the Hugging Face hub.

    It is taken for an id, ``owner/name``, only if it is a str and there is no folder `owner` here.

    Raises:
        OSError: there is no such model; FileNotFoundError where it was taken for a path.
    """
    folder = _expanded(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{str(name)!r} has no {CONFIG}; it must be a saved model")
        return folder
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not os.path.lexists(folder.parent):
        try:
            return download(name)
        except OSError as error:
            raise OSError(
                f"there is no folder {name!r}, and as an id on the hub: {error}"
            ) from error
    what = "is no folder" if os.path.lexists(folder) else "is not there"
    raise FileNotFoundError(
        f"there is no folder {str(name)!r}; a model is a folder, or OWNER/NAME on the Hugging Face "
        f"hub ({str(folder)!r} {what})"
    )


def download(hub_id: str) -> Path:
    """The folder of a model in the local Hugging Face cache, brought up to date if possible.

    `HF_HUB_OFFLINE` is respected; without a network it fails at once. Pickles are left out.
    """
    from huggingface_hub import snapshot_download

    kept = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=kept, etag_timeout=5))
    except Exception as error:  # the hub's client raises many kinds, and all mean: not here
        reason = str(error).strip().splitlines() or [""]
        raise OSError(
            f"{hub_id} is not in the local Hugging Face cache and could not be downloaded "
            f"({type(error).__name__}: {reason[0][:200]})"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, padding on the left, with a token to pad with."""
    with _errors_of(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **FROM_DISK)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_folder(folder: Path) -> None:
    """What can be seen before weights are read: a language model's config, and files of weights.

    Raises:
        OSError, ValueError: as `load_model`.
    """
    kinds = _object(folder / CONFIG).get("architectures") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if CLASSIFIER.search(str(kind)):
            raise ValueError(f"{str(folder)!r} is a {kind}; it must be a causal language model")
    if (folder / GENERATION).is_file():  # of which Transformers passes over what it cannot read
        _object(folder / GENERATION)
    _weight_files(folder)


def load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal LM of a folder, in eval mode.

    Raises:
        OSError: weights are missing, in another format, or cannot be read.
        ValueError: the folder is of something else, or its weights are not those of its config.
    """
    check_model_folder(folder)
    with _weights_alone(folder) as view:
        with _errors_of(folder, view=view):
            config = AutoConfig.from_pretrained(view, **FROM_DISK)
        _check_config(config, folder)
        with _errors_of(folder, view=view), _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                view,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **FROM_DISK,
            )
    model, report = loaded
    _check_whole(model, report, folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model.eval()


def _check_whole(model: Any, report: Mapping[str, Any], folder: Path) -> None:
    """That every weight of a model was in its file, and that its config leaves no layer out."""
    kind = type(model).__name__
    for key, saved, own in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{key} in {str(folder)!r} is {list(saved)}; it must be {list(own)}, as {CONFIG} says"
        )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{str(folder)!r} is incomplete: it has no weights for {missing[0]}{more} of {kind}"
        )
    known = {_without_numbers(key) for key in model.state_dict()}
    for key in sorted(report["unexpected_keys"]):
        if _without_numbers(key) in known:
            raise ValueError(
                f"{str(folder)!r} has weights for {key}, a layer that {CONFIG} does not have"
            )
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("%s has weights that a %s does not use, such as %s", folder, kind, unused[0])


def _without_numbers(key: str) -> str:
    """The name of a weight without the numbers of layers and experts in it."""
    return re.sub(r"\.\d+(?=\.)", ".N", key)


def with_adapters(model: Any, folders: Mapping[str, str | os.PathLike[str]]) -> Any:
    """A `peft.PeftModel` around `model` with the adapters saved in `folders`, in eval mode.

    ``cf.Model(it, adapter=name)`` is a term with one of them, ``adapter=None`` one with none; all
    share the weights of `model`, whose layers PEFT replaces: use what is returned from then on.

    Raises:
        FileNotFoundError: names the folder that has no `ADAPTER` (pickles are not loaded) or no
            `ADAPTER_CONFIG`.
        ValueError: `folders` is empty, or an adapter is another model's, or incomplete.
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
    """The `peft.PeftModel` around a model with one more adapter; `where` is how errors begin."""
    check_adapter_folder(folder, where)
    peft, path = require("peft", "adapters"), _expanded(folder)
    options = {"adapter_name": name, "is_trainable": trainable, "local_files_only": True}
    kind = type(model.get_base_model() if is_peft(model) else model).__name__
    must = f"it must be an adapter of a model like this {kind}"
    with _errors_of(folder, f"{where} is {str(folder)!r}; {must}"):
        with old_names():
            warnings.filterwarnings("ignore", ".*Found missing adapter keys")  # an error below
            if is_peft(model):
                model.load_adapter(str(path), **options)
            else:
                model = peft.PeftModel.from_pretrained(model, str(path), **options)
        odd = _odd_tensor(model, name, path / ADAPTER)
    if odd is not None:
        raise ValueError(f"{where} is {str(folder)!r}, which has {odd}; {must}")
    return model


def fill_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Give the one adapter of a `peft.PeftModel` the weights that a folder has for it."""
    peft, (name,), file = require("peft", "adapters"), model.peft_config, Path(folder) / ADAPTER
    must = "it must be of an adapter as the model has"
    with _errors_of(folder, f"{file} cannot be loaded; {must}"):
        peft.set_peft_model_state_dict(model, load_file(file), adapter_name=name)
        odd = _odd_tensor(model, name, file)
    if odd is not None:
        raise ValueError(f"{file} has {odd}; {must}")


def check_adapter_folder(folder: str | os.PathLike[str], where: str) -> None:
    """That a folder is one of an adapter which is read from the disk alone, safely."""
    path = _expanded(folder)
    for file in (ADAPTER, ADAPTER_CONFIG):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{where} is {str(folder)!r}; it must be a folder with an {ADAPTER} and an "
                f"{ADAPTER_CONFIG} (pickled weights are not loaded)"
            )
    kind = _object(path / ADAPTER_CONFIG).get("peft_type")
    known = [str(k.value) for k in require("peft", "adapters").PeftType]
    if kind == "XLORA" or kind not in known:  # X-LoRA's config names other adapters to be fetched
        raise ValueError(
            f"{path / ADAPTER_CONFIG} has the peft_type {kind!r}; it must be LORA, or another of "
            "PEFT's except XLORA"
        )


def _odd_tensor(model: Any, name: str, file: Path) -> str | None:
    """A tensor that an adapter's file lacks for the layers that it is on now, or has in excess."""
    peft = require("peft", "adapters")
    now = set(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(file, "pt") as saved:
        keys = set(saved.keys())
    if lacks := sorted(now - keys):
        return f"no weights for {lacks[0]}"
    # what PEFT stores beside the adapter, such as embeddings that grew, is the model's own
    if excess := sorted(keys - now - set(model.state_dict())):
        return f"weights for what is not there: {excess[0]}"
    return None


@contextmanager
def _weights_alone(folder: Path) -> Iterator[Path]:
    """A folder of links to the config and the safetensors of a model, and to nothing else.

    Transformers finds more in a model's folder than a model: pickles, code, and adapters, of which
    it would load the one that lies there, or even the base that it names.
    """
    with tempfile.TemporaryDirectory(prefix="crossfade-") as view:
        for name in [CONFIG, GENERATION, *_weight_files(folder)]:
            if (folder / name).is_file():
                os.symlink((folder / name).resolve(), Path(view, name))
        yield Path(view)


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights, and of their index if there is one."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; a model must be saved as "
            "safetensors (pickled weights are not loaded)"
        )
    parts = _object(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{folder / INDEX} has no weight_map; it must say where each tensor is")
    for tensor, part in parts.items():
        if not (isinstance(part, str) and re.fullmatch(r"[^/\\]+\.safetensors", part)):
            raise ValueError(
                f"{folder / INDEX} says that {tensor} is in {part!r}; it must be a safetensors "
                "file beside it"
            )
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{str(folder)!r} is incomplete: it has no {part}")
    return [INDEX, *sorted(set(parts.values()))]


def _check_config(config: Any, folder: Path) -> None:
    """That a model has layers, and asks for no attention out of a repository of compiled code."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if layers is not None and layers < 1:
        raise ValueError(f"{folder / CONFIG} has num_hidden_layers {layers}; it must be at least 1")
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            asked = getattr(part, name, None)
            if isinstance(asked, str) and "/" in asked:
                raise ValueError(
                    f"{folder / CONFIG} asks for the kernel {asked!r}; code that a model brings "
                    "along is not run"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' table of what did not fit, which is an error or a line of ours."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _errors_of(
    folder: str | os.PathLike[str], sentence: str | None = None, view: Path | None = None
) -> Iterator[None]:
    """What libraries raise over a folder's files, as errors that name the folder.

    Args:
        sentence: what the error says before the reason.
        view: the folder of links that is read in place of `folder`.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config may say anything, and each library fails in its own way
        reason = " ".join(str(error).split())
        if view is not None:
            reason = reason.replace(str(view), str(folder))
        kind = OSError if isinstance(error, OSError) else ValueError
        sentence = sentence or f"{str(folder)!r} cannot be loaded"
        raise kind(f"{sentence} ({type(error).__name__}: {reason:.300})") from error


def _object(file: Path) -> dict[str, Any]:
    found = reading.parse_json(reading.read_text(file), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is {found!r:.80}; it must be an object")
    return found


def _expanded(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody who is not known here
        return Path(path)
