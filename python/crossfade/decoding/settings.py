"""Hugging Face's generation arguments, resolved as `model.generate` resolves them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.generation import logits_process as hf
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from ..checks import did_you_mean, warn
from ..elsewhere import GENERATE
from ..ops import check
from ..reading import check_unicode
from ..search import Search
from .inputs import asks_nothing

LARGEST = 2**63 - 1  # the largest int64: tokens are counted in this type
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Settings that Hugging Face applies to scores after those of `SAMPLING` or between them, with the
# values by which they do nothing.
AFTER = {"top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
# Fields of GenerationConfig that decoding honours.
SUPPORTED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("renormalize_logits", "watermarking_config", "num_return_sequences"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "return_dict_in_generate"),
    *("disable_compile", "transformers_version"),
}
# Fields about how Hugging Face runs a model and what else it returns. They are ignored where they
# come from the generation config that was saved with the model.
HOW = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
    *("prefill_chunk_size", "compile_config", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "max_matching_ngram_size", "speculation_type"),
    # These are about encoder-decoders, beams, and scores that are not finite (they end a row here).
    *("decoder_start_token_id", "early_stopping", "length_penalty", "remove_invalid_values"),
}
# Fields that choose how Hugging Face searches. Those of a model's saved config are ignored if what
# they choose is greedy decoding or sampling after all.
MODE = {
    *("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
    *("penalty_alpha", "dola_layers"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
}
# The ways of Hugging Face's that give the tokens of greedy decoding or sampling.
SAME_TOKENS = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
}
# Values by which other fields ask for nothing, besides None. Where a field is not listed here, that
# value is False.
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "max_matching_ngram_size": 2,
}
# What to do instead of setting a field that is not supported.
INSTEAD = {
    "guidance_scale": GENERATE["guidance_scale"],
    "output_scores": "logprobs are always returned, return_term_logprobs=True adds each term's",
    "output_logits": "logprobs are always returned, return_term_logprobs=True adds each term's",
    "remove_invalid_values": "a row without a finite score is reported and ended",
    "num_beams": GENERATE["num_beams"],
    "use_cache": "each term has a cache of its own; leave it out, Engine(simple=True) is the plain "
    "path of Hugging Face",
    "cache_implementation": "each term has a cache of its own; leave it out",
    "num_assistant_tokens": GENERATE["num_assistant_tokens"],
    "prompt_lookup_num_tokens": GENERATE["prompt_lookup_num_tokens"],
    "assistant_early_exit": GENERATE["assistant_model"],
    "use_mtp": GENERATE["assistant_model"],
    "decoder_start_token_id": "a response begins with its prompt; leave it out",
}
# Arguments of model.generate that are not fields of GenerationConfig.
UNSUPPORTED_ARGUMENTS = {
    *("assistant_model", "assistant_tokenizer", "synced_gpus", "custom_generate"),
    "trust_remote_code",
    *("negative_prompt_ids", "negative_prompt_attention_mask", "input_ids", "inputs_embeds"),
    *("past_key_values", "position_ids", "token_type_ids", "cache_position", "encoder_outputs"),
    *("decoder_input_ids", "decoder_attention_mask", "encoder_input_ids", "logits_to_keep"),
    *("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes"),
    *("input_features", "input_values", "labels"),
}


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling that `crossfade.ops.blend_sample` applies itself."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def resolve(
    model: Any,
    generation_config: GenerationConfig | None,
    arguments: dict[str, Any],
    lists: Collection[str] = (),
    others: Collection[str] = (),
) -> GenerationConfig:
    """The config of a call. `arguments` come before `generation_config`, and that before the
    model's own config and Hugging Face's defaults.

    One default differs: top-k is off, not 50, unless one of the first three sets it.

    Args:
        lists: the settings of which each request has its own value. They are off in the config.
        others: the arguments that the caller has besides, for errors about unknown ones.

    Raises:
        TypeError: an argument is unknown or of the wrong type.
        ValueError: an argument has a value that it must not have.
        NotImplementedError: names an argument that is not supported.
    """
    fields = vars(GenerationConfig())
    for name, value in list(arguments.items()):
        if name in UNSUPPORTED_ARGUMENTS and asks_nothing(name, value):
            del arguments[name]
            continue
        if name in UNSUPPORTED_ARGUMENTS:
            says = f"; {GENERATE[name]}" if name in GENERATE else ""
            raise NotImplementedError(f"{name} is not supported by crossfade.generate{says}")
        if name not in fields or name.startswith("_"):
            says = did_you_mean(name, [*SUPPORTED, *others], GENERATE)
            raise TypeError(f"crossfade.generate got an unknown argument {name!r}{says}")
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"generation_config is a {type(generation_config).__name__}; it must be a "
            "GenerationConfig or None; GenerationConfig(**fields) makes one of a dict"
        )
    asked = {**vars(generation_config or GenerationConfig()), **arguments}
    _check_numbers(asked)
    for name in SAMPLING:
        if arguments.get(name) is not None and name not in lists:
            check.setting(name, arguments[name], 1, torch.device("cpu"))
    _check_greedy(
        arguments, stated("do_sample", arguments, generation_config, model.generation_config)
    )
    config, _ = model._prepare_generation_config(generation_config, **arguments)
    if stated("top_k", arguments, generation_config, model.generation_config) is None:
        config.top_k = None
    check_supported(config, model.generation_config)
    own = [name for name in SAMPLING if name in lists]
    if own and not config.do_sample:
        raise ValueError(
            f"{own[0]} is a list, and do_sample is False; it must be True (a row of temperature 0 "
            "is greedy all the same)"
        )
    for name in own:
        setattr(config, name, None)
    neutral = {name: (None, value) for name, value in AFTER.items()}
    after = [n for n, values in neutral.items() if own and getattr(config, n, None) not in values]
    if after:
        raise NotImplementedError(
            f"{own[0]} is a list and {after[0]} is {getattr(config, after[0])}, which comes after "
            f"it; with {after[0]}, {own[0]} must be a number"
        )
    if config.do_sample and config.temperature == 0:
        config.do_sample = False  # Every row is greedy.
    for name in SAMPLING if config.do_sample else ():
        if getattr(config, name) is not None:
            value = check.setting(name, getattr(config, name), 1, torch.device("cpu"))
            setattr(config, name, value if name == "top_k" else float(value))
    return config


def _check_greedy(arguments: dict[str, Any], do_sample: Any) -> None:
    """Say what greedy decoding, the default, makes of arguments that are for sampling.

    Those of `SAMPLING` change nothing in it. Where the caller has not said that it is greedy, this
    is warned of, as in Hugging Face.
    """
    if do_sample or any(arguments.get(name) is not None for name in MODE):
        return  # Ways of decoding that are neither are refused by their own names.
    rows = arguments.get("num_return_sequences") or 1
    if rows > 1:
        raise ValueError(
            f"num_return_sequences is {rows} and do_sample is {do_sample}; it must be True, or all "
            "rows would be equal"
        )
    neutral = {
        "temperature": (None, 0, 1),
        "top_k": (None, 0),
        "top_p": (None, 1),
        "min_p": (None, 0),
    }
    asked = [n for n in SAMPLING if n in arguments and arguments[n] not in neutral[n]]
    if asked and do_sample is None:
        warn(
            f"{asked[0]} is {arguments[asked[0]]} and changes nothing, as do_sample is not set: "
            "decoding is greedy; pass do_sample=True to sample",
        )


def check_search(search: Search, config: GenerationConfig) -> None:
    """Refuse settings of a call that its search cannot go with.

    Raises:
        ValueError: names the setting.
    """
    returned = config.num_return_sequences
    if not config.do_sample and search.rows > 1:
        why = "temperature is 0" if config.temperature == 0 else "do_sample is False"
        raise ValueError(
            f"{why}; a search of {search.rows} rows must sample, at a temperature "
            "above 0, or all of them would be equal"
        )
    if returned > search.width:
        raise ValueError(
            f"num_return_sequences is {returned}; it must be at most {search.width}, as many rows "
            "as the search keeps" + (f" by its budget of {search.budget}" if search.budget else "")
        )


def stated(name: str, arguments: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """The value of `name` in the arguments, or else in the first of `configs` that has one."""
    values = (arguments.get(name), *(getattr(c, name, None) for c in configs))
    return next((v for v in values if v is not None), None)


def check_supported(config: GenerationConfig, saved: GenerationConfig) -> None:
    """Refuse, by name, whatever `config` asks for that decoding does not do.

    A field that is as in the config `saved` with the model, and that would change no token in
    Hugging Face, is not refused but set to None.
    """
    mode = config.get_generation_mode()
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        if name in SUPPORTED or name.startswith("_") or value is None:
            continue
        if value == NEUTRAL.get(name, False):
            continue
        found = f"{name}={value!r}"
        if value == getattr(saved, name, None):
            if name in HOW or (name in MODE and mode in SAME_TOKENS):
                setattr(config, name, None)
                continue
            neutral = NEUTRAL.get(name)
            off = f"pass {name}={neutral!r}" if neutral is not None else "set it to None there"
            found += f" of the model's saved generation_config ({off})"
        instead = INSTEAD.get(name, "leave it out")
        raise NotImplementedError(f"{found} is not supported; {instead}")


def _check_numbers(asked: dict[str, Any]) -> None:
    """Check types and ranges, as Hugging Face compares values without looking at their types."""
    for name in ("max_new_tokens", "max_length", "num_return_sequences"):
        check_int(name, asked.get(name), 1, LARGEST)
    for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size"):
        check_int(name, asked.get(name), 0, LARGEST)
    for name in ("pad_token_id", "bos_token_id"):
        check_int(name, asked.get(name), -LARGEST - 1, LARGEST)
    for name in SAMPLING:
        if isinstance(asked.get(name), torch.Tensor):
            raise TypeError(f"{name} is a tensor; it must be a number")
    time = asked.get("max_time")
    if time is not None and (isinstance(time, bool) or not isinstance(time, (int, float))):
        raise TypeError(f"max_time is {time!r}; it must be a number of seconds")
    texts = asked.get("stop_strings")
    check_stop_strings([texts] if isinstance(texts, str) else texts or ())
    for name in ("do_sample", "return_dict_in_generate"):
        if asked.get(name) is not None:
            check.flag(name, asked[name])


def check_stop_strings(texts: Sequence[Any]) -> None:
    """Refuse stop strings that no text can end with."""
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop_strings has {text!r:.80}; it must be texts that are not empty")
        check_unicode(text, "stop_strings")


def check_int(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    """Refuse, by name, a value that is no int within these bounds; None is left out."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < lowest:
        raise ValueError(f"{name} is {value}; it must be at least {lowest}")
    if highest is not None and value > highest:
        raise ValueError(f"{name} is {value}; it must be at most {highest}")


def set_lengths(
    model: Any, config: GenerationConfig, asked_max_length: bool, prompt_length: int
) -> None:
    """Turn the limits of new tokens into limits of the whole sequence, as Hugging Face does."""
    model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=not asked_max_length,
        has_default_min_length=True,  # This only chooses whether a clash is logged.
        model_input_name="input_ids",
        input_ids_length=prompt_length,
        inputs_tensor=None,
    )
    model._validate_generated_length(config, prompt_length, not asked_max_length)


def split_processors(
    processors: Sequence[Any], do_sample: bool
) -> tuple[LogitsProcessorList, Sampling]:
    """Take temperature, top-k, top-p and min-p off the end of the list, for the kernel to apply.

    They are taken only where they come in the kernel's order and nothing comes after them but a
    normalisation, which changes no distribution. What is left of the list runs as it is.
    """
    rest = list(processors)
    if rest and type(rest[-1]) is hf.LogitNormalization:
        rest.pop()
    taken: dict[str, Any] = {}
    order = [
        (hf.MinPLogitsWarper, "min_p"),
        (hf.TopPLogitsWarper, "top_p"),
        (hf.TopKLogitsWarper, "top_k"),
        (hf.TemperatureLogitsWarper, "temperature"),
    ]
    for kind, name in order:
        if rest and type(rest[-1]) is kind and _plain(rest[-1]):
            taken[name] = getattr(rest.pop(), name)
    return LogitsProcessorList(rest), Sampling(do_sample=do_sample, **taken)


def _plain(warper: Any) -> bool:
    """Whether a warper does what the kernel does: it excludes tokens outright, and may leave one.

    A TopKLogitsWarper has no such minimum: it takes the larger one of that and k for its k.
    """
    removes = getattr(warper, "filter_value", -float("inf")) == -float("inf")
    return removes and getattr(warper, "min_tokens_to_keep", 1) == 1


class Ends(NamedTuple):
    """What ends rows.

    Attributes:
        limit: how many new tokens a row may have.
        eos: the ids that end a row.
        deadline: the time, as ``time.time()`` counts it, at which rows are cut.
        others: all other criteria, Hugging Face's and the caller's.
    """

    limit: int
    eos: list[int]
    deadline: float | None
    others: list[Any]


def split_criteria(criteria: Sequence[Any], prompt_length: int) -> Ends:
    """Take limits of length and time, and EOS, out of the list. Others are called as they are."""
    kinds = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)
    lengths = [c for c in criteria if type(c) is MaxLengthCriteria]
    times = [c for c in criteria if type(c) is MaxTimeCriteria]
    eos = [c for c in criteria if type(c) is EosTokenCriteria]
    if not lengths:
        raise ValueError("max_new_tokens and max_length are None; one must limit the response")
    deadlines = [c.initial_timestamp + c.max_time for c in times]
    return Ends(
        limit=min(c.max_length for c in lengths) - prompt_length,
        eos=[int(token) for c in eos for token in c.eos_token_id],
        deadline=min(deadlines, default=None),
        others=[c for c in criteria if type(c) not in kinds],
    )
