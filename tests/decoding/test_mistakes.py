"""What newcomers type, and what each is told to type instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import make, make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return make("llama")


def told(says: str, f: Any, *kinds: type[Exception]) -> None:
    with pytest.raises(kinds or (TypeError, ValueError), match=says):
        f()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (lambda lm: "smollm2", r"model, tokenizer = crossfade.models.smollm2\(\)"),
        (lambda lm: "org/name", r"crossfade.models.load\('org/name'\)"),
        (lambda lm: Path("folder"), r"crossfade.models.load\('folder'\)"),
        (lambda lm: LlamaForCausalLM, "it is a class: from_pretrained"),
        (lambda lm: (lm, make_tokenizer()), r"Model\(model, tokenizer=tokenizer\)"),
        (lambda lm: SimpleNamespace(model=lm), r"Model\(x.model, tokenizer=x.tokenizer\)"),
    ],
)
def test_what_is_no_model(x: Any, says: str, lm: PreTrainedModel) -> None:
    for f in (
        lambda: cf.Model(x(lm)),
        lambda: cf.ValueHead(x(lm)),
        lambda: cf.generate(x(lm), [5, 6], max_new_tokens=2),
        lambda: cf.score(x(lm), [5, 6], [7]),
        lambda: cf.generate(lm, [5, 6], max_new_tokens=2, kl_to=x(lm)),
    ):
        told(says, f, TypeError)


def test_terms_values_and_lists_in_the_wrong_place(lm: PreTrainedModel) -> None:
    term = cf.Model(lm)
    told("a term or a blend already", lambda: cf.Model(term))
    told("a term or a blend already", lambda: cf.Model(term + cf.Model(make("gpt2"))))
    told("added with weights: 0.5", lambda: cf.generate([term, term], [5, 6]))
    for value in (cf.Reward(reward), reward):
        told("a search chooses by a value", lambda v=value: cf.generate(v, [5, 6]))
    told("the blend comes first", lambda: cf.generate("the film", term))
    told("the blend comes first", lambda: cf.generate("the film", lm))
    recipe = cf.Recipe(term, cf.BestOfN(2, reward))
    told("it takes the blend's place", lambda: cf.generate(term, [5, 6], search=recipe))
    told("as ChunkBeamSearch.value=.*BestOfN", lambda: cf.generate(term, [5], search=cf.BestOfN))
    told("2, blend and inputs; the others", lambda: cf.generate(term, [5, 6], 20))


def reward(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.0 for _ in responses]


def test_tokenizers_that_are_none(lm: PreTrainedModel) -> None:
    told(r"AutoTokenizer.from_pretrained\('gpt2'\)", lambda: cf.Model(lm, tokenizer="gpt2"))
    told("it must be a Hugging Face tokenizer", lambda: cf.Model(lm, tokenizer=lm))
    told(
        "tokenizer is None, and stop_strings are texts",
        lambda: cf.generate(lm, [5, 6], max_new_tokens=2, stop_strings=["the"]),
    )
    told("those of its own tokenizer", lambda: cf.generate(lm, [500], max_new_tokens=2))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"generation_config": {"max_new_tokens": 2}}, r"GenerationConfig\(\*\*fields\)"),
        ({"engine": "simple"}, r"such as Engine\(simple=True\)"),
        ({"streamer": print}, r"TextStreamer\(tokenizer\)"),
        ({"logits_processor": print}, "must be a list, also of one"),
        ({"cache": True}, "which return_cache=True gives"),
        ({"num_return_sequences": 3}, "do_sample is None; it must be True, or all rows"),
        (
            {"num_return_sequences": 3, "do_sample": False},
            "do_sample is False; it must be True, or all rows",
        ),
    ],
)
def test_settings(how: dict[str, Any], says: str, lm: PreTrainedModel) -> None:
    told(says, lambda: cf.generate(lm, [5, 6], **{"max_new_tokens": 2} | how))


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}])
def test_settings_of_sampling_without_sampling(
    setting: dict[str, Any], lm: PreTrainedModel
) -> None:
    """As in Hugging Face they change nothing; here the caller reads it, unless that was said."""
    (name,) = setting
    with pytest.warns(UserWarning, match=f"{name} is .* changes nothing.*do_sample=True"):
        out = cf.generate(lm, [5, 6], max_new_tokens=4, **setting)
    quiet = cf.generate(lm, [5, 6], max_new_tokens=4, do_sample=False, **setting)
    assert torch.equal(out.sequences, quiet.sequences)
    for neutral in ({"temperature": 1.0}, {"temperature": 0}, {"top_k": 0}, {"top_p": 1.0}):
        cf.generate(lm, [5, 6], max_new_tokens=2, **neutral)


def test_supports(lm: PreTrainedModel) -> None:
    blend = cf.Model(lm) + cf.Model(make("gpt2"))
    told("takes it in a Support", lambda: blend.within(min_p=0.1))
    for bad in (0.1, {"min_p": 0.1}):
        told(r"such as Support\(min_p=0.1\)", lambda bad=bad: blend.within(bad))


def test_adapters(lm: PreTrainedModel) -> None:
    told("crossfade.models.with_adapters", lambda: cf.Model(lm, adapter="path/to/adapter"))


def test_dtypes(tmp_path: Path, lm: PreTrainedModel) -> None:
    lm.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    told("did you mean 'float16'", lambda: cf.models.load(tmp_path, dtype="flaot16"))
    told("dtype is 16; it must be one of", lambda: cf.models.load(tmp_path, dtype=16))


def test_rewards_are_called_with_prompts_and_responses() -> None:
    for bad in (lambda texts: [0.0], lambda a, b, c: [0.0], lambda *, prompts: [0.0]):
        told(r"fn is called as fn\(prompts, responses\)", lambda bad=bad: cf.Reward(bad))
        told(r"fn is called as fn\(prompts, responses\)", lambda bad=bad: cf.BestOfN(4, bad))
    assert cf.Reward(max).fn is max  # It does not say what it takes.


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", 2), ("top_k", 0.5)])
def test_settings_of_sampling_are_checked_in_greedy_calls_too(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} is "):
        cf.generate(make(), [[5, 6]], max_new_tokens=1, **{name: value})
