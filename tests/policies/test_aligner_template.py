"""What an aligner reads, character by character and token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from crossfade.decoding.inputs import left_pad
from crossfade.decoding.writing import Writing
from crossfade.policies.metaaligner import AlignerTemplate
from crossfade.policies.metaaligner.template import encode_answer, encode_prompt, query_text
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import make_letters, make_tokenizer
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import normalizers

TWO = {"harmlessness": "do no harm", "plain_words": "use plain words"}


def test_the_texts_are_the_papers() -> None:
    context, query = AlignerTemplate(), AlignerTemplate("query")
    assert context.prompt("How was it?", "It was {long}.", TWO) == (
        "You are an assistant to human. You will be provided with a context and an answer. "
        "Consider the context, then edit the answer to improve it considering these aspects: "
        "Harmlessness: do no harm; Plain words: use plain words | Context: How was it? | Answer: "
        "It was {long}. | Edit: "
    )
    assert context.prompt("q", "y", {"brevity": "be short"}, "equal") == (
        "You are an assistant to human. You will be provided with a context and an answer. "
        "Consider the context, then edit the answer to make it equal considering these aspects: "
        "Brevity: be short | Context: q | Answer: y | Edit: "
    )
    assert query.prompt("q", "y", {"brevity": "be short"}) == (
        "You are an assistant to human. You will be provided with a query and an answer. "
        "Consider the query, then edit the answer to improve it considering these aspects: "
        "Brevity: be short | Query: q | Answer: y | Edit: "
    )
    assert query.prompt("q", "y", {"brevity": "be short"}, "equal") == (
        "You are an assistant to human. You will be provided with a query and an answer. "
        "Consider the query, then edit the answer to make it equal considering these aspects: "
        "Brevity: be short | Query: q | Answer: y | Edit: "
    )


def test_objectives_stand_in_their_order() -> None:
    turned = dict(reversed(TWO.items()))
    text = AlignerTemplate().prompt("q", "y", turned)
    assert "aspects: Plain words: use plain words; Harmlessness: do no harm | " in text


def test_objectives_of_the_registry_go_by_their_names() -> None:
    text = AlignerTemplate().prompt("q", "y", ["brevity", {"MT quality": "be fluent"}])
    assert "aspects: Brevity: The response should say what it has to say in few words; " in text
    assert "; MT quality: be fluent | " in text


texts = st.text(alphabet=st.characters(codec="utf-8"), min_size=1)


@given(texts, texts.filter(str.strip), texts.map(str.strip).filter(bool))
def test_what_is_given_stands_as_it_is(query: str, answer: str, aspect: str) -> None:
    text = AlignerTemplate().prompt(query, answer, {"own": aspect})
    end = (
        f" considering these aspects: Own: {aspect} | Context: {query} | Answer: {answer} | Edit: "
    )
    assert text.endswith(end)


def test_chats_are_written_in_turns() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "How was it?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": [{"type": "text", "text": "And the plot?"}]},
    ]
    assert query_text(chat) == "User: How was it?\nAssistant: Fine.\nUser: And the plot?"
    assert query_text(chat[:1]) == query_text("How was it?") == "How was it?"
    system = {"role": "system", "content": "Be kind."}
    assert query_text([system, chat[0]]) == "System: Be kind.\nUser: How was it?"
    assert query_text([chat[1]]) == "Assistant: Fine."
    text = AlignerTemplate().prompt(chat, "It was dull.", TWO)
    assert " | Context: User: How was it?\nAssistant: Fine.\nUser: And the plot? | Answer:" in text


words = st.lists(st.sampled_from(["the", "an", "hello", "is"]), min_size=1).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(suppress_health_check=[HealthCheck.filter_too_much])  # few know all characters
@given(st.one_of(texts.filter(str.strip), words))
def test_the_tokens_of_an_answer_read_as_the_answer(kind: str, answer: str) -> None:
    """Whatever a tokenizer does with the space that the prompt ends in, and in whichever prompt."""
    tokenizer = tokenizer_of(kind)
    after = encode_answer(tokenizer, answer)
    whole = f": {answer}"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    # only what it can write at all, in the middle of a text
    assume(tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == whole)
    for query in ("the film was", "x"):
        prompt = AlignerTemplate().prompt(query, "dull", TWO)
        before = encode_prompt(tokenizer, prompt)
        (back,) = Writing(tokenizer, _one(before, prompt)).texts([0], [after])
        assert back == answer


def _one(ids: list[int], prompt: str) -> Any:
    return replace(left_pad([ids]), items=[prompt])


@pytest.mark.parametrize(
    ("kind", "space", "first"),
    [
        ("bytes", "Ġ", "The"),
        ("bytes-prefix-space", "Ġ", "The"),
        ("sentencepiece-always", "▁", "The"),
        ("sentencepiece-first", "▁", "The"),
        ("unigram", "▁", "T"),
        ("wordpiece", ":", "The"),  # it leaves the space out
    ],
)
def test_the_space_before_the_answer_is_the_prompts(kind: str, space: str, first: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = AlignerTemplate().prompt("q", "dull", TWO)
    before, after = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, "The answer")
    assert tokenizer.convert_ids_to_tokens([before[-1], after[0]]) == [space, first]
    joint = tokenizer(f"{prompt}The answer")["input_ids"]
    assert ([*before, *after] == joint) == (kind in ("unigram", "wordpiece"))


def test_a_tokenizer_that_strips_texts_puts_the_space_into_the_answer() -> None:
    tokenizer = KINDS["unigram"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    prompt = AlignerTemplate().prompt("q", "dull", TWO)
    before, after = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, "The answer")
    assert tokenizer.convert_ids_to_tokens(before)[-1] == ":"
    assert tokenizer.convert_ids_to_tokens(after)[0].startswith("▁")
    assert Writing(tokenizer, _one(before, prompt)).texts([0], [after]) == ["The answer"]


def test_prompts_are_read_as_generate_reads_texts() -> None:
    tokenizer = tokenizer_of("sentencepiece-first")
    ids = encode_prompt(tokenizer, "the answer")
    assert ids[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, "<s>the answer")[:2] != [tokenizer.bos_token_id] * 2
    # no chat template is wrapped around it
    chats = make_tokenizer()
    assert encode_prompt(chats, "the film") == chats("the film", add_special_tokens=False).input_ids


def test_eos_follows_a_finished_answer_alone() -> None:
    tokenizer = make_letters()
    eos = tokenizer.eos_token_id
    assert encode_answer(tokenizer, "abc", finished=True) == [*encode_answer(tokenizer, "abc"), eos]
    assert eos not in encode_answer(tokenizer, "abc")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no EOS, which follows a finished answer"):
        encode_answer(tokenizer, "abc", finished=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q", "y", TWO, "best"), "goal is 'best'; it must be 'better' or 'equal'"),
        (("q", 3, TWO), "answer is 3; it must be a text"),
        (("q", " \n", TWO), r"answer is ' \\n'; it must not be empty"),
        (("q", "\ud83d", TWO), "half of a surrogate pair"),
        ((3, "y", TWO), "query is 3; it must be a text or a chat"),
        (([1, 2], "y", TWO), "query is token ids; it must be a text or a chat"),
        (([], "y", TWO), "query is empty; it must be a text or a chat"),
        (([{"role": "user"}], "y", TWO), "query, message 0, has the keys"),
        (("q", "y", {}), "objectives is empty; it must have one objective at least"),
        (("q", "y", ["brevty"]), "did you mean 'brevity'"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AlignerTemplate().prompt(*arguments)


@pytest.mark.parametrize(
    ("noun", "message"),
    [
        (3, "noun is 3; it must be a text"),
        ("", "noun is ''; it must be a word without white space"),
        ("query ", "noun is 'query '; it must be a word without white space"),
    ],
)
def test_wrong_nouns_are_named(noun: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AlignerTemplate(noun)
    with pytest.raises(TypeError, match="did you mean 'noun'"):
        AlignerTemplate(nuon="x")  # type: ignore[call-arg]
