"""Decode a blend of models: what ``model.generate(custom_generate=<this repository>)`` runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import crossfade
from crossfade.models.adapters import adapter_configs

# Arguments of `generate` that a blend has no use for, with what to do in their place.
REFUSED = {
    "assistant_model": "draft=crossfade.Draft(model) lets a model guess tokens",
    "assistant_tokenizer": "a model that guesses tokens has the vocabulary of the blend",
    "negative_prompt_ids": "crossfade.presets.cfg is classifier-free guidance",
    "negative_prompt_attention_mask": "crossfade.presets.cfg is classifier-free guidance",
}
# Arguments by which Transformers has found this file. It hands them over as well.
OF_THE_HUB = {
    *("revision", "code_revision", "token", "cache_dir", "force_download", "local_files_only"),
    *("proxies", "repo_type", "subfolder"),
}


def generate(
    model: Any,
    *,
    formula: str | None = None,
    terms: Mapping[str, Any] | None = None,
    blend: Any = None,
    tokenizer: Any = None,
    streamer: Any = None,
    stop_strings: Any = None,
    generation_config: Any = None,
    **arguments: Any,
) -> Any:
    """Decode a blend of the model and of others, with the arguments of Hugging Face's `generate`.

    Args:
        model: the model whose `generate` was called. In the formula it is ``base``, without its
            adapters, and each adapter that it has is a term under the adapter's name.
        formula: the blend, such as ``"base + w * (tuned - ref)"``.
        terms: what the other names of the formula stand for: loaded models, `crossfade.Model` and
            `crossfade.ValueHead` terms, and numbers, such as ``{"w": 0.8}``, or tensors with a
            number for each request.
        blend: in place of a formula, a `crossfade.Blend` or a `crossfade.Recipe`.
        tokenizer, streamer, stop_strings, generation_config: as in Hugging Face.
        arguments: of Hugging Face's `generate`, or named parameters of `crossfade.decode`, such as
            `seed`, `search`, `draft`, `kl_to` and `blend_inputs`.

    Returns:
        What `generate` returns; with ``return_dict_in_generate=True`` it has log-probs as well.
    """
    for name, instead in REFUSED.items():
        if arguments.pop(name, None) is not None:
            raise NotImplementedError(f"{name} is not supported with a blend; {instead}")
    if arguments.pop("synced_gpus", None):
        raise NotImplementedError("synced_gpus is not supported with a blend; leave it out")
    if (formula is None) == (blend is None):
        raise TypeError('give a formula, such as formula="base + w * (tuned - ref)", or a blend')
    if formula is not None:
        blend = crossfade.parse(formula, **_names(model, terms or {}))
    elif terms is not None:
        raise TypeError("terms are given without a formula; a blend has its own")
    for name in OF_THE_HUB:
        arguments.pop(name, None)
    if generation_config is not None and generation_config.stop_strings is not None:
        generation_config = copy.deepcopy(generation_config)
        stop_strings = stop_strings or generation_config.stop_strings
        generation_config.stop_strings = None
    # The method of the class: the model's own attribute may be the function that runs here.
    return type(model).generate(
        model,
        custom_generate=crossfade.decode,
        generation_config=generation_config,
        blend=blend,
        blend_tokenizer=tokenizer,
        blend_streamer=streamer,
        blend_stop_strings=stop_strings,
        **arguments,
    )


def _names(model: Any, terms: Mapping[str, Any]) -> dict[str, Any]:
    """What the names of a formula stand for: the model, its adapters, and the caller's terms."""
    adapters = [name for name in adapter_configs(model) if name.isidentifier()]
    names: dict[str, Any] = {name: crossfade.Model(model, adapter=name) for name in adapters}
    names["base"] = crossfade.Model(model, adapter=None if adapters else "active")
    for name, term in terms.items():
        if name in names:
            whose = "the model" if name == "base" else "an adapter of the model"
            raise ValueError(f"terms has {name!r}, which is {whose} already; give it another name")
        if isinstance(term, str):
            raise TypeError(
                f"terms[{name!r}] is {term!r}; it must be a loaded model, as crossfade.models.load "
                "gives, so that it is loaded once and not at each call"
            )
        names[name] = term
    return names
