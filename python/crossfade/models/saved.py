"""Saved models and tokenizers, read safely: from safetensors alone, never from pickles or code.

A model that lacks a weight is refused. A path is read from the disk, and the network is not asked
for anything. An id on the Hugging Face hub is first downloaded to the disk, without pickles, and
then read in the same way.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from .. import reading
from . import gguf, quantized
from .hf import check_dtype

logger = getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KEPT = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # what is downloaded of a model
FROM_DISK: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# Classes of models that are no language models, even if they have all weights of one.
CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def folder_of(name: str | os.PathLike[str], files: Sequence[str] | None = None) -> Path:
    """The folder of a saved model that is named by its path, or by its id on the Hugging Face hub.

    A name is taken for an id, ``owner/name``, only if it is a str and there is no folder `owner`
    here; every other name is a path.

    Args:
        name: the path or the id.
        files: patterns of the files that are needed, if it is an id; by default the whole model.

    Raises:
        OSError: there is no such model: a FileNotFoundError if the name was taken for a path.
    """
    folder = expanded(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{str(name)!r} has no {CONFIG}; it must be a saved model")
        return folder
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not os.path.lexists(folder.parent):
        try:
            return download(name, files=files or KEPT)
        except OSError as error:
            raise OSError(
                f"there is no folder {name!r}, and as an id on the hub: {error}"
            ) from error
    what = "is no folder" if os.path.lexists(folder) else "is not there"
    raise FileNotFoundError(
        f"there is no folder {str(name)!r}; a model is a folder, or OWNER/NAME on the Hugging Face "
        f"hub ({str(folder)!r} {what})"
    )


def download(hub_id: str, revision: str | None = None, files: Sequence[str] = KEPT) -> Path:
    """The folder of a model in the local Hugging Face cache, downloaded or updated if possible.

    `HF_HUB_OFFLINE` is respected. Files of pickled weights are not downloaded.

    Args:
        hub_id: the model, as ``owner/name``.
        revision: the commit, branch or tag; None is the newest.
        files: patterns of the files that are needed.

    Raises:
        OSError: the model is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(files), etag_timeout=5)
        )
    except Exception as error:  # the hub's client raises errors of many kinds
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
    """A saved causal LM in eval mode, and its tokenizer, which pads on the left.

    The weights must be whole, and saved as safetensors: pickled weights are refused, and so is code
    that comes with a model.

    Args:
        folder: the model's path, or its id on the Hugging Face hub; or a GGUF file, whose blocks of
            8 and 4 bits stay so (see `crossfade.models.gguf`).
        device: where the model goes; None leaves it on the CPU.
        dtype: of the weights, or "auto" for the one that they were saved in. Of a GGUF file, or a
            model that `crossfade.quantize` made, that of what is not quantised.

    Raises:
        OSError: there is no such model, or its weights are pickled or cannot be read.
        ValueError: something is missing, or the folder holds something else; says what.
    """
    if os.fspath(folder).endswith(".gguf") and expanded(folder).is_file():
        check_dtype(dtype)
        with errors_of(folder), _quiet():
            model, tokenizer = gguf.load(expanded(folder), dtype)
        return model.to(device) if device is not None else model, tokenizer
    found = folder_of(folder)
    check_model_folder(found)
    tokenizer = load_tokenizer(found)
    model = load_model(found, dtype)
    return model.to(device) if device is not None else model, tokenizer


def load_classifier(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[Any, Any]:
    """A saved sequence classifier, such as a reward model, and its tokenizer, as `load` gives them.

    Raises:
        OSError, ValueError: as `load`.
    """
    found = folder_of(folder)
    weight_files(found)
    tokenizer = load_tokenizer(found)
    model = _load(found, dtype, AutoModelForSequenceClassification)
    return model.to(device) if device is not None else model, tokenizer


def classes_of(name: str | os.PathLike[str]) -> list[str] | None:
    """The names of the classes that a saved model tells apart; None if it is no such model.

    Only its config is read, or downloaded where the name is an id on the hub.

    Raises:
        OSError, ValueError: as `folder_of`, or the config cannot be read.
    """
    folder = folder_of(name, [CONFIG])
    found = read_object(folder / CONFIG)
    if not any(
        "ForSequenceClassification" in str(kind) for kind in found.get("architectures") or []
    ):
        return None
    with errors_of(folder):
        config = AutoConfig.from_pretrained(folder, **FROM_DISK)
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. It pads on the left, with EOS if it has no padding token."""
    with errors_of(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **FROM_DISK)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_folder(folder: Path) -> None:
    """Check what can be seen without reading weights: the config, and that weights are there.

    Raises:
        OSError, ValueError: as `load_model`.
    """
    kinds = read_object(folder / CONFIG).get("architectures") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if CLASSIFIER.search(str(kind)):
            raise ValueError(f"{str(folder)!r} is a {kind}; it must be a causal language model")
    if (folder / GENERATION).is_file():  # Transformers would ignore one that cannot be read
        read_object(folder / GENERATION)
    weight_files(folder)


def load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal LM of a folder, in eval mode.

    Raises:
        OSError: weights are missing, in another format, or cannot be read.
        ValueError: the folder holds no causal LM, or weights of another model than its config says.
    """
    check_dtype(dtype)
    check_model_folder(folder)
    return _load(folder, dtype, AutoModelForCausalLM)


def _load(folder: Path, dtype: torch.dtype | str, auto: Any) -> Any:
    """The model that a class such as `AutoModelForCausalLM` makes of a folder, in eval mode."""
    with _weights_alone(folder) as view:
        with errors_of(folder, view=view):
            config = AutoConfig.from_pretrained(view, **FROM_DISK)
        _check_config(config, folder)
        with errors_of(folder, view=view), _quiet():
            loaded: Any = _quantized(view, config, dtype, auto) or auto.from_pretrained(
                view,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the report has them, for an error of ours
                output_loading_info=True,
                **FROM_DISK,
            )
    model, report = loaded
    _check_whole(model, report, folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model.eval()


def _quantized(folder: Path, config: Any, dtype: torch.dtype | str, auto: Any) -> Any:
    """A model that was saved with quantised layers, and what it lacked; None if it has none."""
    if not getattr(config, quantized.MARK, False):
        return None
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            tensors |= load_file(folder / name)
    return quantized.assemble(auto, config, tensors, wanted)


def _check_whole(model: Any, report: Mapping[str, Any], folder: Path) -> None:
    """Require that files had each weight of the model, and no layer that the model lacks."""
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
    """A temporary folder with links to the config and the safetensors of a model, and no more.

    In the model's own folder Transformers would find pickles, code and adapters too. It would load
    an adapter that lies there, and even the base that the adapter's config names.
    """
    with tempfile.TemporaryDirectory(prefix="crossfade-") as view:
        for name in [CONFIG, GENERATION, *weight_files(folder)]:
            if (folder / name).is_file():
                os.symlink((folder / name).resolve(), Path(view, name))
        yield Path(view)


def weight_files(folder: Path) -> list[str]:
    """The names of the files with a model's weights, and of their index if there is one.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the index names something else.
    """
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
    """Require at least one layer, and no kernel that would be downloaded as compiled code."""
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
    """Silence the table in which Transformers lists weights that did not fit: ours says it."""
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
    """Turn what libraries raise over the files of a folder into errors that name the folder.

    Args:
        sentence: how the error begins; the reason follows in brackets.
        view: the folder of links that is read in place of `folder`; errors do not show its name.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config may hold anything, and each library fails in its own way
        reason = " ".join(str(error).split())
        if view is not None:
            reason = reason.replace(str(view), str(folder))
        kind = OSError if isinstance(error, OSError) else ValueError
        sentence = sentence or f"{str(folder)!r} cannot be loaded"
        raise kind(f"{sentence} ({type(error).__name__}: {reason:.300})") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    found = reading.parse_json(reading.read_text(file), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is {found!r:.80}; it must be an object")
    return found


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` replaced, or as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name, and there is no user of that name
        return Path(path)
