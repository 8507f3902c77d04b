"""What is not supported or wrong is refused by name, with what it must be. Nothing is ignored."""

from __future__ import annotations

import re
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.settings import SUPPORTED, UNSUPPORTED_ARGUMENTS
from tiny_models import VOCAB, make
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

UNSUPPORTED: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 2},
    {"early_stopping": True},
    {"length_penalty": 2.0},
    {"num_beam_groups": 2},
    {"diversity_penalty": 0.5},
    {"constraints": [object()]},
    {"force_words_ids": [[5]]},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_config": {"nbits": 4}},
    {"max_cache_len": 64},
    {"prefill_chunk_size": 4},
    {"compile_config": CompileConfig()},
    {"guidance_scale": 1.5},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"low_memory": True},
    {"encoder_repetition_penalty": 1.2},
    {"encoder_no_repeat_ngram_size": 2},
    {"decoder_start_token_id": 3},
    {"token_healing": True},
    {"remove_invalid_values": True},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"is_assistant": True},
    {"num_assistant_tokens": 5},
    {"output_scores": True, "return_dict_in_generate": True},
    {"output_logits": True, "return_dict_in_generate": True},
    {"output_attentions": True},
    {"output_hidden_states": True},
]


@pytest.mark.parametrize("arguments", UNSUPPORTED, ids=lambda a: next(iter(a)))
def test_unsupported_fields_raise_by_name(arguments: dict[str, Any], base: PreTrainedModel) -> None:
    name = next(iter(arguments))
    with pytest.raises(NotImplementedError, match=f"^{name}="):
        cf.generate(base, [5, 6], max_new_tokens=2, **arguments)
    with pytest.raises(NotImplementedError, match=f"^{name}="):
        cf.generate(base, [5, 6], generation_config=GenerationConfig(max_new_tokens=2, **arguments))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_ARGUMENTS))
def test_unsupported_arguments_raise_by_name(name: str, base: PreTrainedModel) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported"):
        cf.generate(base, [5, 6], max_new_tokens=2, **{name: object()})


SAVED_WITHOUT_EFFECT: dict[str, Any] = {
    "use_cache": False,  # Every Trainer leaves it so.
    "cache_implementation": "static",
    "cache_config": {"max_cache_len": 64},
    "prefill_chunk_size": 4,
    "max_cache_len": 64,
    "compile_config": CompileConfig(),
    "decoder_start_token_id": 0,
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "num_assistant_tokens": 5,
    "assistant_confidence_threshold": 0.0,
    "prompt_lookup_num_tokens": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "remove_invalid_values": True,
}


@pytest.mark.parametrize("name", SAVED_WITHOUT_EFFECT)
def test_saved_settings_that_change_no_token_are_passed_over(name: str) -> None:
    model, value = make(), SAVED_WITHOUT_EFFECT[name]
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=4)
    setattr(model.generation_config, name, value)
    assert torch.equal(cf.generate(model, ids, max_new_tokens=4).sequences, expected)
    again = GenerationConfig(max_new_tokens=4)
    setattr(again, name, value)  # A config that was made from the saved one has the same fields.
    found = cf.generate(model, ids, generation_config=again).sequences
    assert torch.equal(found, expected)
    hooked = model.generate(
        ids,
        custom_generate=cf.decode,
        blend=model,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    assert torch.equal(hooked.sequences, expected)
    assert getattr(model.generation_config, name) == value


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("num_beams", 3, "pass num_beams=1"),
        ("guidance_scale", 1.5, "pass guidance_scale=1"),
        ("encoder_repetition_penalty", 1.2, "pass encoder_repetition_penalty=1.0"),
        ("token_healing", True, "set it to None there"),
    ],
)
def test_saved_settings_that_change_tokens_are_refused(name: str, value: Any, off: str) -> None:
    model = make()
    setattr(model.generation_config, name, value)
    message = rf"{name}={value} of the model's saved generation_config \({off}\)"
    with pytest.raises(NotImplementedError, match=message):
        cf.generate(model, [5, 6], max_new_tokens=2)
    if name != "token_healing":
        neutral = 1.0 if name.endswith("penalty") else 1
        out = cf.generate(model, [5, 6], max_new_tokens=2, **{name: neutral})
        assert out.lengths.tolist() == [2]


def test_a_saved_search_that_hugging_face_would_not_do() -> None:
    """Contrastive search does not sample: a call that samples is not refused for its setting."""
    model = make()
    model.generation_config.penalty_alpha = 0.6
    model.generation_config.top_k = 4
    with pytest.raises(NotImplementedError, match=r"penalty_alpha=0.6 of the model's saved"):
        cf.generate(model, [5, 6], max_new_tokens=2)
    assert cf.generate(model, [5, 6], max_new_tokens=2, do_sample=True).lengths.tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "todo"),
    [
        ({"use_cache": False}, "leave it out"),
        ({"cache_implementation": "static"}, "leave it out"),
        ({"num_beams": 4}, "search=ChunkBeamSearch"),
        ({"guidance_scale": 2.0}, "presets.cfg"),
        ({"length_penalty": 2.0}, "leave it out"),
        ({"decoder_start_token_id": 1}, "leave it out"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_asked_is_refused_with_what_to_do(
    arguments: dict[str, Any], todo: str, base: PreTrainedModel
) -> None:
    with pytest.raises(NotImplementedError, match=f"is not supported; .*{todo}"):
        cf.generate(base, [5, 6], max_new_tokens=2, **arguments)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_ARGUMENTS))
def test_unsupported_arguments_that_ask_for_nothing(name: str, base: PreTrainedModel) -> None:
    for nothing in (None, False, {}):
        out = cf.generate(base, [5, 6], max_new_tokens=1, **{name: nothing})
        assert out.lengths.tolist() == [1]


def test_every_field_of_hugging_face_is_decided() -> None:
    """A field that a later version of transformers adds is refused until decoding knows it."""
    from crossfade.decoding.settings import check_supported

    for name in vars(GenerationConfig()):
        if name in SUPPORTED or name.startswith("_"):
            continue
        config = GenerationConfig()
        setattr(config, name, "anything")
        with pytest.raises(NotImplementedError, match=f"^{name}="):
            check_supported(config, GenerationConfig())


class Chatty:
    """An object that is neither a processor nor a tensor."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return scores[:, :5]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"max_tokens": 5}, TypeError, "unknown argument 'max_tokens'"),
        ({"_from_model_config": True}, TypeError, "unknown argument"),
        ({"generation_config": {"top_k": 3}}, TypeError, "generation_config is a dict"),
        ({"streamer": 3}, TypeError, "streamer is a int"),
        ({"logits_processor": 3}, TypeError, "logits_processor is a int"),
        ({"stopping_criteria": len}, TypeError, "stopping_criteria is a builtin"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, ValueError, "max_new_tokens is -3"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens is True"),
        ({"max_length": "9"}, TypeError, "max_length is '9'"),
        ({"max_length": 2, "max_new_tokens": None}, ValueError, "max_length"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens is -1"),
        ({"min_length": 1.0}, TypeError, "min_length is 1.0"),
        ({"no_repeat_ngram_size": -2}, ValueError, "no_repeat_ngram_size is -2"),
        ({"num_return_sequences": 0, "do_sample": True}, ValueError, "num_return_sequences is 0"),
        (
            {"num_return_sequences": 2},
            ValueError,
            "num_return_sequences",
        ),  # Greedy decoding would give the same response twice.
        ({"do_sample": 1}, TypeError, "do_sample is 1"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"do_sample": True, "temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"do_sample": True, "temperature": torch.ones(1)}, TypeError, "temperature is a tensor"),
        ({"do_sample": True, "temperature": "hot"}, TypeError, "temperature is 'hot'"),
        ({"do_sample": True, "top_k": -1}, ValueError, "top_k is -1"),
        ({"do_sample": True, "top_k": 2.0}, TypeError, "top_k is 2.0"),
        ({"do_sample": True, "top_p": 1.2}, ValueError, "top_p is 1.2"),
        ({"do_sample": True, "min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"max_time": "soon"}, TypeError, "max_time is 'soon'"),
        ({"repetition_penalty": -1.0}, ValueError, "penalty"),
        ({"pad_token_id": 1.5}, TypeError, "pad_token_id is 1.5"),
        ({"pad_token_id": "a"}, TypeError, "pad_token_id is 'a'"),
        ({"pad_token_id": 2**63}, ValueError, "pad_token_id is 9223372036854775808"),
        ({"bos_token_id": True}, TypeError, "bos_token_id is True"),
        ({"stop_strings": [""]}, ValueError, "stop_strings has ''"),
        ({"stop_strings": [3]}, ValueError, "stop_strings has 3"),
        ({"return_dict_in_generate": 3}, TypeError, "return_dict_in_generate is 3"),
        ({"return_term_logprobs": 1}, TypeError, "return_term_logprobs is 1"),
        ({"return_pushes": 1}, TypeError, "return_pushes is 1"),
        ({"return_kl_to_base": "yes"}, TypeError, "return_kl_to_base is 'yes'"),
        ({"seed": 1.5}, TypeError, "seed is 1.5"),
        ({"seed": True}, TypeError, "seed is True"),
        ({"seed": "7"}, TypeError, "seed is '7'"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"seed": [1, 2]}, ValueError, "seed has 2 entries"),
        ({"seed": [-1]}, ValueError, r"seed\[0\] is -1"),
        ({"seed": torch.ones(1)}, TypeError, "seed is a torch.float32 tensor"),
        ({"logits_processor": [Chatty()]}, ValueError, "logits_processor returned"),
        ({"tokenizer": object()}, TypeError, "tokenizer is a object"),
    ],
    ids=lambda x: re.sub(r" at 0x\w+", "", str(x)) if isinstance(x, dict) else "",
)
def test_bad_values(
    arguments: dict[str, Any], error: type[Exception], match: str, base: PreTrainedModel
) -> None:
    with pytest.raises(error, match=match):
        cf.generate(base, [5, 6, 7], **{"max_new_tokens": 2, **arguments})


def test_bad_blends(base: PreTrainedModel) -> None:
    for blend in (3, "base", None):
        with pytest.raises(TypeError, match="blend is a"):
            cf.generate(blend, [5, 6], max_new_tokens=2)
    three = torch.tensor([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"\[?2"):
        cf.generate(three * cf.Model(base), [[5], [6]], max_new_tokens=2)


def test_encoder_decoders_are_refused() -> None:
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
        )
    )
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        cf.generate(bart, [5, 6], max_new_tokens=2)


class OwnLoop(LlamaForCausalLM):
    def generate(self, inputs: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return inputs


def test_a_generate_of_its_own_is_refused(base: PreTrainedModel) -> None:
    """Nobody knows what a `generate` of the model's own does in place of Hugging Face's."""
    model = OwnLoop(base.config)
    with pytest.raises(NotImplementedError, match="model0 is a OwnLoop, whose generate is its own"):
        cf.generate(model, [5, 6], max_new_tokens=2, engine=cf.Engine(simple=True))


class Forgetful(torch.nn.Module):
    """Takes a cache and leaves it empty, so that later logits would be those of one token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, return_dict: bool
    ) -> Any:
        return self.model(input_ids)


def test_a_head_that_forgets_is_refused(base: PreTrainedModel) -> None:
    blend = cf.Model(base) + 0.1 * cf.ValueHead(Forgetful(base))
    with pytest.raises(NotImplementedError, match="does not fill a DynamicCache"):
        cf.generate(blend, [5, 6], max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="does not fill a DynamicCache"):
        cf.generate(blend, [[5, 6], [7]], max_new_tokens=2)


def test_a_first_term_without_generate(base: PreTrainedModel) -> None:
    own = Forgetful(base)
    with pytest.raises(
        TypeError, match="first term is a Forgetful, which has no generation config"
    ):
        cf.generate(own, [5, 6], max_new_tokens=2)
