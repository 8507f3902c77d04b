"""The dynamic multi-objective set, without the faults of the official code."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from crossfade.policies.metaaligner import (
    OBJECTIVES,
    AlignerTemplate,
    metaaligner_rows,
    metaaligner_stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, tokenizer_of

TOKENIZER = tokenizer_of("bytes")
EOS = TOKENIZER.eos_token_id
NAMES = {"kind": "be kind", "brief": "be brief", "clear": "be clear"}
PAIR = {
    "prompt": "the film",
    "first": "The plot was dull.",
    "second": "A bright cast.",
    "preferences": {"kind": "worse", "brief": "worse", "clear": "equal"},
}


def rows(pairs: Any, objectives: Any = NAMES, **options: Any) -> Any:
    return metaaligner_rows(pairs, TOKENIZER, objectives, **options)


def read(row: dict[str, Any]) -> tuple[str, str, frozenset[str], str, str, str]:
    """A row as its stage, goal, objectives, query, answer and target."""
    prompt, target = (TOKENIZER.decode(row[f"{x}_ids"]) for x in ("prompt", "completion"))
    head, query, answer, end = prompt.split(" | ")
    asked, aspects = head.split(" considering these aspects: ")
    assert end == "Edit: "
    assert target.endswith(TOKENIZER.eos_token)
    return (
        row["stage"],
        "equal" if asked.endswith("to make it equal") else "better",
        frozenset(aspects.split("; ")),
        query.removeprefix("Context: "),
        answer.removeprefix("Answer: "),
        target.removesuffix(TOKENIZER.eos_token),
    )


def literal(pairs: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Algorithm 1 of the paper, and the rows to warm up, of section 3.2.2, as they stand there."""
    for pair in pairs:
        q, y1, y2 = pair["prompt"], pair["first"], pair["second"]
        first, second, equal = set(), set(), set()
        for name, preference in pair["preferences"].items():
            described = f"{name.capitalize()}: {NAMES[name]}"
            if preference == "better":
                first.add(described)
            elif preference == "worse":
                second.add(described)
            else:
                equal.add(described)
        if first:
            yield ("better", "better", frozenset(first), q, y2, y1)
        if second:
            yield ("better", "better", frozenset(second), q, y1, y2)
        if equal:
            yield ("warm-up", "equal", frozenset(equal), q, y2, y2)
            yield ("equal", "equal", frozenset(equal), q, y2, y1)


preferences = st.dictionaries(
    st.sampled_from([*NAMES]), st.sampled_from(["better", "worse", "equal"])
)
answers = st.lists(st.sampled_from(["a", "The", "film", "dull", "é"]), min_size=1, max_size=3)
PAIRS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["the film", "the plot", "q"]),
            "first": answers.map(" ".join),
            "second": answers.map(" ".join),
            "preferences": preferences,
        }
    ),
    max_size=6,
)


@settings(max_examples=40)  # most of the time is the tokenizer's
@given(PAIRS, st.integers(0, 3))
def test_rows_are_those_of_the_algorithm(pairs: list[dict[str, Any]], seed: int) -> None:
    before = copy.deepcopy(pairs)
    found = rows(pairs, seed=seed)
    assert pairs == before
    different = [p for p in pairs if p["first"] != p["second"]]
    expected = [*literal(different)]
    assert [read(row) for row in found] == expected
    assert found == [*metaaligner_stream(iter(pairs), TOKENIZER, NAMES, seed=seed)]
    assert found.counts.pairs == len(pairs)
    assert found.counts.left_out["same"] == len(pairs) - len(different)
    assert found.counts.left_out["unjudged"] == sum(not p["preferences"] for p in different)
    stages = Counter(stage for stage, *_ in expected)
    assert found.counts.rows["train"] == {s: stages[s] for s in ("warm-up", "equal", "better")}
    assert found.counts.compared == Counter(x for p in different for x in p["preferences"])


@pytest.mark.parametrize("noun", ["context", "query"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tokens_of_the_template(kind: str, noun: str) -> None:
    """Prompt and answer are encoded apart, as they are when the aligner is used."""
    tokenizer = tokenizer_of(kind)
    pair = {**PAIR, "preferences": {"kind": "better", "brief": "worse", "clear": "equal"}}
    found = metaaligner_rows([pair], tokenizer, NAMES, noun=noun)
    template = AlignerTemplate(noun)
    expected = [
        (template.prompt("the film", PAIR["second"], {"kind": "be kind"}), "first"),
        (template.prompt("the film", PAIR["first"], {"brief": "be brief"}), "second"),
        (template.prompt("the film", PAIR["second"], {"clear": "be clear"}, "equal"), "second"),
        (template.prompt("the film", PAIR["second"], {"clear": "be clear"}, "equal"), "first"),
    ]
    for row, (prompt, target) in zip(found, expected, strict=True):
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert row["completion_ids"][-1] == EOS
        joined = [*row["prompt_ids"], *row["completion_ids"]]
        said = tokenizer.decode(joined, skip_special_tokens=True)
        assert said.endswith(f": {PAIR[target]}")


# ---- faults of the official code


def test_equal_prompts_have_the_equal_objectives() -> None:
    """The official code fills the equal prompt with the objectives of another row."""
    template = AlignerTemplate()
    better, warm_up, equal = rows([PAIR])
    assert TOKENIZER.decode(better["prompt_ids"]) in {
        template.prompt("the film", PAIR["first"], {x: NAMES[x] for x in order})
        for order in (("kind", "brief"), ("brief", "kind"))
    }
    clear = (
        "You are an assistant to human. You will be provided with a context and an answer. "
        "Consider the context, then edit the answer to make it equal considering these aspects: "
        "Clear: be clear | Context: the film | Answer: A bright cast. | Edit: "
    )
    assert equal == {
        "prompt_ids": TOKENIZER(clear)["input_ids"],
        "completion_ids": [*TOKENIZER(PAIR["first"])["input_ids"], EOS],
        "stage": "equal",
        "split": "train",
    }
    assert warm_up == {
        **equal,
        "completion_ids": [*TOKENIZER(PAIR["second"])["input_ids"], EOS],
        "stage": "warm-up",
    }


def test_each_pair_has_its_equal_rows() -> None:
    """The official code makes them of the last pair of a prompt alone."""
    pairs = [{**PAIR, "first": f"The plot was {x}."} for x in ("dull", "fine", "bright")]
    equal = rows(pairs).of("equal")
    assert [TOKENIZER.decode(row["completion_ids"][:-1]) for row in equal] == [
        pair["first"] for pair in pairs
    ]
    responses = [{"text": x, "rewards": dict.fromkeys(NAMES, 1)} for x in ("a", "b", "c", "d")]
    found = rows([{"prompt": "q", "responses": responses}])
    assert found.counts.rows["train"] == {"warm-up": 6, "equal": 6, "better": 0}


def test_both_directions_of_a_pair_are_used() -> None:
    """Each on the objectives by which its target is better; the official code has one."""
    pair = {**PAIR, "preferences": {"kind": "better", "brief": "worse"}}
    one, other = (read(row) for row in rows([pair]))
    assert one[2:] == (frozenset({"Kind: be kind"}), "the film", PAIR["second"], PAIR["first"])
    assert other[2:] == (frozenset({"Brief: be brief"}), "the film", PAIR["first"], PAIR["second"])


@settings(max_examples=20)
@given(PAIRS)
def test_no_row_has_an_empty_list_of_objectives(pairs: list[dict[str, Any]]) -> None:
    """The official code has such rows, where nothing is better or nothing equal."""
    for row in rows(pairs):
        aspects = read(row)[2]
        assert aspects
        assert "" not in aspects


many = [{**PAIR, "prompt": f"film {i % 40}", "first": f"It was {i}."} for i in range(120)]


def test_no_prompt_is_in_both_splits() -> None:
    """The official code shuffles rows before it splits them."""
    found = rows(many, validation=0.3)
    prompts: dict[str, set[str]] = {"train": set(), "validation": set()}
    for row in found:
        prompts[row["split"]].add(read(row)[3])
    assert not prompts["train"] & prompts["validation"]
    assert 0 < len(prompts["validation"]) < 22
    assert sum(counted.total() for counted in found.counts.rows.values()) == len(found)
    assert len(found.of("equal", "validation")) == found.counts.rows["validation"]["equal"] > 0


# ---- what is drawn


def test_the_order_of_objectives_is_drawn_by_seed_and_place() -> None:
    pair = {**PAIR, "preferences": dict.fromkeys(NAMES, "worse")}
    found = [row["prompt_ids"] for row in rows([pair] * 60)]
    orders = Counter(map(tuple, found))
    assert len(orders) == 6
    assert max(orders.values()) < 25
    assert found == [row["prompt_ids"] for row in rows([pair] * 60)]
    assert found != [row["prompt_ids"] for row in rows([pair] * 60, seed=1)]
    # what stands before does not count
    mixed = [PAIR, *[pair] * 59]
    assert found[1:] == [row["prompt_ids"] for row in rows(mixed).of("better")[1:]]


def test_pairs_of_responses_are_drawn_apart() -> None:
    """What the first pair of an element is compared by does not change the order of the next."""

    def last(first: dict[str, int]) -> list[Any]:
        high, low = dict.fromkeys(NAMES, 5), dict.fromkeys(NAMES, 1)
        responses = [("a", first), ("b", high), ("c", low)]
        element = {"prompt": "q", "responses": [{"text": x, "rewards": r} for x, r in responses]}
        return [row for row in rows([element] * 20) if read(row)[4:] == ("c", "b")]

    assert len(last({**dict.fromkeys(NAMES, 9)})) == 20
    assert last(dict.fromkeys(NAMES, 9)) == last({"kind": 9, "brief": 5, "clear": 0})


def test_the_split_of_a_prompt_depends_on_its_text_and_the_seed() -> None:
    few = many[:40]

    def splits(pairs: Any, seed: int = 0) -> dict[str, str]:
        found = rows(pairs, validation=0.3, seed=seed)
        return {read(row)[3].strip(): row["split"] for row in found}

    whole = splits(few)
    assert splits(few[::-1]) == whole
    assert splits(few[:7]) == {k: v for k, v in whole.items() if k in splits(few[:7])}
    chats = [{**p, "prompt": [{"role": "user", "content": f"{p['prompt']}\n"}]} for p in few]
    assert splits(chats) == whole
    assert splits(few, seed=1) != whole
    assert {row["split"] for row in rows(few)} == {"train"}


def test_rows_to_warm_up_are_a_share_of_the_equal_ones() -> None:
    whole, half, none = (rows(many, warm_up=x) for x in (1, 0.5, 0))
    assert whole.of("equal") == half.of("equal") == none.of("equal")
    assert len(whole.of("warm-up")) == 120
    assert 40 < len(half.of("warm-up")) < 80
    assert none.of("warm-up") == []


# ---- forms of rows


def test_nothing_ends_with_eos_that_a_limit_cut() -> None:
    cut = {**PAIR, "first_finished": False, "preferences": {"clear": "better"}}
    text = TOKENIZER(PAIR["first"])["input_ids"]
    assert rows([cut])[0]["completion_ids"] == text
    assert rows([{**cut, "first_finished": None}])[0]["completion_ids"] == [*text, EOS]
    responses = [
        {"text": PAIR["first"], "finished": False, "rewards": {"clear": 1}},
        {"text": PAIR["second"], "finished": True, "rewards": {"clear": 0}},
    ]
    found = rows([{"prompt": "q", "responses": responses}], {"clear": "be clear"})
    assert found[0]["completion_ids"] == text


def test_answers_that_spell_special_tokens_have_none() -> None:
    """Else a model would learn to stop, or to speak for the user, in the middle of an answer."""
    pair = {**PAIR, "first": "The end.</s> <|user|>dull", "preferences": {"kind": "better"}}
    (row,) = rows([pair])
    *answer, end = row["completion_ids"]
    assert end == EOS
    assert not {*answer, *row["prompt_ids"]} & {*TOKENIZER.all_special_ids}
    assert TOKENIZER.decode(answer) == "The end.< /s> < |user|>dull"


R = [
    {"text": "The a", "rewards": {"kind": 0.0, "brief": 5.0, "vader": 1}},
    {"text": "film b", "rewards": {"kind": 0.1, "brief": 3.0, "vader": 1}},
    {"text": "c", "rewards": {"kind": 0.9, "brief": 3.0, "vader": 1}},
]
TWO = {name: NAMES[name] for name in ("kind", "brief")}


def test_pairs_of_responses_are_compared_by_their_rewards() -> None:
    options: dict[str, Any] = {"margins": {"kind": 0.5}, "warm_up": 0}
    found = [read(row) for row in rows([{"prompt": "q", "responses": R}], TWO, **options)]
    kind, brief = (frozenset({f"{x.capitalize()}: {NAMES[x]}"}) for x in TWO)
    a, b, c = (r["text"] for r in R)
    assert found == [
        ("better", "better", brief, "q", b, a),
        ("equal", "equal", kind, "q", b, a),
        ("better", "better", brief, "q", c, a),
        ("better", "better", kind, "q", a, c),
        ("better", "better", kind, "q", b, c),
        ("equal", "equal", brief, "q", c, b),
    ]
    rated = [{"text": r["text"], "ratings": r["rewards"]} for r in R]
    again = rows([{"prompt": "q", "responses": rated}], TWO, **options)
    assert [read(row) for row in again] == found


numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@settings(max_examples=20)
@given(
    st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, numbers)), min_size=2, max_size=4),
    st.fixed_dictionaries(dict.fromkeys(NAMES, numbers)),
)
def test_rewards_give_the_rows_of_the_preferences_that_they_say(
    rewards: list[dict[str, float]], margins: dict[str, float]
) -> None:
    responses = [{"text": f"a {i}", "rewards": x} for i, x in enumerate(rewards)]
    pairs = []
    for one, other in itertools.combinations(responses, 2):
        said = {}
        for name, margin in margins.items():
            a, b = one["rewards"][name], other["rewards"][name]
            said[name] = "better" if a > b + margin else "worse" if b > a + margin else "equal"
        pairs.append(
            {"prompt": "q", "first": one["text"], "second": other["text"], "preferences": said}
        )
    found = rows([{"prompt": "q", "responses": responses}], margins=margins)
    assert [read(row) for row in found] == [*literal(pairs)]


def test_a_difference_of_the_margin_is_a_tie() -> None:
    two = [{"text": x, "rewards": {"kind": y, "brief": 0}} for x, y in (("a", 1), ("b", 3))]

    def better(margins: Any) -> int:
        found = rows([{"prompt": "q", "responses": two}], TWO, margins=margins)
        return found.counts.rows["train"]["better"]

    assert [better(x) for x in (0, 1.9, 2, 10)] == [1, 1, 0, 0]
    assert [better({"kind": 2}), better({"brief": 2})] == [0, 1]


def test_pairs_of_a_prompt_can_be_limited() -> None:
    responses = [{"text": f"a {i}", "rewards": {"kind": i, "brief": -i}} for i in range(6)]
    element = {"prompt": "q", "responses": responses}
    found = rows([element] * 5, TWO, per_prompt=2)
    assert found.counts.pairs == 75
    assert found.counts.left_out["spare"] == 65
    assert found.counts.rows["train"]["better"] == 20
    each = [{read(row)[4:] for row in found[4 * i : 4 * i + 4]} for i in range(5)]
    assert len(set(map(frozenset, each))) > 1
    assert rows([element] * 5, TWO, per_prompt=15) == rows([element] * 5, TWO)


def test_trl_rows_and_chats() -> None:
    chat = [{"role": "user", "content": "the film"}]
    pair = {
        "prompt": chat,
        "chosen": [{"role": "assistant", "content": PAIR["second"]}],
        "rejected": [{"role": "assistant", "content": PAIR["first"]}],
        "preferences": {"kind": "better", "brief": "better", "clear": "equal"},
    }
    assert rows([pair]).of("better") == rows([PAIR]).of("better")
    longer = [*chat, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    text = TOKENIZER.decode(rows([{**pair, "prompt": longer}])[0]["prompt_ids"])
    assert " | Context: User: the film\nAssistant: x\nUser: y | Answer: " in text


def test_objectives_are_those_of_the_registry_or_those_that_are_named() -> None:
    pair = {**PAIR, "preferences": {"brevity": "better", "kind": "better"}}
    (row,) = rows([pair], "brevity")
    assert read(row)[2] == frozenset({f"Brevity: {OBJECTIVES['brevity']}"})
    (row,) = rows([pair], ["brevity", {"kind": "be kind"}])
    assert len(read(row)[2]) == 2
    (row,) = rows([{**pair, "preferences": {"brevity": "better"}}], None)
    assert read(row)[2] == frozenset({f"Brevity: {OBJECTIVES['brevity']}"})
    with pytest.raises(ValueError, match="preferences of row 0 of pairs has 'kind', which is no"):
        rows([pair], None)
    with pytest.raises(ValueError, match=r"rewards of responses\[0\] .* has 'vader', which is no"):
        rows([{"prompt": "q", "responses": [{"text": "a", "rewards": {"vader": 1}}]}], None)


# ---- what is left out, and streams


def test_what_is_left_out_is_counted() -> None:
    failed = {"text": "", "ids": [], "finished": False, "rewards": dict.fromkeys(NAMES, 0)}
    whole = {"text": "a", "ids": [5, EOS], "finished": True, "rewards": dict.fromkeys(NAMES, 1)}
    pairs = [
        PAIR,
        {**PAIR, "first": " "},
        {**PAIR, "first": f"{PAIR['second']}\n"},
        {**PAIR, "preferences": {"clear": None}},
        {"prompt": "q", "responses": [failed, whole]},
        {"prompt": "q", "responses": [whole]},
    ]
    found = rows(pairs)
    assert found.counts.left_out == {"empty": 2, "same": 1, "unjudged": 1, "spare": 0}
    assert found.summary() == (
        "5 pairs give 1 warm-up, 1 equal, 1 better rows; compared by kind 1, brief 1, clear 1; of "
        "the pairs, 2 have an empty answer, 1 have the same answer twice, 1 are compared by no "
        "objective"
    )
    assert " better rows, and " in rows(many, validation=0.3).summary()
    assert rows([]).summary() == "0 pairs give 0 warm-up, 0 equal, 0 better rows"


def test_a_stream_takes_one_pair_at_a_time() -> None:
    taken = []

    def source() -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            taken.append(i)
            yield {**PAIR, "prompt": f"film {i}"}

    stream = metaaligner_stream(source(), TOKENIZER, NAMES)
    assert taken == []
    first = [next(stream) for _ in range(4)]
    assert taken == [0, 1]
    assert first[:3] == rows([{**PAIR, "prompt": "film 0"}])
    assert stream.counts.rows["train"] == {"warm-up": 1, "equal": 1, "better": 2}
    assert stream.summary().startswith("2 pairs give 1 warm-up, 1 equal, 2 better rows")


# ---- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "row 1 of pairs is a int; it must be a mapping"),
        ({"promt": "q"}, "row 1 of pairs has no prompt; did you mean 'prompt'"),
        ({**PAIR, "prompt": []}, "prompt of row 1 of pairs is empty"),
        ({**PAIR, "prompt": 3}, "prompt of row 1 of pairs is 3"),
        ({**PAIR, "prompt": [5, 6]}, "prompt of row 1 of pairs is token ids; it must be a text"),
        ({**PAIR, "prompt": "\ud83d"}, "prompt of row 1 of pairs: .* half of a surrogate pair"),
        ({"prompt": "q"}, "row 1 of pairs has no first; it must have first and second, chosen and"),
        ({"prompt": "q", "first": "a", "secnd": "b"}, "has no second; .* did you mean 'second'"),
        ({"prompt": "q", "chosen": "a", "second": "b"}, "row 1 of pairs has no first"),
        ({**PAIR, "first": 3}, "first of row 1 of pairs is 3; it must be a text"),
        ({**PAIR, "first": "\ud83d"}, "first of row 1 of pairs: .* half of a surrogate pair"),
        ({**PAIR, "first_finished": "no"}, "first_finished of row 1 of pairs is 'no'; it must be"),
        ({**PAIR, "preferences": None}, "row 1 of pairs has no preferences; it must have a map"),
        ({**PAIR, "preferences": "better"}, "preferences of row 1 of pairs is 'better'; it must"),
        (
            {**PAIR, "preferences": {"kind": "first"}},
            r"preferences\['kind'\] of row 1 of pairs is 'first'; it must be 'better', 'worse' or "
            "'equal', as first is beside second",
        ),
        ({**PAIR, "preferences": {"kind": 1}}, r"preferences\['kind'\] of row 1 of pairs is 1"),
        ({"prompt": "q", "responses": 3}, "responses of row 1 of pairs is 3; it must be a list"),
        ({"prompt": "q", "responses": [3]}, r"responses\[0\] of row 1 of pairs is 3"),
        ({"prompt": "q", "responses": [{"text": "a"}]}, r"rewards of responses\[0\] of row 1"),
        (
            {"prompt": "q", "responses": [{"text": 3, "rewards": dict.fromkeys(NAMES, 1)}]},
            r"text of responses\[0\] of row 1 of pairs is 3; it must be a text",
        ),
        (
            {"prompt": "q", "responses": [{"text": "a", "finished": 1}]},
            r"finished of responses\[0\] of row 1 of pairs is 1; it must be a bool",
        ),
        (
            {"prompt": "q", "responses": [{"text": "a", "rewards": {"kind": 1, "breif": 2}}]},
            r"rewards of responses\[0\] of row 1 of pairs has no 'brief', .* did you mean 'breif'",
        ),
        (
            {"prompt": "q", "responses": [{"text": "a", "rewards": dict.fromkeys(NAMES, "N/A")}]},
            r"rewards of responses\[0\] of row 1 of pairs: 'kind' is 'N/A'; it must be a number",
        ),
        (
            {"prompt": "q", "responses": [{"text": "a", "rewards": dict.fromkeys(NAMES, 1e999)}]},
            r"rewards of responses\[0\] of row 1 of pairs: 'kind' is inf; it must be finite",
        ),
    ],
)
def test_wrong_rows_are_named(row: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rows([PAIR, row])


def test_a_tokenizer_without_eos_is_named() -> None:
    tokenizer = KINDS["bytes"]()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0 of pairs: tokenizer has no EOS, which follows"):
        metaaligner_rows([PAIR], tokenizer, NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ["knd"]}, "objectives has 'knd'"),
        ({"pairs": PAIR}, "pairs is a dict; it must be rows"),
        ({"pairs": 3}, "pairs is a int; it must be rows"),
        ({"noun": "query "}, "noun is 'query '; it must be a word"),
        ({"seed": None}, "seed is None; it must be an int"),
        ({"per_prompt": 0}, "per_prompt is 0; it must be an int of at least 1"),
        ({"warm_up": 2}, r"warm_up is 2; it must be a share within \[0, 1\]"),
        ({"margins": -1}, "margins is -1; it must be 0 or more"),
        ({"margins": {"kind": -1}}, r"margins\['kind'\] is -1; it must be 0 or more"),
        ({"margins": {"knd": 1}}, r"margins\['knd'\] is of no objective; .* did you mean 'kind'"),
        ({"margins": "a"}, "margins is 'a'; it must be a number"),
        ({"validation": 1}, r"validation is 1; it must be a share within \[0, 1\)"),
        ({"validation": (0.9, 0.1)}, r"validation is \(0.9, 0.1\); it must be a number"),
        ({"margin": 1}, "got an unknown argument 'margin'; did you mean 'margins'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    given = {"pairs": [PAIR], "objectives": NAMES, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        metaaligner_stream(given.pop("pairs"), TOKENIZER, given.pop("objectives"), **given)


def test_wrong_stages_are_named() -> None:
    with pytest.raises(ValueError, match=r"stage is 'warmup'; .* did you mean 'warm-up'"):
        rows([PAIR]).of("warmup")
    with pytest.raises(ValueError, match="split is 'test'; it must be among train, validation"):
        rows([PAIR]).of("equal", "test")
