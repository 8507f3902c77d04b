"""Settings of a line: each is checked by name, and becomes an entry of the arguments of decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade.bulk import settings
from crossfade.bulk.prompts import Line, line_of, read_prompts
from crossfade.bulk.records import seed_of
from transformers import GenerationConfig

GREEDY, DRAWN = GenerationConfig(), GenerationConfig(do_sample=True, temperature=0.6, top_k=40)


def read(tmp_path: Path, *rows: Any, keep: tuple[str, ...] = ()) -> list[Line]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_prompts([], str(file), keep=keep)


def test_a_line_has_settings_and_what_is_carried_along(tmp_path: Path) -> None:
    row = {"topic": "x", "stop": "b", "metadata": {"a": [1]}, "id": 7, "prompt": "a", "seed": 3}
    (line,) = read(tmp_path, row, keep=("topic",))
    assert line == Line(
        "a", {"seed": 3, "stop": ["b"]}, {"id": 7, "metadata": {"a": [1]}, "topic": "x"}
    )


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"max_tokens": 5}, "unknown key 'max_tokens'; did you mean \"max_new_tokens\"?"),
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"chosen": "b"}, "unknown key 'chosen'; what is not for the models goes under \"metadata"),
        ({"n": 2}, "unknown key 'n'; it is one for all prompts, given by --n"),
        ({"temperature": -1}, "temperature is -1; it must be"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be an int"),
        ({"top_p": 2}, "top_p is 2; it must be"),
        ({"min_p": True}, "min_p is True; it must be a number"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
        ({"seed": None}, "seed is None; it must be an int"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"stop": [""]}, "stop has ''; it must be texts that are not empty"),
        ({"stop": []}, r"stop is \[\]; it must be a text or a list of texts"),
        ({"stop": 3}, "stop is 3; it must be a text or a list of texts"),
        ({"weights": 0.8}, 'weights is 0.8; it must be an object such as {"w": 0.8}'),
        ({"weights": {"w": "x"}}, r"weights\['w'\] is 'x'; it must be a number"),
        ({"weights": {"w": float("nan")}}, r"weights\['w'\] is nan; it must be finite"),
        ({"system": ["x"]}, r"system is \['x'\]; it must be a text"),
    ],
)
def test_a_wrong_setting_is_named_with_its_prompt(
    tmp_path: Path, more: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^prompt 1.* {problem}"):
        read(tmp_path, {"prompt": "a"}, {"prompt": "a", **more})


def test_a_system_prompt_makes_a_chat() -> None:
    told = line_of({"prompt": "a", "system": "x"}, 0)
    system, user = ({"role": "system", "content": "x"}, {"role": "user", "content": "a"})
    assert told.sent(chat=False) == told.sent(chat=True) == [system, user]
    assert line_of({"messages": [user], "system": "x"}, 0).sent(chat=False) == [system, user]
    assert line_of("a", 0).sent(chat=False) == "a"
    assert line_of("a", 0).sent(chat=True) == [user]
    for prompt, what in (([system, user], "a system message"), ([3, 4], "token ids")):
        with pytest.raises(ValueError, match=f'prompt 0 has a "system" and {what}'):
            line_of({"prompt": prompt, "system": "x"}, 0)


def test_lines_without_settings_leave_the_arguments_as_they_are() -> None:
    common = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.5}
    assert settings.arguments([{}, {}], common, GREEDY) == common
    assert settings.positions([{}, {}], {"w": 0.5}) == {"w": 0.5}
    assert settings.seeds([{}, {}], 3) == [seed_of(3, 0), seed_of(3, 1)]


def test_settings_of_a_line_go_before_those_of_all() -> None:
    own = [{"max_new_tokens": 2, "seed": 7}, {"stop": ["x"], "weights": {"w": 2.0}}, {}]
    common = {"max_new_tokens": 8, "stop_strings": ["y"]}
    assert settings.arguments(own, common, GREEDY) == {
        "max_new_tokens": [2, 8, 8],
        "stop_strings": [["y"], ["x"], ["y"]],
    }
    assert settings.arguments(own, {"max_new_tokens": 8}, GREEDY)["stop_strings"] == [
        None,
        ["x"],
        None,
    ]
    assert settings.seeds(own, 3) == [7, seed_of(3, 1), seed_of(3, 2)]
    found = settings.positions(own, {"w": 0.5, "v": 1.0})
    assert found["v"] == 1.0
    torch.testing.assert_close(found["w"], torch.tensor([0.5, 2.0, 0.5], dtype=torch.float64))


def test_a_line_that_draws_leaves_the_others_as_they_are() -> None:
    own = [{"top_k": 5}, {}, {"temperature": 2.0}]
    common = {"max_new_tokens": 8}
    assert settings.arguments(own, common, GREEDY) == {
        **common,
        "do_sample": True,
        "temperature": [1.0, 0.0, 2.0],
        "top_k": [5, 0, 0],
    }
    assert settings.arguments(own, common, DRAWN) == {
        **common,
        "do_sample": True,
        "temperature": [0.6, 0.6, 2.0],
        "top_k": [5, 40, 40],
    }
    asked = {"do_sample": True, "top_k": 9}
    assert settings.arguments(own, asked, GREEDY)["top_k"] == [5, 9, 9]
