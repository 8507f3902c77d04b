"""``--output`` and ``--resume``: a file is completed, locked, and whole after an interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crossfade import cli, progress
from crossfade.bulk import records
from crossfade.decoding.engine.group import Group
from word_models import PROMPTS, save_model, trio


def test_resume_keeps_lines_and_writes_the_missing(paths, run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    argv = ["generate", *PROMPTS, *trio(paths), "--sample", "--max-new-tokens", "5"]
    run(*argv, "--output", str(file), "--batch-size", "3")
    whole = file.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    # a file in another order, whose third line was cut by a crash
    lines = whole.splitlines(keepends=True)
    file.write_text(lines[3] + lines[0] + lines[1][:40])
    run(*argv, "--output", str(file), "--resume")
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["index"] for r in again] == [3, 0, 1, 2]
    assert {r["index"]: r["text"] for r in again} == {r["index"]: r["text"] for r in records}
    run(*argv, "--output", str(file), "--resume")
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", ["--seed=1", "--top-k=3", "--system=base=x", "--blend=base"])
def test_resume_refuses_to_mix_two_runs(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    argv = ["generate", "a", f"--model=base={paths['base']}", "--chat", "--sample"]
    argv += ["--max-new-tokens=2", f"--output={tmp_path / 'out.jsonl'}"]
    run(*argv, "--blend=2 * base")
    assert cli.main([*argv, "--resume", "--blend=2 * base", change]) == 2
    assert "other settings" in capsys.readouterr().err


def test_resume_refuses_another_value_of_the_same_name(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "a", f"--model=base={paths['base']}", f"--model=ref={paths['ref']}"]
    argv += ["--blend=base", "--value=tuned - ref", "--best-of=2", "--max-new-tokens=2"]
    argv += [f"--output={tmp_path / 'out.jsonl'}"]
    other = save_model(tmp_path / "other", 7)
    run(*argv, f"--model=tuned={paths['tuned']}")
    run(*argv, f"--model=tuned={paths['tuned']}", "--resume")
    assert cli.main([*argv, f"--model=tuned={other}", "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_second_run_on_a_file_is_refused_before_models_are_loaded(
    paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossfade.loading.Plan.load", None)
    file = tmp_path / "out.jsonl"
    argv = ["generate", "a", f"--model={paths['base']}", f"--output={file}", "--resume"]
    with records.Results(file):
        assert cli.main(argv) == 2
    assert "is being written by another run" in capsys.readouterr().err


def test_an_interrupt_in_the_middle_keeps_the_rows_that_ended(
    paths, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ended, bar = Group.step, 0, progress.progress_bar(0, "prompt")

    def update(rows: int) -> None:
        nonlocal ended
        ended += rows

    def interrupted(self: Group, *args: Any) -> Any:
        if ended:
            raise KeyboardInterrupt
        return step(self, *args)

    file = tmp_path / "out.jsonl"
    argv = ["generate", *PROMPTS, *trio(paths), "--greedy", "--batch-size", "2"]
    argv += ["--max-new-tokens", "2", "--output", str(file)]
    with monkeypatch.context() as patch:
        patch.setattr(Group, "step", interrupted)
        patch.setattr(bar, "update", update)
        patch.setattr(progress, "progress_bar", lambda *_, **__: bar)
        assert cli.main(argv) == 130
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1]
    run(*argv, "--resume")
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["index"] for r in whole] == [0, 1, 2, 3]
    assert all(r["tokens"] for r in whole)
