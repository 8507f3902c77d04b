"""Pairs of the best rated response and one that is strictly worse."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade.training import rated_pairs, rollouts
from tiny_models import EOS, make, make_tokenizer


def response(text: str, *ratings: float, **more: Any) -> dict[str, Any]:
    return {"text": text, "ratings": dict(zip(("help", "truth"), ratings, strict=True)), **more}


def row(*responses: dict[str, Any], prompt: Any = "How was it?") -> dict[str, Any]:
    return {"prompt": prompt, "responses": list(responses)}


MANY = [row(*(response(f"{k}", k, 1) for k in range(9))) for _ in range(40)]


def test_the_best_mean_is_chosen_and_ties_go_to_the_longer() -> None:
    tied = row(response("one", 0.1, 0.2), response("longer", 0.2, 0.1), response("x", 0.1, 0.1))
    (pair,) = rated_pairs([tied])
    assert (pair["chosen"], pair["rejected"]) == ("longer", "x")
    assert pair["chosen_reward"] == pytest.approx(0.15)
    assert pair["rejected_reward"] == 0.1
    (pair,) = rated_pairs([tied], ["help"])
    assert (pair["chosen"], pair["chosen_reward"]) == ("longer", 0.2)
    (pair,) = rated_pairs([tied], "truth")
    assert pair["chosen"] == "one"


def test_of_equally_long_ones_the_first_is_chosen() -> None:
    (pair,) = rated_pairs([row(response("b", 2, 2), response("a", 2, 2), response("c", 1, 1))])
    assert pair["chosen"] == "b"


def test_length_is_of_tokens_where_there_are_ids() -> None:
    both = [("a long text", [5, 6]), ("short", [7, 8, 9]), ("bad", [4])]
    rows = [
        row(*(response(text, 3 - len(text) % 2, 1, ids=ids, finished=True) for text, ids in both))
        | {"prompt_ids": [3]}
    ]
    for r in rows[0]["responses"][:2]:
        r["ratings"]["help"] = 5
    rows[0]["responses"][2]["ratings"]["help"] = 1
    (pair,) = rated_pairs(rows)
    assert (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) == ([3], [7, 8, 9], [4])


def test_rejected_ones_are_drawn_by_the_seed_and_the_rows_place_alone() -> None:
    drawn = [pair["rejected"] for pair in rated_pairs(MANY)]
    assert all(pair["chosen"] == "8" for pair in rated_pairs(MANY))
    assert len(set(drawn)) == 8
    others = copy.deepcopy(MANY)
    others[3] = row(response("a", 1, 1))  # gives no pair
    assert [pair["rejected"] for pair in rated_pairs(others)] == drawn[:3] + drawn[4:]
    assert [pair["rejected"] for pair in rated_pairs(MANY, seed=1)] != drawn
    assert drawn[:6] == ["2", "1", "1", "5", "5", "3"]  # whatever the version of Python


def test_the_callers_rows_are_not_changed() -> None:
    rows = [*MANY, row(response("a", 1, 1, finished=False), response("b", 2, 2), prompt=[])]
    before = copy.deepcopy(rows)
    pairs = rated_pairs(rows)
    for pair in pairs:
        pair.clear()
    assert rows == before


def test_prompts_without_a_worse_response_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row(response("a", 1, 2), response("b", 2, 1)),
        row(response("a", 1, 1)),
        row(),
        row(response("a", 1, 1), response("b", 2, 2), response("c", 1, 1)),
    ]
    with caplog.at_level(logging.WARNING):
        pairs = rated_pairs(rows)
    assert len(pairs) == 1
    assert (pairs.responses, pairs.left_out) == (6, {"failed": 0, "equal": 3, "spare": 1})
    assert caplog.messages == [
        "rated pairs: 2 of 6 responses are in 1 rows; of the others, 3 are of prompts that have no "
        "response rated worse than the best, 1 have no partner, or their prompt has its pairs"
    ]


def test_rollouts_keep_their_ids_and_what_was_cut(tmp_path: Path) -> None:
    """A response that a limit cut has no EOS, and the row says that it was cut."""
    model = cf.Model(make(), tokenizer=make_tokenizer())
    lengths: Any = {"length": lambda prompts, texts: [len(x) for x in texts]}
    chats = [[{"role": "user", "content": f"the film was w{i}"}] for i in range(12)]
    rows = rollouts(model, chats, lengths, tmp_path / "a.jsonl", n=4, max_new_tokens=6)
    pairs = rated_pairs(rows)
    by_ids = {tuple(r["ids"]): r for x in rows for r in x["responses"]}
    seen = set()
    for pair in pairs:
        assert pair["chosen_reward"] > pair["rejected_reward"]
        for side in ("chosen", "rejected"):
            ids, finished = pair[f"{side}_ids"], pair[f"{side}_finished"]
            seen.add(finished)
            assert finished == (ids[-1] == EOS) == by_ids[tuple(ids)]["finished"]
            assert pair[side] == [{"role": "assistant", "content": by_ids[tuple(ids)]["text"]}]
    assert seen == {True, False}


def test_responses_without_tokens_are_left_out() -> None:
    failed = response("", 9, 9, ids=[], finished=False)
    good, bad = (response("a", n, n, ids=[5], finished=True) for n in (3, 1))
    pairs = rated_pairs([row(failed, good, bad) | {"prompt_ids": [3]}])
    assert (pairs[0]["chosen_reward"], pairs.left_out["failed"]) == (3, 1)


@pytest.mark.parametrize(
    ("rows", "given", "error", "message"),
    [
        ([3], {}, TypeError, "row 0 of rows is 3; it must be a mapping"),
        ([{"prompt": "a"}], {}, TypeError, "responses of row 0 of rows is missing; it must be a l"),
        ([row({"text": "a"})], {}, TypeError, r"ratings of responses\[0\] of row 0 of rows is mi"),
        (
            [row({"text": "a", "score": 1})],
            {},
            TypeError,
            r"""missing; .* as {"text": "...", "ratings": {"helpful": 4}}; did you mean """
            r""""ratings": {'score': 1}\?""",
        ),
        (
            [row({"text": "a", "scores": {"kind": 2}})],
            {},
            TypeError,
            r"""did you mean "ratings": {'kind': 2}\?""",
        ),
        (
            [{"prompt": "a", "responses": ["a", "b"]}],
            {},
            TypeError,
            r"""responses\[0\] of row 0 of rows is 'a'; it must be a mapping, as {"text": "...""",
        ),
        (["a"], {}, TypeError, r"""row 0 of rows is 'a'; .* or {"prompt": "...", "responses": """),
        (
            [row({"text": "a", "ratings": {}})],
            {},
            ValueError,
            r"ratings of responses\[0\] of row 0 of rows is empty; it must have one at least",
        ),
        (
            MANY,
            {"ratings": "hepl"},
            ValueError,
            r"has no rating 'hepl'; it has \['help', 'truth'\]",
        ),
        (
            [row(response("a", 1, 2), {"text": "b", "ratings": {"help": 1, "truth": 1, "x": 3}})],
            {},
            ValueError,
            r"has the ratings \['help', 'truth', 'x'\]; it must have \['help', 'truth'\]",
        ),
        (
            [row({"text": "a", "ratings": {"help": "N/A"}})],
            {},
            TypeError,
            r"rating 'help' of responses\[0\] of row 0 of rows is 'N/A'; it must be a number",
        ),
        (MANY, {"ratings": []}, ValueError, "ratings is empty"),
        (MANY, {"seed": "a"}, TypeError, "seed is 'a'; it must be an int"),
        (
            [row(response("a", 1, 2)) | {"prompt_ids": [3]}],
            {},
            TypeError,
            r"ids of responses\[0\] of row 0 of rows is missing; it must be a list",
        ),
    ],
)
def test_mistakes(rows: Any, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rated_pairs(rows, **given)
