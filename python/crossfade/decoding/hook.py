"""`model.generate(..., custom_generate=crossfade.decode, blend=...)`: from inside Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..blends.blend import Blend, Model
from ..drafts import Draft, check_draft
from ..models.hf import is_multimodal, underlying
from ..ops import check
from ..search import Search
from . import settings
from .call import Call, Seed, blend_and_search, seeds_and_streams
from .chats import template_arguments
from .driver import Driver
from .each import Each, stop_criterion, take_each
from .ends import check_ids
from .engine.options import Engine, check_engine
from .inputs import Prompts, Requests, asks_nothing, read_requests
from .members import Members, references_of
from .output import Match, Output
from .results import output_of
from .simple.own_loop import tensors_in
from .simple.term_model import positions_of
from .stats import Stats
from .streaming import Stream, check_streamer

# The arguments that Hugging Face hands over by itself. They are looked at, or have no effect here.
OWN = {"attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep"}
OWN |= {"cache_params"}  # This is the cache of models that have no keys and values.


@dataclass
class BlendDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """What ``generate(..., custom_generate=crossfade.decode, return_dict_in_generate=True)`` gives.

    It has Hugging Face's `sequences`, and the fields of `Output` with their meaning there. The
    values of a search, `Output.values` and `Output.value_parts`, and its `Output.weights` have
    other names here, as Hugging Face's outputs are mappings with a method `values`, and are
    ``[rows]`` and ``[rows, parts]``; `slots` are ``[rows]`` too.
    What was not asked for is None.
    """

    lengths: Tensor | None = None
    text: list[str] | None = None
    logprobs: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    finished: Tensor | None = None
    failed: Tensor | None = None
    term_logprobs: Tensor | None = None
    pushes: Tensor | None = None
    kl: Tensor | None = None
    kl_to_base: Tensor | None = None
    search_values: Tensor | None = None
    search_value_parts: Tensor | None = None
    search_weights: Tensor | None = None
    effective_sizes: list[list[float]] | None = None
    entropies: Tensor | None = None
    bracket: list[list[list[Match]]] | None = None
    slots: Tensor | None = None
    tokens_by_draft: Tensor | None = None
    stats: Stats | None = None

    @classmethod
    def of(cls, output: Output, device: Any) -> BlendDecoderOnlyOutput:
        """The fields of `output`, with its tensors on a device."""
        shared = {f.name for f in fields(cls)} & {f.name for f in fields(output)}
        found: dict[str, Any] = {name: getattr(output, name) for name in shared}
        if output.values is not None:
            found["search_values"] = output.values.flatten()
        if output.value_parts is not None:
            found["search_value_parts"] = output.value_parts.flatten(0, -2)
        if output.slots is not None:
            found["slots"] = output.slots.flatten()
        if output.weights is not None:
            found["search_weights"] = output.weights.flatten()
        for name, x in found.items():
            found[name] = x.to(device) if isinstance(x, Tensor) else x
        return cls(**found)


def decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    blend: Any = None,
    blend_inputs: Any = None,
    blend_tokenizer: Any = None,
    blend_streamer: Any = None,
    blend_stop_strings: str | Sequence[Any] | None = None,
    search: Search | None = None,
    draft: Draft | None = None,
    seed: Seed = None,
    return_term_logprobs: bool = False,
    return_pushes: bool = False,
    kl_to: Any = None,
    return_kl_to_base: bool = False,
    engine: Engine | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode a blend from inside Hugging Face: the value of ``custom_generate``.

    ``model.generate(**inputs, custom_generate=crossfade.decode, blend=blend, do_sample=True)``.

    Temperature, top-k, top-p and min-p are taken out of the processor list and done by the kernel;
    other processors run as in `crossfade.generate`. Hugging Face's own defaults hold, such as a
    top-k of 50.

    Hugging Face drops `streamer`, `tokenizer`, `assistant_model`, `assistant_tokenizer` and
    `synced_gpus` without a word before it calls a function (the streamer is told the prompt and
    then waits for ever), and `stop_strings` raise there as it has no tokenizer. Pass
    `blend_streamer`, `blend_tokenizer` and `blend_stop_strings`, which arrive.

    Args:
        model: one of the blend's models, whose ``generate`` was called.
        input_ids, logits_processor, stopping_criteria, generation_config: from Hugging Face.
        blend: what to decode, passed to ``generate`` beside `custom_generate`.
        blend_inputs: the texts or chats that `input_ids` were made of, in any form that
            `crossfade.generate` takes. Terms with a system prompt need them, as a chat template
            cannot read token ids. What the first term reads must be `input_ids`.
        blend_tokenizer: for terms that have none, for `blend_stop_strings` and for texts; by
            default the first one that a term has.
        blend_streamer: a streamer of Hugging Face's, as `streamer` in `crossfade.generate`.
        blend_stop_strings: as `stop_strings` in `crossfade.generate`.
        search: as in `crossfade.generate`; ``do_sample=True`` must be passed with it.
        draft, seed, engine: as in `crossfade.generate`.
        return_term_logprobs, return_pushes, kl_to, return_kl_to_base: as in `crossfade.generate`;
            they need ``return_dict_in_generate=True``.
        tools, chat_template_kwargs: what chat templates are given besides the chats of
            `blend_inputs`, as in `crossfade.generate`.

    Returns:
        What ``generate`` returns: sequences, or with ``return_dict_in_generate=True`` a
        `BlendDecoderOnlyOutput`, which is a `GenerateDecoderOnlyOutput` with more fields.

    Raises:
        TypeError, ValueError: names the argument. NotImplementedError: what is not supported.
    """
    if blend is None:
        raise TypeError("blend is None; pass it to generate: custom_generate=decode, blend=...")
    blend, search = blend_and_search(blend, search)
    check_engine(engine)
    check_draft(draft, simple=engine is not None and engine.simple)
    check_streamer(blend_streamer, search, "blend_streamer")
    terms = [*blend.terms, *blend.values]
    if all(underlying(t.model) is not underlying(model) for t in terms):
        raise ValueError(
            f"generate was called on a {type(model).__name__} that is no term of the blend "
            f"{blend}; call it on one that is"
        )
    as_dict = bool(generation_config.return_dict_in_generate)
    for name, on in (
        ("return_term_logprobs", check.flag("return_term_logprobs", return_term_logprobs)),
        ("return_pushes", check.flag("return_pushes", return_pushes)),
        ("return_kl_to_base", check.flag("return_kl_to_base", return_kl_to_base)),
        ("kl_to", kl_to is not None),
    ):
        if on and not as_dict:
            raise ValueError(
                f"{name} is set, and sequences alone are returned; pass "
                "return_dict_in_generate=True with it"
            )
    if return_pushes:
        check.pushes_exist(blend.power, blend.parts)
    settings.check_supported(generation_config, model.generation_config)
    copies = generation_config.num_return_sequences
    mask = _mask(model, input_ids, model_kwargs)
    # Copies of a request are equal.
    given = Prompts(input_ids[::copies].long(), mask[::copies])
    stated = generation_config._pad_token_tensor
    pad = 0 if stated is None else int(stated)

    call = Call(blend, blend_tokenizer, references_of(blend, kl_to, return_kl_to_base), draft)
    chat = template_arguments(tools, chat_template_kwargs)
    requests = _requests(given, call.members, blend_inputs, chat)
    each, stops = _stops(blend_stop_strings, call.tokenizer, len(requests))
    if stops and each.stop_strings is None:
        stopping_criteria = [*stopping_criteria, stop_criterion(stops, call.tokenizer)]
    generation_config.stop_strings = stops or None
    ends_asked = generation_config.eos_token_id != model.generation_config.eos_token_id
    check_ids(generation_config, call.vocabulary, blend, call.tokenizer, ends_asked=ends_asked)
    sample = bool(generation_config.do_sample)
    prompts = call.prompts(requests, pad)
    prompts[0] = _first_prompt(given, prompts[0], blend, from_ids=blend_inputs is None)
    writing = call.writing(prompts)
    search_job = call.search_job(search, requests, writing, generation_config, each)
    if search_job is not None:
        copies = search_job.settings.rows
    job = call.job(
        requests,
        prompts,
        copies,
        lambda rows: logits_processor,  # It was made for all rows, which are decoded at once.
        stopping_criteria,
        seeds_and_streams(seed, len(requests), copies, sample, call.device, call.ranks),
        do_sample=sample,
        each=each,
        search=search_job,
        term_logprobs=return_term_logprobs,
        pushes=return_pushes,
        pad=pad,
        writing=writing if as_dict else None,
        streamer=None if blend_streamer is None else Stream(blend_streamer),
    )
    driver = Driver(blend, call.models, call.vocabulary, engine or Engine(), len(job))
    written = list(driver.decode([job]))
    output = output_of(job, written, driver, term_logprobs=return_term_logprobs)
    if as_dict:
        return BlendDecoderOnlyOutput.of(output, input_ids.device)
    return output.sequences.to(input_ids.device)


def _requests(given: Prompts, members: Members, inputs: Any, chat: Mapping[str, Any]) -> Requests:
    """What the terms read: the ids that Hugging Face gives, or the texts that they were made of."""
    if inputs is None:
        if chat:
            what = "tools are" if "tools" in chat else "chat_template_kwargs is"
            raise ValueError(
                f"{what} given, and generate hands over token ids, which go through no chat "
                "template; pass blend_inputs=, the chats that the ids were made of"
            )
        for name, term in zip(members.names, members.all, strict=True):
            if isinstance(term, Model) and term.system is not None and term.prompt is None:
                raise ValueError(
                    f"system of {name} is set, and generate hands over token ids, which no chat "
                    "template can join it to; pass blend_inputs=, the texts or chats that the ids "
                    "were made of, or call crossfade.generate with them"
                )
        return read_requests(given.ids, given.mask)
    requests = read_requests(inputs, name="blend_inputs")
    if len(requests) != len(given.ids):
        raise ValueError(
            f"blend_inputs has {len(requests)} entries; it must have {len(given.ids)}, one for "
            "each row of input_ids"
        )
    return replace(requests, chat=chat)


def _first_prompt(given: Prompts, read: Prompts, blend: Blend, *, from_ids: bool) -> Prompts:
    """The prompt of the first term, padded as `input_ids` are, with which the sequences begin."""
    name = blend.names[0]
    for i, (ids, own) in enumerate(zip(given.unpadded(), read.unpadded(), strict=True)):
        if ids == own:
            continue
        if from_ids:
            raise ValueError(
                f"prompt of {name} is set, and it is the first term, with whose prompt sequences "
                "begin; generate returns input_ids there: put a term first that reads these, or "
                "call crossfade.generate"
            )
        at = next(
            (n for n, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b),
            min(len(ids), len(own)),
        )
        raise ValueError(
            f"blend_inputs of request {i} has {len(own)} tokens as {name}, the first term, reads "
            f"it, and input_ids has {len(ids)}, which differ from token {at} on; input_ids must be "
            "what the first term reads, with its system prompt and the chat template's own tokens"
        )
    return replace(read, ids=given.ids, mask=given.mask)


def _stops(texts: Any, tokenizer: Any, requests: int) -> tuple[Each, list[str]]:
    """The stop strings of each request, if these have their own, and those of all requests.

    Raises:
        TypeError, ValueError: names what is wrong with `blend_stop_strings`.
    """
    if texts is None:
        return Each(), []
    if not isinstance(texts, (str, list, tuple)):
        raise TypeError(
            f"blend_stop_strings is a {type(texts).__name__}; it must be a text or a list of texts"
        )
    if tokenizer is None:
        raise ValueError(
            f"blend_stop_strings is {texts!r:.80}, and no term has a tokenizer; pass "
            "blend_tokenizer= with it"
        )
    arguments: dict[str, Any] = {"stop_strings": texts}
    each = take_each(arguments)
    if each.stop_strings is not None and len(each.stop_strings) != requests:
        raise ValueError(
            f"blend_stop_strings has {len(each.stop_strings)} entries; it must have {requests}, "
            "one a request"
        )
    found = arguments["stop_strings"] or []
    found = [found] if isinstance(found, str) else list(found)
    settings.check_stop_strings(found)
    return each, found


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
