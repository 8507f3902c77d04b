"""Settings that prompts have of their own, and what their results say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk.records import seed_of
from word_models import WORDS, trio

ROWS: list[dict[str, Any]] = [
    {"prompt": "a b c", "id": "first", "weights": {"w": 0}},
    {"prompt": "a b c", "metadata": {"x": [1]}, "weights": {"w": 2}, "max_new_tokens": 3},
    {"prompt": "d", "seed": 7, "temperature": 1.5, "topic": "t"},
    {"prompt": "d", "seed": 7, "temperature": 1.5},
    {"prompt": "e f"},
]
FADED = ["--blend", "base + w * (tuned - ref)", "--fader", "w=0.5", "--max-new-tokens", "6"]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def argv(paths: dict[str, str], tmp_path: Path) -> list[str]:
    models = trio(paths)[:3]
    return ["generate", "--prompts", write(tmp_path, ROWS), *models, *FADED, "--keep", "topic"]


def test_each_line_is_decoded_as_it_says(argv, blend, run) -> None:
    found = run(*argv)
    terms = dict(zip(blend.names, blend.terms, strict=True))
    for i, (row, record) in enumerate(zip(ROWS, found, strict=True)):
        w = row.get("weights", {"w": 0.5})["w"]
        drawn = "temperature" in row
        out = cf.generate(
            cf.parse("base + w * (tuned - ref)", **terms, w=w),
            [[WORDS.index(word) for word in row["prompt"].split()]],
            max_new_tokens=row.get("max_new_tokens", 6),
            do_sample=drawn,
            seed=[row.get("seed", seed_of(0, i))],
            **({"temperature": row["temperature"]} if drawn else {}),
        )
        assert record["tokens"] == int(out.lengths[0])
        assert record["logprob"] == pytest.approx(float(out.logprobs.sum()), rel=1e-4)
        assert record["blend"] == str(cf.parse("base + w * (tuned - ref)", **terms, w=w))
        for key in ("id", "metadata", "topic"):
            assert record.get(key) == row.get(key)
        settings = {k: x for k, x in row.items() if k not in ("prompt", "id", "metadata", "topic")}
        assert record.get("settings", {}) == settings
    assert found[2]["text"] == found[3]["text"], "a line's own seed does not depend on its place"
    again = run(*argv, "--batch-size", "2")
    assert [r["text"] for r in again] == [r["text"] for r in found]


def test_resume_knows_the_settings_of_lines(
    argv, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    argv += ["--output", str(out)]
    run(*argv)
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0] + whole[2] + whole[1][:90])
    more = [*ROWS, {"prompt": "g", "weights": {"w": 1}}]
    write(tmp_path, more)
    run(*argv, "--resume")  # A line that is new does not make another run of the others.
    again = sorted(map(json.loads, out.read_text().splitlines()), key=lambda r: r["index"])
    assert [r["text"] for r in again[:5]] == [json.loads(line)["text"] for line in whole]
    assert len(again) == 6
    for change in ({"weights": {"w": 3}}, {"id": "second"}, {"max_new_tokens": 2}):
        write(tmp_path, [{**ROWS[0], **change}, *more[1:]])
        assert cli.main([*argv, "--resume"]) == 2
        assert "not what prompt 0 has of its own" in capsys.readouterr().err
    write(tmp_path, more)
    assert cli.main([*argv, "--resume", "--fader", "w=0.6"]) == 2
    assert "the name w is given twice" in capsys.readouterr().err
    argv[argv.index("w=0.5")] = "w=0.6"
    assert cli.main([*argv, "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([{"weights": {"v": 1}}], [], "prompt 0: weights has 'v'; the faders are w"),
        ([{"weights": {"base": 1}}], [], "prompt 0: weights has 'base'; the faders are w"),
        ([{"temperature": 1}], ["--greedy"], '--greedy is given, and prompt 0 has a "temperature"'),
        ([{"system": "x"}], ["--no-chat"], '--no-chat is given, and prompt 0 has a "system"'),
        (
            [{"weights": {"w": 1}}],
            ["--best-of=2", "--value=w * (tuned - ref)"],
            "prompt 0: weights has 'w', which --value uses",
        ),
    ],
)
def test_lines_that_contradict_the_options(
    paths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    options: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr("crossfade.loading.Plan.load", None)  # It is said before models are loaded.
    file = write(tmp_path, [{"prompt": "a", **row} for row in rows])
    assert cli.main(["generate", "--prompts", file, *trio(paths)[:3], *FADED, *options]) == 2
    assert problem in capsys.readouterr().err


def test_a_fader_that_only_lines_set(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "weights": {"w": w}} for w in (0.5, 1)]
    common = ["generate", *trio(paths)[:3], *FADED[:2], "--prompts"]
    found = run(*common, write(tmp_path, rows))
    assert [r["blend"] for r in found] == [
        "base + 0.5*tuned - 0.5*ref",
        "base + tuned - ref",
    ]
    assert cli.main([*common, write(tmp_path, [*rows, {"prompt": "a"}])]) == 2
    assert "--blend has the unknown name 'w'" in capsys.readouterr().err


def test_score_takes_weights_of_lines(paths, blend, run, tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "response": "c d", "weights": {"w": w}, "id": w} for w in (0, 2, 1)]
    file = write(tmp_path, [*rows, {"prompt": "a b", "response": "c d"}])
    found = run("score", file, *trio(paths)[:3], *FADED[:4], "--batch-size", "2")
    terms = dict(zip(blend.names, blend.terms, strict=True))
    ids = [[[WORDS.index(word)] for word in text.split()] for text in ("a b", "c d")]
    pair = [[[i for (i,) in part]] for part in ids]
    for record, w in zip(found, (0, 2, 1, 0.5), strict=True):
        faded = cf.parse("base + w * (tuned - ref)", **terms, w=w)
        assert record["logprob"] == pytest.approx(float(cf.score(faded, *pair).totals[0]), rel=1e-4)
        assert record.get("id") == (None if w == 0.5 else w)
