"""Bad input to sessions and requests: errors name the argument, what it was, what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
from served import FADED, PROMPT, SAMPLED, adapters, apart
from tiny_models import make

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def session() -> Iterator[cf.Session]:
    terms = {**apart(), "a": adapters()["x"], "b": adapters()["y"]}
    with cf.Session(terms, weights={"w": 0.5}, max_batch=4, max_length=100) as session:
        yield session


MODEL = make()
OF_SESSIONS: list[tuple[Any, dict[str, Any], str]] = [
    (MODEL, {}, r"terms is a LlamaForCausalLM; it must map names to models"),
    ([MODEL], {}, r"terms is a list; it must map names"),
    ({}, {}, r"terms begin with None; the first one must be a Model"),
    ({"both": cf.Model(MODEL) + cf.Model(MODEL)}, {}, r"the first one must be a Model"),
    ({"not a name": MODEL}, {}, r"not a name"),
    ({"base": MODEL}, {"max_batch": 0}, r"max_batch is 0; it must be at least 1"),
    ({"base": MODEL}, {"max_batch": 2.0}, r"max_batch is 2.0; it must be an int"),
    ({"base": MODEL}, {"max_waiting": -1}, r"max_waiting is -1; it must be at least 0"),
    ({"base": MODEL}, {"max_length": "9"}, r"max_length is '9'; it must be an int"),
    ({"base": MODEL}, {"engine": "simple"}, r"engine is .*simple"),
    ({"base": MODEL}, {"blend": "base +"}, r"column"),
    ({"base": MODEL}, {"blend": "bose"}, r"unknown name 'bose'.*base"),
    ({"base": MODEL}, {"blend": 3}, r"blend is a int; it must be a formula"),
    ({"base": MODEL}, {"blend": "w * base"}, r"unknown name 'w'"),
    ({"base": MODEL}, {"weights": {"w": math.nan}}, r"weights\['w'\] is nan; it must be finite"),
    ({"base": MODEL}, {"weights": {"w": "a"}}, r"weights\['w'\] is 'a'; it must be a number"),
    ({"base": MODEL}, {"weights": {"base": 1.0}}, r"weights has 'base', which is a term"),
    ({"base": MODEL}, {"weights": [("w", 1)]}, r"weights is .*; it must be a mapping"),
]


@pytest.mark.parametrize(("terms", "options", "says"), OF_SESSIONS)
def test_sessions(terms: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        cf.Session(terms, **options)


OF_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"blend": "bas"}, r"unknown name 'bas'"),
    ({"blend": "base + v * x"}, r"unknown name 'v'"),
    ({"blend": "w"}, r"formula"),
    ({"blend": cf.Model(MODEL)}, r"blend is a Model; it must be a formula, a str"),
    ({"weights": {"w": 1.0}}, r"weights has 'w', which is not in 'base'"),
    ({"blend": FADED, "weights": {"v": 1.0}}, r"weights has 'v', which is not in"),
    ({"blend": FADED, "weights": {"x": 1.0}}, r"weights has 'x', which is a term"),
    ({"blend": FADED, "weights": {"w": math.inf}}, r"weights\['w'\] is inf; it must be finite"),
    ({"blend": FADED, "weights": 0.5}, r"weights is 0.5; it must be a mapping"),
    ({"blend": "base + x / w", "weights": {"w": 0.0}}, r"divisor is 0"),
    ({"blend": "base + w * w * x", "weights": {"w": 1e300}}, r"weight is inf; it must be finite"),
    ({"systems": {"z": "no"}}, r"systems has 'z'; it must name terms: base"),
    ({"systems": "no"}, r"systems is 'no'; it must be a mapping"),
    ({"systems": {"x": 3}}, r"system is"),
    ({"guidance_scale": 1.5}, r"negative_prompt is None; with guidance_scale it must be"),
    ({"negative_prompt": "no"}, r"guidance_scale is None; with negative_prompt it must be"),
    ({"guidance_scale": math.nan, "negative_prompt": "no"}, r"guidance_scale is nan"),
    ({"lora": {"x": 1.0}}, r"lora has 'x'; it must name terms that are adapters: a, b"),
    ({"lora": {}}, r"lora is empty"),
    ({"lora": ["a"]}, r"lora is \['a'\]; it must be a mapping"),
    ({"lora": {"a": math.nan}}, r"lora\['a'\] is nan; it must be finite"),
    ({"lora": {"a": 1.0, "b": 1.0}}, r"'b', which is an adapter of another model than 'a'"),
    ({"lora": {"a": 1.0}, "blend": "base"}, r"blend and lora are both given"),
    ({"lora": {"a": 1.0}, "weights": {"w": 1.0}}, r"weights and lora are both given"),
    ({"search": 3}, r"search is"),
    ({"draft": "prompt"}, r"draft is a str; it must be a crossfade.Draft"),
    ({"draft": cf.Draft(texts=["a", "b"])}, r"draft.texts has 2 entries; it must have 1"),
    ({"seed": -1}, r"seed is -1; it must be within"),
    ({"seed": "7"}, r"seed is '7'|seed has"),
    ({"sample": -1}, r"sample is -1; it must be at least 0"),
    ({"sample": 1.0}, r"sample is 1.0; it must be an int"),
    ({"priority": 0.5}, r"priority is 0.5; it must be an int"),
    ({"timeout": 0}, r"timeout is 0; it must be above 0 seconds"),
    ({"timeout": math.nan}, r"timeout is nan; it must be finite"),
    ({"timeout": "1"}, r"timeout is '1'; it must be a number"),
    ({"scope": 3}, r"scope is 3; it must be a str"),
    ({"logit_bias": {99: 1.0}}, r"has token 99; ids must be within \[0, 61\)"),
    ({"logit_bias": {"a": 1.0}}, r"a token of logit_bias is 'a'; it must be an int"),
    ({"logit_bias": {7: math.nan}}, r"logit_bias\[7\] is nan; it must be finite"),
    ({"logit_bias": {7: 1.0}, "sequence_bias": {(7,): 2.0}}, r"logit_bias and sequence_bias"),
    ({"presence_penalty": "1"}, r"presence_penalty is '1'; it must be a number"),
    ({"frequency_penalty": math.inf}, r"frequency_penalty is inf; it must be finite"),
    ({"top_logprobs": 21}, r"top_logprobs is 21; it must be at most 20"),
    ({"max_new_tokens": 0}, r"max_new_tokens is 0; it must be at least 1"),
    ({"max_new_tokens": 97}, r"are 101 tokens together; they must be at most max_length, 100"),
    ({"temperature": -1.0, "do_sample": True}, r"temperature is -1"),
    ({"temperature": math.nan, "do_sample": True}, r"temperature is nan"),
    ({"top_p": 1.5, "do_sample": True}, r"top_p is 1.5"),
    ({"top_q": 1.5}, r"unknown argument 'top_q'"),
    ({"stop_strings": [""]}, r"stop_strings has ''"),
    ({"eos_token_id": [*range(17)]}, r"eos_token_id has 17 tokens; it must have at most 16"),
    ({"eos_token_id": 61}, r"eos_token_id has token 61"),
    ({"num_beams": 2}, r"num_beams"),
    *(
        ({name: given}, rf"{name} is of a whole call of generate, not of a request: ")
        for name, given in {
            "num_return_sequences": 2,
            "streamer": print,
            "stopping_criteria": [],
            "logits_processor": [],
            "prefix_allowed_tokens_fn": print,
            "kl_to": MODEL,
            "cache": None,
            "return_cache": True,
            "max_batch": 3,
            "progress": True,
            "engine": cf.Engine(),
            "tokenizer": None,
            "attention_mask": None,
            "return_dict_in_generate": False,
        }.items()
    ),
]


@pytest.mark.parametrize(("asked", "says"), OF_REQUESTS)
def test_requests(session: cf.Session, asked: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=says):
        session.submit(PROMPT, **{"max_new_tokens": 3} | asked)
    assert session.running == session.waiting == 0


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([PROMPT, PROMPT], r"inputs are 2 requests; they must be one"),
        (["a", "b"], r"inputs are 2 requests; they must be one"),
        ([], r"inputs"),
        (None, r"inputs"),
        (3, r"inputs"),
        ([99], r"99"),
        ([7] * 98, r"are 101 tokens together; they must be at most max_length, 100"),
        ([7] * 600, r"inputs cannot be decoded: .*512"),
    ],
)
def test_inputs(session: cf.Session, inputs: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        session.submit(inputs, max_new_tokens=3)


def test_a_search_of_too_many_rows(session: cf.Session) -> None:
    many = cf.BestOfN(5, cf.Reward(lambda prompts, texts: [0.0] * len(texts)))
    with pytest.raises(ValueError, match="search has 5 rows; it must have at most max_batch, 4"):
        session.submit(PROMPT, search=many, **SAMPLED)


def test_the_context_bounds_what_is_written() -> None:
    with cf.Session({"base": make()}) as session:
        request = session.submit([7] * 500, max_new_tokens=100, eos_token_id=None)
        assert len(request.result(30).responses[0]) == 13  # The last one is not read.
        assert request.reason == "length"
