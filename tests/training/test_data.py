"""Rollouts can be resumed and do not depend on batches, and rows are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.training import data
from tiny_models import EOS, make, make_tokenizer

CHATS = [[{"role": "user", "content": f"the film was {w}"}] for w in ("great", "dull", "bright")]
NEW = 6


@pytest.fixture(scope="module")
def base() -> cf.Model:
    return cf.Model(make(), tokenizer=make_tokenizer(), name="base")


def words(prompts: list[Any], responses: list[str]) -> list[float]:
    assert len(prompts) == len(responses)
    return [float(len(text.split())) for text in responses]


def first(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(p if isinstance(p, str) else p[0]["content"])) for p in prompts]


def sample(base: Any, path: Path, prompts: list[Any] = CHATS, **options: Any) -> Any:
    options = {"n": 4, "seed": 3, "max_new_tokens": NEW, **options}
    return data.rollouts(base, prompts, {"words": words, "first": first}, path, **options)


def test_rows_hold_what_was_sampled_and_scored(base: cf.Model, tmp_path: Path) -> None:
    rows = sample(base, tmp_path / "a.jsonl")
    assert [row["prompt"] for row in rows] == CHATS
    tokenizer = base.tokenizer
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == ids
        assert len(row["responses"]) == 4
        assert len({tuple(r["ids"]) for r in row["responses"]}) > 1
        for r in row["responses"]:
            assert r["finished"] == (r["ids"][-1] == EOS)
            assert r["finished"] or len(r["ids"]) == NEW
            assert r["text"] == tokenizer.decode(r["ids"], skip_special_tokens=True)
            assert r["rewards"] == {
                "words": float(len(r["text"].split())),
                "first": float(len(row["prompt"][0]["content"])),
            }
        # `score` and the model itself give the sampled ids the same log-prob
        response = row["responses"][0]["ids"]
        with torch.no_grad():
            z = base.model(torch.tensor([ids + response])).logits[0].log_softmax(-1)
        logp = sum(float(z[len(ids) - 1 + t, i]) for t, i in enumerate(response))
        scored = cf.score(base, [row["prompt"]], [response])
        assert float(scored.totals[0]) == pytest.approx(logp, abs=1e-4)


def test_a_prompts_responses_depend_on_its_place_and_the_seed_alone(
    base: cf.Model, tmp_path: Path
) -> None:
    def ids(name: str, *args: Any, **options: Any) -> list[Any]:
        rows = sample(base, tmp_path / name, *args, **options)
        return [[r["ids"] for r in row["responses"]] for row in rows]

    whole = ids("whole.jsonl")
    assert ids("again.jsonl") == whole
    assert ids("small.jsonl", batch_size=1) == whole
    assert ids("fewer.jsonl", CHATS[:2]) == whole[:2]
    assert ids("other.jsonl", seed=4) != whole


def test_a_cut_file_is_gone_on_with(base: cf.Model, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sample(base, path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    # Lines have another order, and the last one is cut.
    path.write_bytes(lines[1] + lines[2][:40])
    rows = sample(base, path)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert path.read_bytes().startswith(lines[1])


def test_a_whole_file_costs_nothing(
    base: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(base, tmp_path / "a.jsonl")
    monkeypatch.setattr(Group, "step", None)
    assert sample(base, tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("change", [{"seed": 9}, {"n": 2}, {"temperature": 0.5}])
def test_a_file_of_other_settings_is_refused(
    base: cf.Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    sample(base, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="line 1: comes from other prompts, another blend"):
        sample(base, tmp_path / "a.jsonl", **change)


def test_a_file_of_another_model_is_refused(base: cf.Model, tmp_path: Path) -> None:
    """The other model has the same name, but other weights."""
    sample(base, tmp_path / "a.jsonl")
    other = cf.Model(make(seed=1), tokenizer=make_tokenizer(), name="base")
    with pytest.raises(ValueError, match="line 1: comes from other prompts, another blend"):
        sample(other, tmp_path / "a.jsonl")
    same = cf.Model(make(), tokenizer=make_tokenizer(), name="base")
    assert len(sample(same, tmp_path / "a.jsonl")) == len(CHATS)


@pytest.mark.parametrize(
    ("key", "instead"), [("num_return_sequences", "n"), ("max_batch", "batch_size")]
)
def test_arguments_that_have_other_names(
    base: cf.Model, tmp_path: Path, key: str, instead: str
) -> None:
    with pytest.raises(ValueError, match=f"{key} is given; it must be {instead}"):
        sample(base, tmp_path / "a.jsonl", **{key: 2})


def test_line_breaks_that_json_leaves_alone_do_not_end_a_row(
    base: cf.Model, tmp_path: Path
) -> None:
    prompt = "the\u2028film\u0085was\u2029great"
    rows = sample(base, tmp_path / "a.jsonl", [[{"role": "user", "content": prompt}]])
    assert rows[0]["prompt"][0]["content"] == prompt
    assert sample(base, tmp_path / "a.jsonl", [[{"role": "user", "content": prompt}]]) == rows


def test_an_interrupt_keeps_what_was_scored_before_it(
    base: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "a.jsonl", []
    whole = sample(base, tmp_path / "whole.jsonl")

    def scored(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append(len(responses))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return words(prompts, responses)

    rewards = {"words": scored, "first": first}
    options: dict[str, Any] = {"n": 4, "seed": 3, "batch_size": 4, "max_new_tokens": NEW}
    with pytest.raises(KeyboardInterrupt):
        data.rollouts(base, CHATS, rewards, path, **options)
    assert len(data.read_jsonl(path)) == 1
    assert data.rollouts(base, CHATS, rewards, path, **options) == whole
    assert calls == [4, 4, 4, 4]  # the call before the interrupt was lost


def row(rewards: list[float], finished: list[bool] | None = None) -> dict[str, Any]:
    """A row of a prompt. The ids of its responses are their rewards."""
    return {
        "index": 0,
        "prompt": "p",
        "prompt_ids": [7],
        "responses": [
            {"text": f"t{r}", "ids": [int(r)], "finished": f, "rewards": {"gold": r, "half": r / 2}}
            for r, f in zip(rewards, finished or [True] * len(rewards), strict=True)
        ],
    }


def test_pairs_are_the_best_with_the_worst() -> None:
    found = data.pairs([row([3, 1, 5, 2, 4])], "gold", per_prompt=9)
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in found] == [([5], [1]), ([4], [2])]
    assert found[0] == {
        "prompt": "p",
        "chosen": "t5",
        "rejected": "t1",
        "prompt_ids": [7],
        "chosen_ids": [5],
        "rejected_ids": [1],
        "chosen_reward": 5,
        "rejected_reward": 1,
    }
    assert len(data.pairs([row([3, 1, 5, 2, 4])], "gold")) == 1
    assert len(data.pairs([row([3, 1, 5, 2, 4])], "gold", per_prompt=9, margin=2)) == 1
    assert len(data.pairs([row([3, 1, 5, 2, 4])], "half", per_prompt=9, margin=2)) == 0


def test_pairs_leave_out_ties_and_cut_responses() -> None:
    assert data.pairs([row([2, 2, 2])], "gold") == []
    assert data.pairs([row([2])], "gold") == []
    found = data.pairs([row([9, 1, 2], [False, True, True])], "gold")
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in found] == [([2], [1])]


def test_pairs_say_what_became_of_each_response(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row([9, 8, 1, 2, 5], [True, False, True, True, True]),  # 9-1 a pair, 5-2 spare, 8 cut
        row([2, 2, 2]),  # two are tied, and the third has no partner
        row([1, 1.5]),
        row([4]),
    ]
    rows[3]["responses"][0]["ids"] = []
    found = data.pairs(rows, "gold", margin=1)
    assert len(found) == 1
    assert found.responses == 11
    assert found.left_out == {"failed": 1, "cut": 1, "tied": 2, "close": 2, "spare": 3}
    assert 2 * len(found) + sum(found.left_out.values()) == found.responses
    assert caplog.messages == [f"pairs by gold: {found.summary()}"]
    assert found.summary().startswith("2 of 11 responses are in 1 rows; of the others, 1 failed")
    caplog.clear()
    assert data.pairs([row([3, 1])], "gold").summary() == "2 of 2 responses are in 1 rows"
    assert caplog.messages == []


def test_what_failed_is_no_row(base: cf.Model, tmp_path: Path, caplog: Any) -> None:
    """A prompt that is too long has no response, so there is nothing to train on."""
    prompts = ["the film was", "the film " * 300]
    with pytest.warns(RuntimeWarning, match="request 1 was not decoded: its prompt has 600"):
        rows = sample(base, tmp_path / "a.jsonl", prompts, n=2)
    made = data.values(rows, "words")
    assert len(made) == 2
    assert made.left_out == {"failed": 2}
    assert caplog.messages == [
        "values by words: 2 of 4 responses are in 2 rows; of the others, 2 failed, and have no "
        "tokens"
    ]
    assert data.pairs(rows, "words").left_out["failed"] == 2


@pytest.mark.parametrize("margin", [-0.1, float("nan"), "1"])
def test_margins_that_cannot_be(margin: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^margin is "):
        data.pairs([row([1, 2])], "gold", margin=margin)


def test_rows_of_values_and_of_chats() -> None:
    chat = {**row([1, 2], [True, False]), "prompt": CHATS[0]}
    assert data.values([chat], "half")[1] == {
        "prompt": CHATS[0],
        "completion": [{"role": "assistant", "content": "t2"}],
        "prompt_ids": [7],
        "completion_ids": [2],
        "reward": 1.0,
        "finished": False,
    }
    assert data.values([row([1])], "gold")[0]["completion"] == "t1"
    pair = data.pairs([{**row([1, 2]), "prompt": CHATS[0]}], "gold")[0]
    assert pair["chosen"] == [{"role": "assistant", "content": "t2"}]


@pytest.mark.parametrize(
    ("rewards", "n", "error", "message"),
    [
        ({"r": 3}, 4, TypeError, r"rewards\['r'\] is a int; it must be a function"),
        ({"r": words}, 0, ValueError, "n is 0; it must be an int of at least 1"),
        ({"r": words}, 1.0, ValueError, "n is 1.0; it must be an int of at least 1"),
        ({"r": lambda p, r: [1.0]}, 4, ValueError, "reward 'r' gave 1 scores; it must give 12"),
        ({"r": lambda p, r: [float("nan")] * 12}, 4, ValueError, "score 0 of reward 'r' is nan"),
        ({"r": lambda p, r: [None] * 12}, 4, TypeError, "score 0 of reward 'r' is None; it must"),
        ({"r": lambda p, r: None}, 4, TypeError, "reward 'r' gave None; it must give 12 numbers"),
    ],
)
def test_mistakes_are_named(
    base: cf.Model, tmp_path: Path, rewards: Any, n: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        data.rollouts(base, CHATS, rewards, tmp_path / "a.jsonl", n=n, max_new_tokens=2)


@pytest.mark.parametrize("per_prompt", [0, -1, 1.0])
def test_numbers_of_pairs_that_cannot_be(per_prompt: Any) -> None:
    with pytest.raises(ValueError, match=f"per_prompt is {per_prompt}; it must be an int of at le"):
        data.pairs([row([1, 2])], "gold", per_prompt=per_prompt)


def test_an_unknown_reward_is_named() -> None:
    for form in (data.pairs, data.values):
        with pytest.raises(ValueError, match=r"reward is 'god'; it must be one of \['gold', 'half"):
            form([row([1, 2])], "god")


def test_a_file_can_be_read_by_others(base: cf.Model, tmp_path: Path) -> None:
    rows = sample(base, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == rows
