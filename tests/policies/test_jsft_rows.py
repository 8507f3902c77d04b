"""Rows of judge-augmented fine-tuning, without the faults of the official code."""

from __future__ import annotations

import copy
from typing import Any

import crossfade as cf
import pytest
from crossfade.policies.self_judge import jsft_rows
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import TEMPLATE
from tiny_models import EOS, make, make_tokenizer

TOKENIZER = make_tokenizer()
PAIR = {"prompt": "the film was", "chosen": "great", "rejected": "awful dull"}


def rows(pairs: Any, **options: Any) -> Any:
    return jsft_rows(pairs, TOKENIZER, TEMPLATE, **options)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def judgments(found: Any) -> list[dict[str, Any]]:
    return [row for row in found if row["judge"]]


def test_a_pair_gives_a_judgment_in_both_orders() -> None:
    found = rows([PAIR])
    judge = cf.Judge(make(), TOKENIZER, template=TEMPLATE)
    one, other, answer = found
    assert one == {
        "prompt_ids": ids(judge.prompt("the film was", "great", "awful dull")),
        "completion_ids": ids("great"),  # the label, and no EOS
        "judge": True,
    }
    assert other == {
        "prompt_ids": ids(judge.prompt("the film was", "awful dull", "great")),
        "completion_ids": ids("awful"),
        "judge": True,
    }
    assert answer == {
        "prompt_ids": ids("the film was"),
        "completion_ids": [*ids("great"), EOS],
        "judge": False,
    }
    assert len(judgments(found)) == 2
    assert found.left_out == {"empty": 0, "same": 0}


def test_principles_and_rationales() -> None:
    pairs = [
        {**PAIR, "principle": "plot"},
        {**PAIR, "principle": None, "rationale": "the {chosen} plot , {rejected} cast"},
    ]
    one, _, plain, turned = judgments(rows(pairs))
    judge = cf.Judge(make(), TOKENIZER, template=TEMPLATE, principles=["plot"])
    assert one["prompt_ids"] == ids(judge.prompt("the film was", "great", "awful dull", "plot"))
    assert plain["completion_ids"] == [*ids("great . the great plot , awful cast"), EOS]
    assert turned["completion_ids"] == [*ids("awful . the awful plot , great cast"), EOS]
    own = rows([{**PAIR, "principle": "mine"}], principles={"mine": "bright"})
    text = TOKENIZER.decode(own[0]["prompt_ids"])
    assert "the bright film" in text


def test_responses_that_were_cut_have_no_eos() -> None:
    """The official code puts EOS at the end of all, so that a model learns to stop in a word."""
    cut = {**PAIR, "chosen_finished": False}
    assert rows([cut])[-1]["completion_ids"] == ids("great")
    sft = [{"prompt": "the", "completion": "plot", "finished": False}]
    assert rows([], sft=sft)[-1]["completion_ids"] == ids("plot")


def test_ids_are_what_they_were() -> None:
    """The official code decodes what was sampled and encodes it anew."""
    sampled = {"prompt_ids": [9, 5], "chosen_ids": [40, 41, 42], "rejected_ids": [43]}
    found = rows([{**PAIR, **sampled}])
    assert found[-1] == {"prompt_ids": [9, 5], "completion_ids": [40, 41, 42], "judge": False}


def test_long_prompts_are_whole() -> None:
    """The official code cuts from the left, where the instruction stands."""
    long = {**PAIR, "chosen": "w1 " * 3000}
    one, other = judgments(rows([long]))
    for row in (one, other):
        text = TOKENIZER.decode(row["prompt_ids"])
        assert text.count("w1") == 3000
        assert "very bright" in text[:100]


def test_no_row_is_dropped_silently() -> None:
    pairs = [PAIR, {**PAIR, "chosen": " "}, {**PAIR, "rejected": "great "}]
    found = rows(pairs)
    assert found.left_out == {"empty": 2, "same": 2}
    assert found.summary() == (
        "2 of 6 responses are in 4 rows; of the others, 2 are empty, or their partner is, 2 are "
        "the same text as their partner"
    )


def test_chats_are_read_as_the_model_reads_them() -> None:
    chat = [{"role": "user", "content": "the film"}]
    messages = {k: [{"role": "assistant", "content": PAIR[k]}] for k in ("chosen", "rejected")}
    found = rows([{"prompt": chat, **messages}])
    text = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found[-1] == {"prompt_ids": text, "completion_ids": [*ids("great"), EOS], "judge": False}
    assert ["User:", "the", "film"][1] in TOKENIZER.decode(found[0]["prompt_ids"])


def test_each_answer_is_learnt_once() -> None:
    pairs = [{**PAIR, "principle": p} for p in ("plot", "cast", None)]
    assert [row["judge"] for row in rows(pairs)] == [True] * 6 + [False]
    assert [row["judge"] for row in rows(pairs, sft=None)] == [True] * 6


words = st.lists(st.sampled_from(["the", "film", "plot", "w1", "w2"]), min_size=1, max_size=5)
texts = words.map(" ".join)


@given(st.lists(st.tuples(texts, texts, texts), max_size=4))
def test_labels_are_balanced_and_nothing_of_the_callers_changes(given: Any) -> None:
    """The official code shuffles the caller's list in place."""
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in given]
    before = copy.deepcopy(pairs)
    found = rows(pairs)
    assert pairs == before
    labels = [row["completion_ids"] for row in judgments(found)]
    assert labels.count(ids("great")) == labels.count(ids("awful")) == len(labels) / 2
    assert found == rows(pairs)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (3, {}, "row 0 of pairs is a int; it must be a mapping"),
        ({"prompt": "the", "chosen": "a"}, {}, "row 0 of pairs has no rejected"),
        ({"prompt": "the", "chosen": "a", "rejcted": "b"}, {}, "did you mean 'rejected'"),
        ({**PAIR, "chosen": 3}, {}, "chosen of row 0 of pairs is 3; it must be a text"),
        ({**PAIR, "prompt": []}, {}, "prompt of row 0 of pairs is empty"),
        ({**PAIR, "principle": ["plot"]}, {}, r"is \['plot'\]; it must be among plot, cast"),
        ({**PAIR}, {"principles": []}, "principles is empty; it must have one at least"),
        ({**PAIR, "principle": "polt"}, {}, "must be among plot, cast, dull, or None: .* 'plot'"),
        ({**PAIR, "rationale": 3}, {}, "rationale of row 0 of pairs is 3"),
        ({**PAIR, "chosen_ids": [3]}, {}, "row 0 of pairs has no prompt_ids"),
        ({**PAIR, "chosen_finished": "no"}, {}, "chosen_finished of row 0 of pairs is 'no'"),
        (PAIR, {"sft": "rejected"}, "sft is 'rejected'; it must be 'chosen', None, or a list"),
        (PAIR, {"sft": [{"prompt": "the"}]}, "row 0 of sft has no completion"),
        (PAIR, {"sft": [4]}, "row 0 of sft is a int; it must be a mapping"),
    ],
)
def test_wrong_rows_are_named(row: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rows([row], **options)
