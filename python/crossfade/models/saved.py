"""Saved models and tokenizers: whole, of safetensors alone, and never code or pickles.

What is given as a path is read from the disk, and nothing is asked of the network for it. An id on
the Hugging Face hub is brought to the disk first, without pickles, and then read in the same way.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import reading

logger = getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    folder = expanded(name)
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


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[Any, Any]:
    """A causal LM saved as safetensors, in eval mode, and its tokenizer, padding on the left.

    Pickled weights and code that comes with a model are refused, and so are weights that are not
    whole. `folder` may be an id on the Hugging Face hub; what is a path is read from the disk.

    Raises:
        OSError: there is no such model, or its weights are pickled or cannot be read.
        ValueError: names what is missing, or what it is instead.
    """
    found = folder_of(folder)
    check_model_folder(found)
    tokenizer = load_tokenizer(found)
    model = load_model(found, dtype)
    return model.to(device) if device is not None else model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, padding on the left, with a token to pad with."""
    with errors_of(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **FROM_DISK)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_folder(folder: Path) -> None:
    """What can be seen before weights are read: a language model's config, and files of weights.

    Raises:
        OSError, ValueError: as `load_model`.
    """
    kinds = read_object(folder / CONFIG).get("architectures") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if CLASSIFIER.search(str(kind)):
            raise ValueError(f"{str(folder)!r} is a {kind}; it must be a causal language model")
    if (folder / GENERATION).is_file():  # of which Transformers passes over what it cannot read
        read_object(folder / GENERATION)
    _weight_files(folder)


def load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal LM of a folder, in eval mode.

    Raises:
        OSError: weights are missing, in another format, or cannot be read.
        ValueError: the folder is of something else, or its weights are not those of its config.
    """
    check_model_folder(folder)
    with _weights_alone(folder) as view:
        with errors_of(folder, view=view):
            config = AutoConfig.from_pretrained(view, **FROM_DISK)
        _check_config(config, folder)
        with errors_of(folder, view=view), _quiet():
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
    parts = read_object(folder / INDEX).get("weight_map")
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
def errors_of(
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


def read_object(file: Path) -> dict[str, Any]:
    found = reading.parse_json(reading.read_text(file), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is {found!r:.80}; it must be an object")
    return found


def expanded(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody who is not known here
        return Path(path)
