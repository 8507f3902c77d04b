"""What a judge reads, character by character, and the errors of templates."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
from crossfade.policies.self_judge import TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_letters, make_tokenizer
from tokenizer_kinds import KINDS, tokenizer_of

CHAT = [
    {"role": "user", "content": "How was it?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": [{"type": "text", "text": "And the plot?"}]},
]


def test_the_prompt_of_hh_is_the_papers() -> None:
    assert TEMPLATES["hh"].chat(CHAT, "Great.", "Bad.") == [
        {
            "role": "system",
            "content": "You are a judge who compares two answers and says which one is better.",
        },
        {
            "role": "user",
            "content": "Which is the more helpful, harmless, and honest assistant from a given "
            "context?\nContext:\n-----\nUser: How was it?\nAssistant: Fine.\nUser: And the plot?"
            "\n-----\nAssistant A: Great.\nAssistant B: Bad.\nPlease choose either A or B.",
        },
        {
            "role": "assistant",
            "content": "Sure! The option which is more helpful, harmless, and honest would be "
            "Assistant",
        },
    ]


def test_the_prompt_of_ultrafeedback() -> None:
    template = TEMPLATES["ultrafeedback"]
    _, user, own = template.chat("How?", "x", "y", template.principles["honesty"])
    assert user["content"] == (
        "Which is the more honest response to a given context?\nContext:\n-----\nUser: How?\n-----"
        "\nResponse A: x\nResponse B: y\nPlease choose either A or B."
    )
    assert own["content"] == "Sure! The option which is more honest would be Response"


answers = st.text(alphabet=st.characters(codec="utf-8"), min_size=1)


@given(answers, answers, answers)
def test_answers_with_braces_and_lines_stand_as_they_are(context: str, a: str, b: str) -> None:
    _, user, _ = TEMPLATES["hh"].chat(context, a, b)
    end = f"Assistant A: {a.strip()}\nAssistant B: {b.strip()}\nPlease choose either A or B."
    assert user["content"].endswith(f"User: {context}\n-----\n{end}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": "AB"}, "labels is 'AB'; it must be two texts"),
        ({"labels": ("A",)}, "it must be two texts"),
        ({"labels": ("A", "A")}, "the two must differ"),
        ({"labels": (" A", "B")}, "labels has ' A'; it must be without white space"),
        ({"labels": ("A", 3)}, "labels is 3; it must be a text"),
        ({"question": "Which is {better}?"}, r"in braces it may have \{principle\} alone"),
        ({"question": "Which is {}?"}, r"in braces it may have \{principle\} alone"),
        ({"prefix": "It is {principle"}, r"in braces it may have \{principle\} alone"),
        ({"prefix": "It is "}, "prefix is 'It is ', which ends in white space"),
        ({"prefix": ""}, "prefix is ''; it must not be empty"),
        ({"rationale": "why"}, r"it must have \{rationale\}"),
        ({"noun": 3}, "noun is 3; it must be a text"),
        ({"system": ""}, "system is ''; it must not be empty"),
        ({"principles": ["a"]}, "principles is a list; it must be a mapping"),
        ({"principles": {"a": ""}}, r"principles\['a'\] is ''; it must not be empty"),
        ({"nuon": "x"}, "did you mean 'noun'"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cf.JudgeTemplate(**fields)


def test_labels_that_are_no_single_token_are_named() -> None:
    tokenizer = make_tokenizer()
    prompt = "the film was"
    ids = cf.JudgeTemplate(labels=("great", "awful")).label_ids(tokenizer, prompt)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["great", "awful"]
    with pytest.raises(
        ValueError,
        match=r"labels has 'the plot', which is the tokens \['the', 'p.*as the letters A and B ",
    ):
        cf.JudgeTemplate(labels=("the plot", "awful")).label_ids(tokenizer, prompt)
    with pytest.raises(ValueError, match="the same token for this tokenizer: '<unk>'"):
        cf.JudgeTemplate().label_ids(tokenizer, prompt)
    # these letters join into one token with what stands before them
    letters = make_letters()
    with pytest.raises(ValueError, match=r"which is the tokens \[.* after 'a'; it must be one"):
        cf.JudgeTemplate(labels=("n", "z"), prefix="a").label_ids(letters, "a")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_have_their_space_in_every_kind_of_tokenizer(kind: str) -> None:
    """The token is the one that a text has which goes on, not that of a label alone."""
    tokenizer = tokenizer_of(kind)
    template = cf.JudgeTemplate(labels=("the", "a"), prefix="yes")
    found = template.label_ids(tokenizer, "the answer is yes")
    before = tokenizer("the answer is yes", add_special_tokens=False)["input_ids"]
    for label, i in zip(template.labels, found, strict=True):
        whole = f"the answer is yes {label}"
        assert tokenizer(whole, add_special_tokens=False)["input_ids"] == [*before, i]


def test_a_template_is_read_once_and_kept() -> None:
    phrases = {"kind": "kind"}
    template = cf.JudgeTemplate(principles=phrases)
    phrases["kind"] = "cruel"
    assert template.phrases("kind") == {"kind": "kind"}
    assert template.phrases({"own": "quick"}) == {"own": "quick"}
    assert template.phrases() == {None: "helpful, harmless, and honest"}
