"""What trainers share that sample from the model while they train it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from ..models.hf import underlying


def noise(*what: Any) -> int:
    """A seed that depends on what it is for alone, such as a run's seed, a step and a prompt.

    So a run that is resumed draws what it would have drawn, and several processes draw what one
    would.
    """
    text = " ".join(map(str, what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def as_decoded(model: Any) -> Iterator[None]:
    """Have a model as it is decoded in a ``with`` block: without dropout and gradients.

    What a saved generation config says of sampling is left out; its special tokens are kept.
    """
    modes = [(module, module.training) for module in model.modules()]
    base: Any = underlying(model)
    saved = base.generation_config
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    base.generation_config = GenerationConfig(**{name: getattr(saved, name) for name in ends})
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.generation_config = saved
        for module, training in modes:
            module.training = training
