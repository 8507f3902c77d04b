"""Ids that a call names and no row can write: the caller is told of an end that never comes."""

from __future__ import annotations

import warnings
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS, VOCAB, make, make_letters, make_tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

END = VOCAB  # the token by which a chat model ends its answers; no other model has it
OUTSIDE = "which no row can write"


def chat_model(end: Any = END) -> PreTrainedModel:
    """A model that ends its texts by a token which the others do not have."""
    model = make("llama", 4)
    model.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    model.generation_config.eos_token_id = end
    return model


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.eos_token_id == END
    return tokenizer


@pytest.mark.parametrize("end", [END, [EOS, END]], ids=["alone", "beside another"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", [False, True], ids=["generate", "hook"])
def test_a_saved_end_that_only_one_model_has(
    end: Any, first: bool, hook: bool, base: PreTrainedModel
) -> None:
    chat = cf.Model(chat_model(end), name="chat")
    blend = chat + 0.1 * cf.Model(base) if first else cf.Model(base) + 0.1 * chat

    def decode(**arguments: Any) -> Any:
        if not hook:
            return cf.generate(blend, [[5, 6]], max_new_tokens=2, **arguments).sequences
        return blend.terms[0].model.generate(
            torch.tensor([[5, 6]]),
            custom_generate=cf.decode,
            blend=blend,
            max_new_tokens=2,
            **arguments,
        )

    with pytest.warns(RuntimeWarning, match=f"chat ends texts by token {END}, {OUTSIDE}"):
        ids = decode()
    # A caller who names an end is not warned. Hugging Face's own `generate` hands on one config, of
    # what is asked and what is saved, so that only an end unlike the saved one counts as named.
    assert torch.equal(decode(eos_token_id=5), ids)
    assert torch.equal(decode(eos_token_id=None), ids)
    with pytest.raises(ValueError, match=f"eos_token_id has token {END}, {OUTSIDE}"):
        decode(eos_token_id=[5, END])


def test_an_end_of_the_tokenizer_alone(base: PreTrainedModel) -> None:
    tokenizer = chat_tokenizer()
    with pytest.warns(RuntimeWarning, match=f"the tokenizer ends texts by token {END}"):
        cf.generate(base, "film", tokenizer=tokenizer, max_new_tokens=2)
    guide = cf.Model(chat_model(EOS), tokenizer=tokenizer, name="chat")
    with pytest.warns(RuntimeWarning, match=f"the tokenizer of chat ends texts by token {END}"):
        cf.generate(cf.Model(base) + guide, "film", max_new_tokens=2)


def test_an_end_that_all_models_have() -> None:
    tokenizer = chat_tokenizer()
    chat = cf.Model(chat_model([EOS, END]), tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = cf.generate(
            chat,
            "film",
            max_new_tokens=5,
            prefix_allowed_tokens_fn=lambda i, ids: [END] if len(ids) == 2 else [9],
        )
    assert out.responses == [[9, END]]
    assert out.finished.all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"forced_eos_token_id": VOCAB}, f"forced_eos_token_id has token {VOCAB}"),
        ({"forced_eos_token_id": [1, VOCAB]}, f"forced_eos_token_id has token {VOCAB}"),
        ({"forced_bos_token_id": VOCAB + 9}, "forced_bos_token_id has token"),
        ({"bad_words_ids": [[5, 6], [7, VOCAB]]}, f"bad_words_ids has token {VOCAB}"),
        ({"sequence_bias": {(5, VOCAB): -1.0}}, f"sequence_bias has token {VOCAB}"),
        ({"sequence_bias": [[[5, VOCAB], -1.0]]}, f"sequence_bias has token {VOCAB}"),
        ({"suppress_tokens": [VOCAB]}, f"suppress_tokens has token {VOCAB}"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens has token -1"),
        ({"eos_token_id": 2**63}, "eos_token_id has token 9223372036854775808"),
        ({"exponential_decay_length_penalty": (1, 1.1)}, "favours the ends"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_ids_outside_the_vocabulary(
    arguments: dict[str, Any], match: str, base: PreTrainedModel
) -> None:
    """Another model has the token too, but not all have it, so that the blend cannot write it."""
    blend = cf.Model(chat_model(END)) + 0.1 * cf.Model(base)
    with pytest.raises(ValueError, match=match):
        cf.generate(blend, [[5, 6]], max_new_tokens=2, **{"stop_strings": None, **arguments})


@pytest.mark.parametrize("ids", [1.5, "1", True, [1, 2.5], [[1], "a"]])
def test_ends_that_are_no_ids(ids: Any, base: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="eos_token_id has"):
        cf.generate(base, [[5, 6]], max_new_tokens=2, eos_token_id=ids)


def test_a_stop_string_that_is_a_token_outside(base: PreTrainedModel) -> None:
    tokenizer = make_letters()
    tokenizer.add_tokens(["<end>"])
    with pytest.warns(RuntimeWarning, match=f"stop_strings has '<end>', token .*{OUTSIDE}"):
        cf.generate(
            base, [[5, 6]], tokenizer=tokenizer, max_new_tokens=2, stop_strings=["ab", "<end>"]
        )


def test_a_watermark_counts_on_all_columns(base: PreTrainedModel) -> None:
    arguments: dict[str, Any] = {"watermarking_config": {"bias": 2.5}, "max_new_tokens": 2}
    blend = cf.Model(chat_model(EOS)) + 0.1 * cf.Model(base)
    with pytest.raises(NotImplementedError, match="watermarking_config counts on the 62 columns"):
        cf.generate(blend, [[5, 6]], **arguments)
    config = GenerationConfig(**arguments)
    assert torch.equal(
        cf.generate(base, [[5, 6]], generation_config=config).sequences,
        base.generate(torch.tensor([[5, 6]]), generation_config=config),
    )
