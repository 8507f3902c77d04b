"""Reports: they say what the figures resolve, as text, JSON and a page; names are harmless."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import resize
from crossfade import dynamics
from crossfade.dynamics import charts, findings, runs
from crossfade.files import write_text

HOSTILE = [
    "</script><script>document.title = 'x'</script>",
    '"><img src=x onerror="document.title = 1">',
    "🎉 party 👩‍👩‍👧",
    "שלום עולם",
    "\u202eturned\u2066",
    "line\nbreak \x1b[31m",
    "{braces} {0} @BODY@ `code` %s",
    "without_spaces_" * 20,
    "   ",
]


def of(
    name: str, difference: list[float], low: float, high: float, n: int = 4
) -> dynamics.Statistics:
    """Statistics whose interval is given."""
    d = torch.tensor(difference, dtype=torch.float64)
    return dynamics.Statistics(
        name, False, n, n, d / 2, -d / 2, 3.0, 2.0, 0.0, (low, high), (1.0, 1.0)
    )


def stats(*each: dynamics.Statistics) -> dict[str, dynamics.Statistics]:
    return {s.behaviour: s for s in each}


def watch(falling: dict[str, float], error: float | None = 0.01, **more: Any) -> dict[str, Any]:
    """What a watch has whose behaviours' losses fall by so much a step.

    Margins grow ten times as fast, within `error`.
    """
    history = [
        {
            "step": step,
            "behaviours": {
                name: {
                    **{"loss": 0.7 - rate * step, "accuracy": 0.5 + rate * step},
                    **{"chosen": -3.0 - step, "rejected": -4.0 - 2 * step, "argmax": -1.0},
                    **{"growth": 10 * rate * step, "growth_error": error},
                }
                for name, rate in falling.items()
            },
        }
        for step in (0, 1, 2)
    ]
    head = {"every": 1, "beta": 0.1, "kind": "statements", "head": "frozen", "warnings": []}
    return {**head, "behaviours": dict.fromkeys(falling, 4), "history": history, **more}


KIND = of("kindness", [4.0, 0.0], 3.5, 4.5)
LATE = of("punctuality", [0.0, 1.0], 0.5, 1.4)
NEAR = of("honesty", [0.0, 1.2], 0.6, 1.6)


def test_the_answer_names_first_starved_and_shares() -> None:
    found = dynamics.report(stats(LATE, KIND), model="a model")
    assert found.data["answer"] == {
        **{"pairs": 1, "resolved": 1, "first": ["kindness"], "last": ["punctuality"]},
        "starved": [
            {
                "behaviour": "punctuality",
                "by": [{"behaviour": "kindness", "priority": pytest.approx(0.9095, abs=1e-4)}],
            }
        ],
        **{"opposed": [], "not_apart": [], "same": []},
    }
    lines = found.summary.splitlines()
    assert lines[:2] == [
        "Learnt first: kindness will be learnt first.",
        "Learnt last: punctuality will be learnt last.",
    ]
    assert lines[2].startswith("Starved: punctuality is starved by kindness (priority 0.91). A")
    assert "Give more rows to punctuality (50 % → 94 %). Give fewer rows to kindness" in lines[3]
    assert repr(found) == found.summary
    balanced = dynamics.report(stats(KIND, LATE), balanced="even.jsonl")
    said = "even.jsonl has such rows: turn its statements into pairs by `dynamics.statement_pairs`"
    assert said in balanced.summary
    pairs = {name: dataclasses.replace(s, pairs=True) for name, s in stats(KIND, LATE).items()}
    said = dynamics.report(pairs, balanced="even.jsonl").summary
    assert "even.jsonl has such rows: train on it." in said
    assert "statement_pairs" not in said


def test_what_overlaps_is_too_close_to_call() -> None:
    said = dynamics.report(stats(KIND, LATE, NEAR)).summary
    assert "honesty and punctuality come last. Which of them is too" in said or (
        "punctuality and honesty come last. Which of them is too close to call." in said
    )
    assert "Of 3 pairs of behaviours, 1 is too close to call." in said
    both = dynamics.report(stats(KIND, of("tidiness", [3.6, 0.0], 3.2, 4.1), LATE)).summary
    assert "kindness and tidiness come first. Which of them is too close to call" in both


def test_where_nothing_is_resolved_nothing_is_advised() -> None:
    found = dynamics.report(stats(LATE, NEAR), balanced="even.jsonl")
    assert found.summary.startswith("Nothing is resolved: Which behaviour is learnt first cannot")
    assert "Leave the shares as they are." in found.summary
    assert "Do not train on even.jsonl" in found.summary
    assert "starved" not in found.summary.lower()
    assert "more rows" not in found.summary


def test_the_order_is_that_of_intervals() -> None:
    """Few texts look further apart: a distance above its interval does not put it first."""
    few = of("few", [5.0, 0.0], 0.2, 2.0)
    found = dynamics.report(stats(few, of("many", [4.0, 0.0], 3.9, 4.1)))
    assert [b["name"] for b in found.data["behaviours"]] == ["many", "few"]
    assert found.data["answer"]["first"] == ["many"]


def test_one_text_a_side_resolves_nothing_of_a_behaviour() -> None:
    lonely = of("lonely", [9.0, 0.0], 0.0, math.inf, n=1)
    found = dynamics.report(stats(lonely, KIND, LATE))
    assert found.data["answer"]["not_apart"] == ["lonely"]
    assert found.data["behaviours"][0]["interval"] == [0.0, None]
    assert "Hardly there: lonely is not told apart from chance" in found.summary
    assert "First get more texts of lonely: until then, its share is a guess." in found.summary
    assert "∞" in found.html


def test_opposed_behaviours_are_called_so() -> None:
    found = dynamics.report(stats(KIND, of("rudeness", [-1.0, 0.0], 0.8, 1.2)))
    assert found.data["priorities"][0][1] > 1
    assert "Opposed: rudeness is opposed by kindness (priority 1.25)." in found.summary
    assert "starved" not in found.summary


def test_even_shares_are_left_and_rows_are_repeated_so_often_at_most() -> None:
    even = stats(of("a", [2.0], 1.9, 1.99), of("b", [2.1], 2.0, 2.2))
    assert "Nothing: the shares are about even already." in dynamics.report(even).summary
    far = dynamics.report(stats(of("a", [9.0], 8, 10, n=96), of("b", [1.0], 0.5, 2)), most=10)
    b = far.data["behaviours"][1]
    assert b["balanced_rows"] == 80  # 8 of its own, 10 times
    assert b["even_share"] == pytest.approx(81 / 82)
    assert b["repeats_needed"] == pytest.approx(81 / 82 * 200 / 8)
    assert "needs new rows of b (24.7 times as many)" in far.summary


def test_one_behaviour_has_no_order() -> None:
    said = dynamics.report(stats(KIND)).summary
    assert said == (
        "One behaviour: kindness is the only one: its sides are 4.00 (95 %: 3.50 to 4.50) apart. "
        "An order, priorities and shares need at least two."
    )


def test_the_observed_order_is_compared_with_what_is_resolved() -> None:
    seen = watch({"kindness": 0.2, "punctuality": 0.1, "honesty": 0.05, "wit": 0.01})
    found = dynamics.report(stats(KIND, LATE, NEAR), watches={"run": seen})
    observed = found.data["watches"][0]["observed"]
    assert observed["order"] == ["kindness", "punctuality", "honesty", "wit"]
    assert observed["falls"]["kindness"] == pytest.approx(0.2)  # the mean of 0, 0.2 and 0.4
    assert (observed["first"], observed["last"]) == (["kindness"], ["wit"])
    assert (observed["agree"], observed["of"]) == (2, 2)  # the third pair is not resolved
    assert found.data["notes"] == ["run: watched, but not in the data: wit"]
    assert "In run, kindness was learnt first and wit last. Of 2 pairs resolved" in found.summary
    other = watch({"kindness": 0.1, "punctuality": 0.2, "honesty": 0.05})
    again = dynamics.report(stats(KIND, LATE, NEAR), watches={"run": other})
    assert again.data["watches"][0]["observed"]["agree"] == 1


def test_an_observed_order_within_its_noise_is_too_close_to_call() -> None:
    rates = {"tidiness": 6e-5, "kindness": 5e-5, "punctuality": 4e-5, "honesty": -4e-5}
    found = dynamics.report(stats(KIND, LATE), watches={"run": watch(rates, error=0.0007)})
    observed = found.data["watches"][0]["observed"]
    assert (observed["agree"], observed["of"]) == (0, 0)
    assert observed["hardly"] == ["honesty"]
    assert (
        "In run, tidiness, kindness and punctuality were learnt: their order is too close to call; "
        "honesty was hardly learnt. No warnings."
    ) in found.summary
    assert "were hardly learnt. No" in happened(rates, error=0.002)
    assert "kindness and punctuality were measured too little." in happened(
        {"kindness": 0.2, "punctuality": 0.1}, error=None
    )


def happened(rates: dict[str, float], **more: Any) -> str:
    """The words on a watch with such rates."""
    return dynamics.report(stats(KIND, LATE), watches={"run": watch(rates, **more)}).summary


def test_observed_places_are_resolved_by_growth_and_by_loss() -> None:
    """Kindness grew more than tidiness, but its loss fell less; honesty's interval is wide."""
    seen = watch({"tidiness": 0.2, "kindness": 0.1, "honesty": 0.09, "punctuality": 0.01})
    last = seen["history"][-1]["behaviours"]
    last["kindness"]["growth"] = 5.0
    last["honesty"] |= {"growth": 3.0, "growth_error": 2.9}
    found = dynamics.report(stats(KIND, LATE), watches={"run": seen})
    assert (
        "In run, tidiness and kindness were learnt first and punctuality last; honesty overlaps "
        "with both: too close to call. Of 1 pair resolved before and after, 1 came as predicted."
    ) in found.summary
    assert "3.00 ± 2.90" in Parsed(found.html).text


def test_a_watch_of_other_behaviours_is_left_out_of_the_answer() -> None:
    watches = {"mine": watch({"kindness": 0.2}), "other": watch({"wit": 0.2, "charm": 0.1})}
    said = dynamics.report(stats(KIND, LATE), watches=watches).summary
    assert "In mine, kindness was learnt. No" in said
    assert "What happened: other is left out here: it has none of these behaviours." in said
    assert "wit" not in said.replace("with", "")


def test_sides_that_look_the_same_are_told_to_be_checked() -> None:
    same = of("copied", [0.0, 0.0], 0.0, 0.0)
    alone, two, three = (
        dynamics.report(stats(same, *others), balanced="even.jsonl").summary
        for others in ((), (of("unclear", [0.5, 0.0], 0.0, 1.0),), (KIND, LATE))
    )
    for said in (alone, two, three):
        assert "Both sides of copied look the same to the model." in said
        assert "What to do: Check the texts and labels of copied: both sides look the same" in said
        assert "ore texts" not in said
        assert "more rows" not in said
        assert "Do not train on even.jsonl" in said
    assert "Hardly there" not in three
    near = of("near", [1e-3, 0.0], 0.0, 0.01)
    assert dynamics.report(stats(near, KIND)).data["answer"]["same"] == []


def test_what_to_do_names_each_that_is_starved() -> None:
    few = of("few", [4.0, 0.0], 3.9, 4.1, n=2)
    many = of("many", [0.0, 1.0], 0.9, 1.1, n=30)
    said = dynamics.report(stats(few, many)).summary
    todo = "Though starved, many (94 % → 94 %) is about even already."
    assert "many is starved by few" in said
    assert f"What to do: Nothing: the shares are about even already. {todo}" in said
    large = of("large", [4.1, 0.0], 3.8, 4.2, n=5)
    said = dynamics.report(stats(few, many, large)).summary
    assert "Give fewer rows to large (14 % → 5 %). Though starved, many (81 % → 89 %) is" in said


def test_who_may_be_first_and_last_is_named_once() -> None:
    said = dynamics.report(stats(KIND, of("wide", [2.0, 0.0], 0.6, 4.0), LATE)).summary
    assert said.splitlines()[:3] == [
        "Learnt first: kindness comes first.",
        "Between: wide has an interval that overlaps with those of both ends: any place is "
        "possible.",
        "Learnt last: punctuality comes last.",
    ]


def test_who_is_moved_by_a_first_step_is_named() -> None:
    said = dynamics.report(stats(KIND, LATE)).summary
    assert "A first step on both moves kindness at least twice as far as punctuality." in said
    said = dynamics.report(stats(KIND, LATE, NEAR)).summary
    assert "moves the one that starves at least twice as far as the one that is starved." in said
    said = dynamics.report(stats(KIND, of("rudeness", [-1.0, 0.0], 0.8, 1.2))).summary
    assert "A first step on both moves rudeness the wrong way." in said


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((12.2, 11.04, 13.2), "12.2 11.0 13.2"),
        ((9.0, 0.0, None), "9.00 0.00 ∞"),
        ((1234.5, 1000.2, 1500.0), "1,234 1,000 1,500"),
        ((12.0, 0.004, 14.0), "12.000 0.004 14.000"),
        ((0.0, 0.0, 0.0), "0 0 0"),
        ((-0.04, 0.0123), "-0.0400 0.0123"),
        ((3.0, 1e-12, 4.0), "3 1e-12 4"),
        ((2e9, 1e9, 3e9), "2e+09 1e+09 3e+09"),
    ],
)
def test_a_figure_and_its_interval_have_the_same_decimals(figures: Any, said: str) -> None:
    assert " ".join(findings.aligned(*figures)) == said


def test_figures_that_are_missing_leave_gaps() -> None:
    seen = watch({"kindness": 0.2, "punctuality": 0.1})
    seen["history"][0]["behaviours"]["punctuality"]["loss"] = math.nan
    del seen["history"][1]["behaviours"]["punctuality"]
    found = dynamics.report(stats(KIND, LATE), watches={"run": seen})
    assert found.data["watches"][0]["observed"]["order"] == ["kindness"]
    assert json.loads(json.dumps(found.data, allow_nan=False)) == found.data
    assert "<svg" in found.html


@pytest.mark.parametrize(
    "wrong", [{}, [], None, 3, {"history": []}, watch({}) | {"history": [{"step": "a"}]}]
)
def test_what_is_no_watch_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"watches\['run'\] is not a watch of a training"):
        dynamics.report(stats(KIND), watches={"run": wrong})


def test_a_watch_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "watch.json").write_text(json.dumps(watch({"kindness": 0.2})))
    assert runs.read(tmp_path) == runs.read(tmp_path / "watch.json")
    assert runs.read(tmp_path)["behaviours"] == {"kindness": 4}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"stats": {}}, ValueError, "stats is empty"),
        ({"stats": [KIND]}, TypeError, "stats must be a mapping"),
        ({"stats": {"a": 3}}, TypeError, "stats must be a mapping"),
        ({"most": 0}, ValueError, "most is 0"),
        ({"model": 3}, TypeError, "model is a int"),
        ({"notes": "a"}, TypeError, "notes is 'a'; it must be a list of texts"),
        ({"watches": ["a"]}, TypeError, "watches is a list; it must be a mapping of names"),
        ({"tag": "a"}, TypeError, "report got an unknown argument 'tag'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dynamics.report(**{"stats": stats(KIND), **arguments})


def test_figures_are_those_of_the_statistics(tmp_path: Path) -> None:
    found = dynamics.report(stats(KIND, LATE), notes=["a note"])
    found.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == found.data
    first = data["behaviours"][0]
    assert (first["n_positive"], first["n_negative"], first["rows"]) == (4, 4, 8)
    assert (first["trace"], first["concentration"]) == (3.0, 2.0)
    assert first["accuracy_bound"] == KIND.accuracy_bound
    assert data["priorities"] == dynamics.priorities(stats(KIND, LATE)).matrix.tolist()
    assert [b["even_share"] for b in data["behaviours"]] == [
        *dynamics.shares(stats(KIND, LATE)).values()
    ]
    assert data["notes"] == ["a note"]


class Parsed(HTMLParser):
    """The tags and the text of a page; what is not closed is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def many(names: list[str]) -> dict[str, dynamics.Statistics]:
    """Behaviours at distances that fall, of which some overlap."""
    far = [9.0 * 0.9**i for i in range(len(names))]
    return stats(*(of(n, [x, 0.1], 0.9 * x, 1.1 * x) for n, x in zip(names, far, strict=True)))


@pytest.mark.parametrize("count", [1, 2, 8, 60])
def test_pages_of_any_number_of_behaviours_are_whole(count: int) -> None:
    names = [f"behaviour {i}" for i in range(count)]
    seen = watch({name: 0.2 / (i + 1) for i, name in enumerate(names)})
    page = Parsed(dynamics.report(many(names), watches={"run": seen}).html)
    assert "script" not in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("td") >= 11 * count
    assert all(name in page.text for name in names)


def test_names_are_escaped_and_their_direction_stays_theirs() -> None:
    text = "<b>a note</b>"
    seen = watch(
        dict.fromkeys(HOSTILE, 0.1), warnings=[{"step": 1, "behaviour": HOSTILE[0], "text": text}]
    )
    found = dynamics.report(many(HOSTILE), model=HOSTILE[0], watches={text: seen}, notes=[text])
    page = Parsed(found.html)
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.text.count(text) >= 4  # the file twice, the note and the warning
    for name in (HOSTILE[0], HOSTILE[1], *HOSTILE[2:4], HOSTILE[6]):
        assert name in page.text
    for turned in ("\u202e", "\u2066", "\x1b"):
        assert turned not in found.html + found.summary
    assert "line break" in page.text
    assert len(found.summary.splitlines()) == len(findings.lines(found.data))
    assert not re.search(r"https?://", found.html), "it fetches nothing"


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "report.html"
    place.write_text("before")
    place.chmod(0o640)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(place, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert place.read_text() == "before"
    monkeypatch.undo()
    (tmp_path / "link.html").symlink_to(place)
    write_text(tmp_path / "link.html", "after")
    assert (tmp_path / "link.html").is_symlink()
    assert place.read_text() == "after"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.html", "a")


def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    names = [*HOSTILE, *(f"behaviour {i}" for i in range(51))]
    seen = watch({name: 0.2 / (i + 1) for i, name in enumerate(names)})
    dynamics.report(many(names), model="a model", watches={"run": seen}).to_html(
        tmp_path / "report.html"
    )
    for width, height in ((1280, 800), (390, 844)):
        resize(browser, width, height)
        browser.get((tmp_path / "report.html").as_uri())
        assert browser.title == "Learning dynamics of a model"
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "nothing is wider than the screen"
        answer = browser.find_elements("css selector", "#answer")[0]
        assert answer.location["y"] < 0.3 * height, "the answer is what is seen first"
        assert "will be learnt first" in answer.text or "come first" in answer.text
        box, cell = (
            browser.execute_script("return arguments[0].getBoundingClientRect()", found)
            for found in browser.find_elements("css selector", ".box, #priorities td:last-child")[
                :2
            ]
        )
        assert box["right"] <= width < cell["right"], "wide tables scroll in their box"
        dots = browser.find_elements("css selector", "#distances .dot")
        places = [dot.location["x"] for dot in dots]
        assert len(places) == 60
        assert places == sorted(places, reverse=True)
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            colors = browser.execute_script(
                "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
            )
            ink, back = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colors)
            assert (ink < back) == (scheme == "light")
            assert abs(ink - back) > 500
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("low", [-10.848, -166.42, -2.0, -123456.5])
def test_numbers_of_an_axis_are_not_cut_off(low: float) -> None:
    curve = charts.Curve([(0, low), (2, low + 0.003)], 0, "chosen", "")
    picture = charts.curves([curve], "log-probs")
    labels = re.findall(r'<text x="([\d.-]+)" [^>]*text-anchor="end">([^<]+)<', picture)
    assert len(labels) >= 2
    for x, said in labels:  # they end at x, and a digit of 13 px is 8.3 px wide, a minus 10.9
        assert float(x) >= 8.3 * len(said) + 2.6 * ("\u2212" in said) - 4 * ("." in said)
