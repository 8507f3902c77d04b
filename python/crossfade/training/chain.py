"""What is trained over the adapter of ``BASE@FOLDER``, saved so that it decodes as it was trained.

The adapter is merged into the base before the training begins, so that a new adapter, or a value
head, belongs to the merged weights. Checkpoints have the new one alone, and a run that goes on
merges again. What lies in `output_dir` in the end has both, and belongs to the base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..extras import require
from ..models.hf import underlying
from ..models.joined_adapters import check_joined, join_adapters, odd_setting, odd_weight
from ..models.saved_adapters import with_adapters
from ..models.saved_value_heads import ADAPTER_FILES, note_adapter
from ..specs import Spec
from .config import Settings, lora_config


def check(s: Settings, model: Any = None) -> None:
    """Require that what is trained can be saved together with the adapter in the base, if any.

    Args:
        model: what is trained; None if it is not yet loaded.
    """
    spec = Spec.read(s.model, "model")
    if spec.guide is None or spec.is_value_head or not _saved_apart(s):
        return
    if s.arguments.get("push_to_hub"):
        raise ValueError(
            f"arguments.push_to_hub is given, and model is {s.model!r}; it must be left out, as "
            "what is pushed would lack the first adapter"
        )
    advice = (
        "the two cannot be saved as one. Merge the first into the base: model, tokenizer = "
        f"crossfade.models.load(crossfade.models.folder_of({spec.path!r})); "
        f"model = crossfade.models.with_adapters(model, {{'x': {str(spec.guide)!r}}})"
        ".merge_and_unload(); model.save_pretrained('merged'); tokenizer.save_pretrained('merged')."
        " Then train with model: merged"
    )
    odd = None if s.lora is None else odd_setting(lora_config(s))
    if odd is None and s.lora is not None and model is not None:
        peft = require("peft", "train")
        odd = odd_weight(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd is not None:
        raise ValueError(f"model is {s.model!r}, and lora {odd}; {advice}")
    try:
        check_joined(spec.guide, "model's adapter")
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None


def merged(model: Any, guide: Path, what: str) -> Any:
    """A model with a saved adapter merged into its weights. `what` is what errors call both."""
    tied = _embeddings(model) if model.config.tie_word_embeddings else []
    wrapped = with_adapters(model, {"guide": guide})
    if tied and any(x is not y for x, y in zip(tied, _embeddings(wrapped), strict=True)):
        raise ValueError(
            f"{what}, whose adapter changes the input or the output embeddings; the model has one "
            "matrix for both, so that it cannot be merged; it must be an adapter of other layers"
        )
    if not hasattr(wrapped, "merge_and_unload"):
        kind = wrapped.peft_config["guide"].peft_type.value
        raise ValueError(f"{what}, whose adapter is of {kind}; it must be of a kind that merges")
    return wrapped.merge_and_unload()


def _embeddings(model: Any) -> list[Any]:
    bare: Any = underlying(model)
    return [bare.get_input_embeddings(), bare.get_output_embeddings()]


def join(s: Settings, output: Path) -> None:
    """Put the adapter in the base beside, or into, what was saved in a folder."""
    first = Spec.read(s.model, "model").guide
    if first is None or not _saved_apart(s):
        return
    if s.lora is None:
        for file in ADAPTER_FILES:
            shutil.copyfile(first / file, output / file)
    else:
        join_adapters(first, output, output)
    if s.kind == "value":
        note_adapter(output)


def _saved_apart(s: Settings) -> bool:
    """Whether what is saved is not a whole model."""
    return s.lora is not None or s.kind == "value"
