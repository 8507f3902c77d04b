"""Names that other interfaces have are answered with ours, which are there."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import crossfade as cf
import pytest
from crossfade import elsewhere
from crossfade.bulk.decode import decode
from crossfade.decoding.settings import SUPPORTED, UNSUPPORTED_ARGUMENTS
from tiny_models import make, make_tokenizer
from transformers import PreTrainedModel

OURS = {*signature(cf.generate).parameters, *SUPPORTED}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return make("llama")


def test_no_argument_of_ours_is_answered_as_unknown() -> None:
    known = {
        "GENERATE": OURS,
        "SCORE": {*signature(cf.score).parameters},
        "TERM": {*signature(cf.Model).parameters},
        "SEARCH": {*signature(cf.ChunkBeamSearch).parameters},
        "TOURNAMENT": {*signature(cf.Tournament).parameters},
        "ENGINE": {*signature(cf.Engine).parameters},
        "DRAFT": {*signature(cf.Draft).parameters},
        "SUPPORT": {*signature(cf.Support).parameters},
    }
    for table, names in known.items():
        assert not getattr(elsewhere, table).keys() & names, table


def test_what_is_said_names_arguments_that_there_are() -> None:
    """Each word with an underscore is an argument of `generate`, or else one of these."""
    others = {"token_id", "do_sample", "enable_thinking", "from_pretrained"}
    for name, says in elsewhere.GENERATE.items():
        words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", says))
        assert words <= OURS | others | {"custom_generate"}, name


@pytest.mark.parametrize("name", sorted(elsewhere.GENERATE))
def test_generate_says_what_was_meant(name: str, base: PreTrainedModel) -> None:
    kind = NotImplementedError if name in UNSUPPORTED_ARGUMENTS else TypeError
    if name in ("num_beams", "guidance_scale", "prompt_lookup_num_tokens", "num_assistant_tokens"):
        kind = NotImplementedError  # They are fields of GenerationConfig.
    with pytest.raises(kind, match=re.escape(f"; {elsewhere.GENERATE[name]}")):
        cf.generate(base, [5, 6], max_new_tokens=2, **{name: 3})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("max_length_", "max_length"),
        ("top-k", "top_k"),
        ("seeds", "seed"),
        ("tokeniser", "tokenizer"),
        ("return_termlogprobs", "return_term_logprobs"),
        ("Temperature", "temperature"),
    ],
)
def test_typing_errors(name: str, meant: str, base: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=f"unknown argument '{name}'; did you mean '{meant}'"):
        cf.generate(base, [5, 6], **{name: 3})
    with pytest.raises(TypeError, match=f"unknown argument '{name}'; did you mean '{meant}'"):
        list(decode(base, [[5, 6]], **{name: 3}))


def test_inputs_by_another_name_say_so(base: PreTrainedModel) -> None:
    for name in ("input_ids", "prompt", "messages"):
        with pytest.raises(TypeError, match=f"argument '{name}'; .*the second argument"):
            cf.generate(base, **{name: [5, 6]})


CALLS: list[tuple[Any, dict[str, Any], str]] = [
    (cf.score, {"temperature": 1.0}, "log-probs at temperature 1"),
    (cf.score, {"tokeniser": None}, "did you mean 'tokenizer'"),
    (cf.Model, {"system_prompt": "x"}, "here it is system"),
    (cf.ValueHead, {"tok": None}, "here it is tokenizer"),
    (cf.Engine, {"cudagraph": True}, "did you mean 'cuda_graph'"),
    (cf.ChunkBeamSearch, {"beam_width": 4}, "here it is width"),
    (cf.BestOfN, {"reward": len}, "here it is value"),
    (cf.Draft, {"model": make()}, "here it is source"),
    (cf.Draft, {"num_speculative_tokens": 4}, "here it is length"),
    (cf.Draft, {"lenght": 4}, "did you mean 'length'"),
    (cf.Support, {"topk": 4}, "did you mean 'top_k'"),
    (cf.LogRatio, {"weight": 4}, "multiplied by its weight"),
    (cf.Reward, {"function": len}, "here it is fn"),
    (cf.presets.eft, {"betta": 1.0}, "did you mean 'beta'"),
    (cf.power_mean, {"wieghts": []}, "did you mean 'weights'"),
]


@pytest.mark.parametrize(("f", "arguments", "says"), CALLS)
def test_others_say_what_was_meant(f: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=f"unknown argument '{next(iter(arguments))}'; .*{says}"):
        f(**arguments)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_id": [5]}, "did you mean 'input_ids'"),
        ({"prompt": "the film"}, "pass the text itself"),
        ({"messages": []}, "pass the list of messages itself"),
        ({"role": "user", "content": "the"}, r"pass a list: \[message\]"),
        ({"input_ids": [[5]], "attention_masks": [[1]]}, "did you mean 'attention_mask'"),
        ([{"role": "user", "text": "the"}], "must have 'content'; what is said is 'content'"),
        ([{"role": "user", "contents": "the"}], "must have 'content'; did you mean 'content'"),
        ([{"from": "user", "content": "the"}], "must have 'role'; who speaks is 'role'"),
        ([{"prompt": "the film"}], "must have 'role'; pass the text itself"),
        ([{"role": "User", "content": "the"}], "role 'User', .*did you mean 'user'"),
        ([{"role": "human", "content": "the"}], "role 'human', .*who asks is 'user'"),
        ([["the film"], ["a plot"]], "texts stand in one list"),
        ([("user", "the film")], "a message is {'role'"),
    ],
)
def test_keys_of_inputs(inputs: Any, says: str, base: PreTrainedModel) -> None:
    kinds = (TypeError, ValueError, NotImplementedError)
    with pytest.raises(kinds, match=says):
        cf.generate(base, inputs, tokenizer=make_tokenizer(), max_new_tokens=2)


def test_a_role_of_the_templates_own_is_taken(base: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if 'human' %}{% endif %}" + tokenizer.chat_template
    for role in ("human", "narrator"):
        chat = [{"role": role, "content": "the"}]
        assert cf.generate(base, chat, tokenizer=tokenizer, max_new_tokens=2).text


def test_names_of_guides_backends_adapters() -> None:
    with pytest.raises(ValueError, match="did you mean 'sentiment'"):
        cf.models.guide("sentment")
    with pytest.raises(ValueError, match="did you mean 'reverse_kl'"):
        cf.presets.mod([], [], divergence="reverse-kl")
