"""`model.generate(..., custom_generate=crossfade.decode, blend=...)`: from inside Hugging Face."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..models.hf import is_multimodal, underlying
from ..search import ChunkBeamSearch
from . import settings
from .call import Call, Seed, blend_and_search, seeds_and_streams
from .driver import Driver
from .ends import check_ids
from .engine.options import Engine
from .inputs import asks_nothing, read_requests
from .results import output_of
from .simple.own_loop import tensors_in
from .simple.term_model import positions_of

# The arguments that Hugging Face hands over by itself. They are looked at, or have no effect here.
OWN = {"attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep"}
OWN |= {"cache_params"}  # This is the cache of models that have no keys and values.


def decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    blend: Any = None,
    search: ChunkBeamSearch | None = None,
    seed: Seed = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode a blend from inside Hugging Face: the value of ``custom_generate``.

    ``model.generate(**inputs, custom_generate=crossfade.decode, blend=blend, do_sample=True)``.

    Temperature, top-k, top-p and min-p are taken out of the processor list and done by the kernel;
    other processors run as in `crossfade.generate`. Hugging Face's own defaults hold, such as a
    top-k of 50. It hands over neither streamer nor tokenizer: a streamer sees the prompt alone,
    and `stop_strings` raise there. `crossfade.generate` takes both.

    Args:
        model: one of the blend's models, whose ``generate`` was called.
        input_ids, logits_processor, stopping_criteria, generation_config: from Hugging Face.
        blend: what to decode, passed to ``generate`` beside `custom_generate`.
        search: as in `crossfade.generate`; ``do_sample=True`` must be passed with it.
        seed: as in `crossfade.generate`.

    Returns:
        What ``generate`` returns: sequences, or with ``return_dict_in_generate=True`` a
        `GenerateDecoderOnlyOutput` that holds them.

    Raises:
        TypeError, ValueError: names the argument. NotImplementedError: what is not supported.
    """
    if blend is None:
        raise TypeError("blend is None; pass it to generate: custom_generate=decode, blend=...")
    blend, search = blend_and_search(blend, search)
    terms = [*blend.terms, *blend.values]
    if all(underlying(t.model) is not underlying(model) for t in terms):
        raise ValueError(
            f"generate was called on a {type(model).__name__} that is no term of the blend "
            f"{blend}; call it on one that is"
        )
    settings.check_supported(generation_config, model.generation_config)
    copies = generation_config.num_return_sequences
    mask = _mask(model, input_ids, model_kwargs)
    requests = read_requests(input_ids[::copies], mask[::copies])  # Copies of a request are equal.
    stated = generation_config._pad_token_tensor
    pad = 0 if stated is None else int(stated)

    call = Call(blend)
    ends_asked = generation_config.eos_token_id != model.generation_config.eos_token_id
    check_ids(generation_config, call.vocabulary, blend, call.tokenizer, ends_asked=ends_asked)
    sample = bool(generation_config.do_sample)
    prompts = call.prompts(requests, pad)
    search_job = call.search_job(search, requests, call.writing(prompts), sample, copies)
    if search_job is not None:
        copies = search_job.settings.rows
    job = call.job(
        requests,
        prompts,
        copies,
        lambda rows: logits_processor,  # It was made for all rows, which are decoded at once.
        stopping_criteria,
        seeds_and_streams(seed, len(requests), copies, sample, call.device),
        do_sample=sample,
        search=search_job,
        pad=pad,
    )
    driver = Driver(blend, call.models, call.vocabulary, Engine(), len(job))
    output = output_of(job, list(driver.decode([job])), driver)
    sequences = output.sequences.to(input_ids.device)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences


def _mask(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """The attention mask of the prompts. Whatever else came with them is refused by its name."""
    saved = model.generation_config
    types = is_multimodal(model)
    for name, value in model_kwargs.items():
        wants = getattr(saved, name, None)
        if name in OWN or asks_nothing(name, value, types) or value is wants is True:
            continue
        why = ": each term embeds tokens by itself; pass input_ids" if "embeds" in name else ""
        raise NotImplementedError(f"{name} is not supported with custom_generate=decode{why}")
    mask = model_kwargs.get("attention_mask")
    mask = input_ids.new_ones(input_ids.shape) if mask is None else mask.ne(0).long()
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError("past_key_values is not supported: a blend has a cache a term")
    if tensors_in(model_kwargs.get("cache_params")):  # The one that `generate` makes is empty.
        raise NotImplementedError("cache_params is not supported: a blend has a cache a term")
    # They are [requests, tokens], or such a tensor for each of several axes.
    positions = model_kwargs.get("position_ids")
    if positions is not None and ((positions != positions_of(mask)) & mask.bool()).any():
        raise NotImplementedError("position_ids is not supported; they follow from attention_mask")
    return mask
