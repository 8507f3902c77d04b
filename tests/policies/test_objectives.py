"""The registry of objectives, and the forms in which sets of them are given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from crossfade.policies.metaaligner import OBJECTIVES, read_objectives, resolve, resolve_each

# A word of each description. The README of the official code has those of two models swapped.
SAYS = {
    "harmlessness": "endanger",
    "helpfulness": "of use",
    "humour": "funny",
    "instruction_following": "what the query asks",
    "honesty": "believe",
    "truthfulness": "facts",
    "positivity": "optimistic",
    "brevity": "few words",
    "readability": "easy to read",
    "plain_words": "common words",
    "relevance": "topic",
    "diversity": "not repeat",
}


def test_names_go_with_their_descriptions() -> None:
    assert OBJECTIVES.keys() == SAYS.keys()
    for name, word in SAYS.items():
        assert [n for n, text in OBJECTIVES.items() if word in text] == [name]
    # they are joined by "; " after "Name: ", and the prompt has " | " between its parts
    assert not any(mark in text for text in OBJECTIVES.values() for mark in ";:|")


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "correcting.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", page)
    assert rows == [*OBJECTIVES.items()]


def test_a_set_has_any_of_three_forms() -> None:
    kind = {"kindness": "be kind"}
    assert resolve("brevity") == {"brevity": OBJECTIVES["brevity"]}
    assert resolve(kind) == kind
    assert [*resolve(["humour", kind, "brevity"])] == ["humour", "kindness", "brevity"]
    assert resolve(("kindness",), kind) == kind
    assert resolve({"brevity": "my own words"}) == {"brevity": "my own words"}
    mine = resolve(kind)
    mine["more"] = "x"
    assert kind == {"kindness": "be kind"}


def test_a_list_of_names_is_one_set_and_a_list_of_sets_one_each() -> None:
    one = resolve(["brevity", "humour"])
    assert resolve_each(["brevity", "humour"], 2) == [one, one]
    assert resolve_each("brevity", 3) == [resolve("brevity")] * 3
    assert resolve_each({"a": "x", "b": "y"}, 2) == [{"a": "x", "b": "y"}] * 2
    assert resolve_each([["brevity"], ["humour", {"a": "x"}]], 2) == [
        resolve("brevity"),
        resolve(["humour", {"a": "x"}]),
    ]
    assert resolve_each([{"a": "x"}, {"b": "y"}], 2) == [{"a": "x"}, {"b": "y"}]
    assert resolve_each([{"a": "x"}, ["brevity"]], 2) == [{"a": "x"}, resolve("brevity")]
    mixed = resolve_each(["brevity", {"a": "x"}], 2)
    assert mixed == [{**resolve("brevity"), "a": "x"}] * 2


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ("brevty", "objectives has 'brevty'; known ones are harmlessness, .* did you mean 'brev"),
        (["brevity", "Humor"], "objectives has 'Humor'; .* did you mean 'humour'"),
        ("kindness", r"others are given with a description, as \{name: description\}"),
        ([], "objectives is empty"),
        ({}, "objectives is empty"),
        ([{}], "a list without a name; it must be one set"),
        (3, "objectives is 3; it must be names"),
        (None, "objectives is None; it must be names"),
        (b"brevity", "it must be names"),
        (["brevity", 3], "objectives has 3; it must be names"),
        (["brevity", ["humour"]], r"objectives has \['humour'\]; it must be names"),
        ([{"a": "x"}, {"b": "y"}], "a list without a name; it must be one set: a mapping"),
        (["brevity", "brevity"], "objectives has 'brevity' twice"),
        (["plain_words", {"Plain words": "x"}], "objectives has 'Plain words' twice"),
        ({"a": ""}, r"objectives\['a'\] is ''; it must not be empty"),
        ({"a": None}, r"objectives\['a'\] is None; it must be a text"),
        ({"a": "x\n"}, r"objectives\['a'\] is 'x\\n'; it must be without white space around"),
        ({3: "x"}, "a name in objectives is 3; it must be a text"),
        ({" ": "x"}, "a name in objectives is ' '; it must not be empty"),
        ({"a": "\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_wrong_sets_are_named(objectives: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        resolve(objectives)


@pytest.mark.parametrize(
    ("objectives", "n", "message"),
    [
        ([{"a": "x"}], 2, "objectives has 1 sets; it must have 2, one for each query, or be one"),
        ([["brevity"], ["brevty"]], 2, r"objectives\[1\] has 'brevty'; .* did you mean"),
        ([["brevity"], {}], 2, r"objectives\[1\] is empty"),
        ([["brevity"], 3], 2, r"objectives\[1\] is 3"),
        ([], 2, "objectives is empty"),
        (None, 2, "objectives is None"),
    ],
)
def test_wrong_sets_of_one_query_are_named(objectives: Any, n: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        resolve_each(objectives, n)


def test_a_file_adds_objectives(tmp_path: Path) -> None:
    for name, text in (
        ("own.yaml", "kindness: be kind\nbrevity: 'be short: very'\n"),
        ("own.json", '{"kindness": "be kind", "brevity": "be short: very"}'),
    ):
        file = tmp_path / name
        file.write_text(text)
        own = read_objectives(file)
        assert own == {"kindness": "be kind", "brevity": "be short: very"}
        known = {**OBJECTIVES, **own}
        assert resolve(["kindness", "brevity"], known) == own


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: x\nb: y\na: z\n", "'a' is there twice"),
        ("a.json", '{"a": "x", "b": "y", "a": "z"}', "a.json: the key 'a' is there twice"),
        ("a.yaml", "a_b: x\nA b: y\n", "a.yaml has 'A b' twice"),
        ("a.yaml", "a: 3\n", r"a.yaml\['a'\] is 3; it must be a text"),
        ("a.yaml", "a:\n", r"a.yaml\['a'\] is None; it must be a text"),
        ("a.yaml", "1: x\n", "a name in .*a.yaml is 1; it must be a text"),
        ("a.yaml", "- a\n", "a.yaml holds a list; it must map names to descriptions"),
        ("a.yaml", "", "a.yaml holds a NoneType; it must map"),
        ("a.json", "{}", "a.json is empty"),
        ("a.json", '{"a": }', "a.json: not JSON"),
        ("a.yaml", "a: [", "a.yaml is not YAML"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_objectives(file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_objectives(tmp_path / "none.yaml")
