"""What a draft must be: errors name the argument, what it was and what it must be."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from drafted import PROMPTS, model
from tiny_models import VOCAB, make_letters, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

BASE = cf.Model(model())
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"a Draft has a source .* or texts; it has neither"),
    ({"source": "prompt", "texts": [None]}, ValueError, "source and texts are both given"),
    ({"source": "prompts"}, ValueError, "draft.source is 'prompts'; .*did you mean 'prompt'"),
    ({"source": "a text to copy"}, ValueError, "texts are given as texts="),
    ({"source": 3}, TypeError, "draft.source is"),
    ({"source": ["prompt"]}, TypeError, "draft.source is"),
    ({"texts": "a text"}, TypeError, "draft.texts is a str; it must be a list"),
    ({"texts": {"a": 1}}, TypeError, "draft.texts is a dict; it must be a list"),
    ({"texts": torch.zeros(2)}, TypeError, "draft.texts is a Tensor; it must be a list"),
    (
        {"source": "prompt", "length": 0},
        ValueError,
        r"draft.length is 0; it must be within \[1, 64",
    ),
    ({"source": "prompt", "length": -1}, ValueError, "draft.length is -1; it must be within"),
    ({"source": "prompt", "length": 65}, ValueError, "draft.length is 65; it must be within"),
    ({"source": "prompt", "length": True}, TypeError, "draft.length is True; it must be an int or"),
    (
        {"source": "prompt", "length": "long"},
        TypeError,
        "draft.length is 'long'; it must be an int",
    ),
    ({"source": "prompt", "length": 2.0}, TypeError, "draft.length is 2.0; it must be an int or"),
    ({"source": "prompt", "length": None}, TypeError, "draft.length is None; it must be an int or"),
]


@pytest.mark.parametrize(("given", "error", "says"), MISTAKES)
def test_mistakes_are_named(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cf.Draft(**given)


def test_lengths_that_are_fine() -> None:
    for length in (1, 64, "auto"):
        assert cf.Draft("prompt", length=length).length == length


@pytest.mark.parametrize("given", ["prompt", model(), BASE, 4, [cf.Draft("prompt")]])
def test_a_draft_is_a_draft(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"draft is a {type(given).__name__}; it must be a crossf"):
        cf.generate(BASE, PROMPTS, draft=given, max_new_tokens=2)


IN_A_CALL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"texts": [None] * 4}, ValueError, "draft.texts has 4 entries; it must have 5, one a request"),
    ({"texts": []}, ValueError, "draft.texts has 0 entries; it must have 5, one a request"),
    (
        {"texts": [[VOCAB], *[None] * 4]},
        ValueError,
        r"draft.texts\[0\] has id 61; ids must be with",
    ),
    ({"texts": [None, [3, -1], *[None] * 3]}, ValueError, r"draft.texts\[1\] has id -1; ids must"),
    ({"texts": ["a", *[None] * 4]}, ValueError, "tokenizer is None; texts as draft.texts need one"),
    ({"texts": [None, 7, *[None] * 3]}, TypeError, r"draft.texts\[1\] is 7; it must be a text or"),
    ({"texts": [None, [1.5], *[None] * 3]}, TypeError, r"draft.texts\[1\] is \[1.5\]; it must"),
]


@pytest.mark.parametrize(("given", "error", "says"), IN_A_CALL)
def test_mistakes_in_a_call(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cf.generate(BASE, PROMPTS, draft=cf.Draft(**given), max_new_tokens=2, progress=False)


def test_texts_that_are_no_texts() -> None:
    base = cf.Model(model(), tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=r"draft.texts\[0\]"):
        cf.generate(base, ["a film"], draft=cf.Draft(texts=["\ud800"]), max_new_tokens=2)


@pytest.mark.parametrize("simple", [True, False])
def test_the_simple_path_is_given_none(simple: bool) -> None:
    engine = cf.Engine(simple=simple)
    how: dict[str, Any] = {"max_new_tokens": 2, "engine": engine, "draft": cf.Draft("prompt")}
    if simple:
        with pytest.raises(
            ValueError, match="engine is simple, which reads a token at a time; lea"
        ):
            cf.generate(BASE, PROMPTS, **how)
    else:
        cf.generate(BASE, PROMPTS, **how)


def test_another_vocabulary_is_named() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=2000, num_attention_heads=2, **sizes)
    other = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"^draft: .*2,000"):
        cf.generate(BASE, PROMPTS, draft=cf.Draft(other), max_new_tokens=2)


def test_tokens_that_mean_something_else_are_named() -> None:
    ours = make_tokenizer()
    letters = cf.Model(model("qwen3", 8), tokenizer=make_letters())
    with pytest.raises(ValueError, match=r"^draft: "):
        cf.generate(
            cf.Model(model(), tokenizer=ours), ["a film"], draft=cf.Draft(letters), max_new_tokens=2
        )


def test_classifiers_do_not_guess() -> None:
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_config(model().config)
    blend = BASE + 0.5 * cf.Classifier(judge, make_tokenizer(), 0)
    with pytest.raises(NotImplementedError, match=r"draft.source is .*; classifiers read texts"):
        cf.Draft(blend)


def test_hugging_faces_generate_takes_a_draft() -> None:
    base, ids = model("llama", 0), torch.tensor([PROMPTS[0]])
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mixed = cf.Model(base) + 0.5 * cf.Model(model("gpt2", 1))
    plain = cf.generate(mixed, ids, **how)
    how |= {"custom_generate": cf.decode, "blend": mixed}
    for draft in (cf.Draft(texts=plain.responses, length=3), cf.Draft(model("qwen3", 8))):
        assert torch.equal(base.generate(ids, draft=draft, **how), plain.sequences)
    with pytest.raises(TypeError, match=r"draft is a str; it must be a crossfade.Draft"):
        base.generate(ids, draft="prompt", **how)
    with pytest.raises(ValueError, match="engine is simple"):
        base.generate(ids, draft=cf.Draft("prompt"), engine=cf.Engine(simple=True), **how)
