"""`crossfade dynamics`: the report of a file of rows, its other files, and mistakes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crossfade import cli, dynamics
from tiny_models import lora
from word_models import loaded, save_reward_model

WORDS = {"first": ("a b", "c d"), "second": ("e f", "g h")}
ROWS = [
    {"behaviour": name, "text": f"{text} {end}", "label": label, "source": name.upper()}
    for end in "ijklmn"
    for name, texts in WORDS.items()
    for label, text in zip((True, False), texts, strict=True)
]
PAIRS = [
    {"kind": name, "prompt": end, "chosen": f" {texts[0]}", "rejected": f" {texts[1]}"}
    for end in "ijkl"
    for name, texts in WORDS.items()
]
OUT = ["--output=report.html"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    write("pairs.jsonl", PAIRS)
    return tmp_path


@pytest.fixture
def model(paths: dict[str, str]) -> str:
    return f"--model={paths['base']}"


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_a_report_and_its_files(
    model: str, paths: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those of the library; the file's other lines are named and kept."""
    write("rows.jsonl", [{"text": "a", "label": True}, *ROWS, {**ROWS[0], "behaviour": "lonely"}])
    Path("report.html").write_text("before")
    argv = ["dynamics", "rows.jsonl", model, *OUT, "--json=report.json", "--balanced=even.jsonl"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    notes = [
        "row 0 of rows.jsonl is without a 'behaviour'; it is left out",
        "behaviour 'lonely' has texts of label True only; it is left out",
    ]
    data = json.loads(Path("report.json").read_text())
    assert data["notes"][:2] == notes
    assert all(f"crossfade dynamics: warning: {note}\n" in err for note in notes)
    page = Path("report.html").read_text()
    assert all(note.split("'")[0] in page for note in notes)
    read_alone = dynamics.statistics(loaded(paths["base"]), tokenizer(paths["base"]), ROWS)
    expected = dynamics.report(read_alone)
    assert data["behaviours"] == expected.data["behaviours"]
    assert out == dynamics.Report(data).summary + "\n"
    even = read("even.jsonl")
    assert len(even) == len(ROWS) + 2
    assert all(row in read("rows.jsonl") for row in even)
    counts = Counter(row.get("behaviour") for row in even)
    assert all(counts[b["name"]] == b["balanced_rows"] for b in data["behaviours"])
    first = Path("even.jsonl").read_text()
    assert cli.main(argv) == 0
    assert Path("even.jsonl").read_text() == first
    assert cli.main([*argv, "--seed=1"]) == 0
    assert Path("even.jsonl").read_text() != first


def tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_pairs_with_another_tag_under_an_adapter(
    model: str, paths: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    lora(0, loaded(paths["base"]), "tuned").save_pretrained(".", save_embedding_layers=False)
    figures = []
    for name in (model, f"{model}@tuned"):
        argv = ["dynamics", "pairs.jsonl", name, *OUT, "--tag=kind", "--json=a.json"]
        assert cli.main([*argv, "--max-batch=3"]) == 0, capsys.readouterr().err
        figures.append(json.loads(Path("a.json").read_text()))
    plain, tuned = figures
    assert plain["kind"] == "pairs"
    assert {b["name"]: b["rows"] for b in plain["behaviours"]} == {"first": 4, "second": 4}
    assert plain["behaviours"][0]["accuracy_bound"] is None
    assert plain["behaviours"] != tuned["behaviours"]


def test_watches_are_compared(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"first": 0.1, "second": 0.2}
    seen = {
        **{"every": 1, "beta": 0.1, "kind": "statements", "head": "trained", "warnings": []},
        "behaviours": dict.fromkeys(rates, 2),
        "history": [
            {
                "step": i,
                "behaviours": {
                    n: {"loss": 0.7 - i * x, "growth": 10 * i * x, "growth_error": 0.1}
                    for n, x in rates.items()
                },
            }
            for i in (0, 1)
        ],
    }
    for name in ("a.json", "b.json"):
        Path(name).write_text(json.dumps(seen))
    assert cli.main(["dynamics", "rows.jsonl", model, *OUT, "--watch", "a.json", "b.json"]) == 0
    out = capsys.readouterr().out
    assert "In a.json, second was learnt first and first last" in out
    assert "In b.json, second was learnt first and first last" in out
    assert Path("report.html").read_text().count('class="watch"') == 2


def test_an_interrupt_writes_nothing(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossfade.dynamics.states import LastStates

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LastStates, "__call__", interrupted)
    assert cli.main(["dynamics", "rows.jsonl", model, *OUT, "--balanced=even.jsonl"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not Path("report.html").exists()
    assert not Path("even.jsonl").exists()


def one_sided() -> None:
    write("rows.jsonl", [row for row in ROWS if row["label"]])


def long() -> None:
    write("rows.jsonl", [{**row, "text": ""} for row in ROWS])


MISTAKES: dict[str, tuple[Callable[[], Any] | None, list[str], str]] = {
    "no file": (None, ["none.jsonl"], "there is no file 'none.jsonl'"),
    "no JSON": (
        lambda: Path("rows.jsonl").write_text('{"a": 1}\n{\n'),
        [],
        "rows.jsonl, line 2: not JSON",
    ),
    "a table": (None, ["rows.csv"], "rows.csv is a table; it must be a .jsonl file"),
    "texts": (
        lambda: Path("rows.txt").write_text("hello\n"),
        ["rows.txt"],
        "row 0 of rows.txt is a str; it must be a mapping",
    ),
    "nothing": (lambda: Path("rows.jsonl").write_text(""), [], "rows.jsonl is empty"),
    "no tag": (
        lambda: write("rows.jsonl", [{"behavior": "a", "text": "a", "label": True}]),
        [],
        "--tag is 'behaviour', which names no behaviour in rows.jsonl; its lines have behavior, "
        "text, label; did you mean 'behavior'?",
    ),
    "one side": (one_sided, [], "has no behaviour with texts of both labels, such as 'first'"),
    "all left out": (long, [], "rows.jsonl has no behaviour with texts of both labels"),
    "a label": (
        lambda: write("rows.jsonl", [*ROWS, {**ROWS[0], "label": "yes"}]),
        [],
        f"label of row {len(ROWS)} of rows.jsonl is 'yes'; it must be a bool (true or false",
    ),
    "both kinds": (
        lambda: write("rows.jsonl", [*ROWS, {**PAIRS[0], "behaviour": "first"}]),
        [],
        f"row {len(ROWS)} of rows.jsonl is a pair of responses, and the first is a statement",
    ),
    "no folder": (None, ["--output=none/a.html"], "--output is 'none/a.html': there is no folder"),
    "a folder": (None, ["--json=."], "--json is '.', a folder; it must be a file"),
    "the data": (None, ["--balanced=rows.jsonl"], "--balanced is 'rows.jsonl', as is DATA; they"),
    "twice": (None, ["--json=report.html"], "--json is 'report.html', as is --output; they must"),
    "no watch": (None, ["--watch=rows.jsonl"], "rows.jsonl"),
    "another JSON": (
        lambda: Path("a.json").write_text("{}"),
        ["--watch=a.json"],
        "'a.json' is not a watch of a training",
    ),
    "watch twice": (
        lambda: Path("a.json").write_text("{}"),
        ["--watch=a.json", "--watch=a.json"],
        "--watch has 'a.json' twice",
    ),
    "seed": (None, ["--seed=-1"], "--seed is -1"),
    "no model": (None, ["--model=/not/here"], "there is no folder '/not/here'"),
    "a reward model": (
        lambda: save_reward_model(Path("reward")),
        ["--model=reward"],
        "--model is 'reward', a reward model; it must be a language model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, argv, message = MISTAKES[mistake]
    if make is not None:
        make()
    data = [] if argv and not argv[0].startswith("-") else ["rows.jsonl"]
    before = {p.name for p in Path().iterdir()}
    assert cli.main(["dynamics", *data, model, *OUT, *argv]) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in Path().iterdir()} == before, "nothing is written"
