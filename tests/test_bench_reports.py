"""The reports: pages hold what bench/results/ says, and any Python can tell."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import tables
from reports import OURS, before, bulk, decode, exact, gpu, markdown, session, speed, trl_parity

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
RESULTS = (BENCH / "RESULTS.md").read_text(encoding="utf-8")


def test_pages_are_made_from_the_results_and_nothing_is_needed_for_it() -> None:
    """By a Python without any other package; of this project it imports the reports alone."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tables; tables.main(['--check']); "
        "files = {m: getattr(m, '__file__', '') for m in sys.modules.values()}; "
        "print(*[m for m, file in files.items() if sys.argv[2] in str(file)])"
    )
    command = [sys.executable, "-S", "-E", "-c", code, str(BENCH), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"<module '([\w.]+)'", done.stdout)
    assert "reports.speed" in names
    allowed = ("tables", "crossfade", "crossfade.lazy", "crossfade.bench", "crossfade.bench.report")
    assert {n for n in names if n.split(".")[0] != "reports"} <= {*allowed}


def test_every_result_is_on_a_page() -> None:
    used = {name for page in tables.PAGES.values() for _, names in page.values() for name in names}
    assert used == {path.stem for path in tables.RESULTS.glob("*.json")}
    pages = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in tables.PAGES)
    for picture in tables.RESULTS.glob("*.png"):
        assert f"results/{picture.name})" in pages


def test_the_contents_of_the_results_are_its_sections() -> None:
    head, *_ = RESULTS.split("\n## ")
    titles = re.findall(r"^## (.+)$", RESULTS, re.MULTILINE)
    anchors = [title.lower().replace(" ", "-") for title in titles]
    assert re.findall(r"\]\(#([\w-]+)\)", head) == anchors
    assert set(re.findall(r"\]\(#([\w-]+)\)", RESULTS)) == set(anchors)
    for title, section in zip(titles, RESULTS.split("\n## ")[1:], strict=True):
        assert "<!--" in section, f"{title}: the table"
        assert "\nWhat limits it: " in section, f"{title}: what limits it"


def test_a_page_that_is_not_what_the_results_say_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "figures", lambda name: {"name": name})
    section = tables.of(lambda one, other: f"{one['name']}, {other['name']}", "a", "b")
    monkeypatch.setattr(tables, "PAGES", {"page.md": {"x": section}})
    page = tmp_path / "page.md"
    page.write_text("before <!--x-->\nold\n<!--/x--> after")
    with pytest.raises(SystemExit, match=r"page\.md is not what bench/results/ says"):
        tables.main(["--check"])
    assert "old" in page.read_text()
    tables.main([])
    assert page.read_text() == "before <!--x-->\na, b\n<!--/x--> after"
    tables.main(["--check"])
    assert capsys.readouterr().out == "page.md is made anew\n"
    page.write_text("no section")
    with pytest.raises(SystemExit, match=r"page\.md has 0 sections 'x'; it must have one"):
        tables.main([])


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ({"device": "a CPU", "threads": 1}, "a CPU, 1 thread"),
        ({"device": "a CPU", "threads": 2, "isa": "avx2"}, "a CPU, 2 threads, avx2"),
        ({"device": "a GPU", "cuda": "13.0"}, "a GPU, CUDA 13.0"),
    ],
)
def test_a_machine_in_words(hardware: dict[str, Any], words: str) -> None:
    assert markdown.machine(hardware) == words


# ---- The table of speed --------------------------------------------------------------------------

CPU = {"device": "a CPU", "threads": 2}


def steps(flagged: bool, off: float = 0.5) -> dict[str, Any]:
    """A report of two batches; PEFT's mixed batch takes 3 times as long as we, then 2 times."""
    rows = [
        {"set": "LoRA guides", "contender": name, "batch": batch, "step_ms": ms, "steps_ms": [ms]}
        for batch, ours, theirs in ((1, 10.0, 30.0), (4, 20.0, 40.0))
        for name, ms in ((OURS, ours), ("PEFT mixed batch", theirs))
    ]
    peer = {"set": "LoRA guides", "contender": "PEFT mixed batch"}
    found = [
        {**peer, "batch": b, "over_greedy": 1.8, "known": 1.2, "off": off, "flagged": flagged}
        for b in (1, 4)
    ]
    models = {"LoRA guides": "a model"}
    return {"rows": rows, "baselines": found, "settings": {"models": models}, "machine": CPU}


def test_a_claim_of_steps_is_that_of_the_largest_batch() -> None:
    (claim,) = speed.of_steps(steps(flagged=False))
    what = "a token of a base and two LoRA guides, a model, batch 4"
    assert claim == [
        what,
        "20.0 ms",
        "PEFT's mixed batch: 40.0 ms",
        "2.0 to 3.0",
        "a CPU, 2 threads",
    ]
    assert [*speed.of_slow_peers(steps(flagged=False))] == []


def test_a_peer_that_was_slower_than_it_is_known_to_be_is_told() -> None:
    (claim,) = speed.of_steps(steps(flagged=True))
    assert claim[3] == "2.0 to 3.0 ‡"
    (note,) = speed.of_slow_peers(steps(flagged=True))
    assert note.endswith("by which it is 1.3 to 2.0 times.")
    (claim,) = speed.of_steps(steps(flagged=True, off=-0.5))
    assert claim[3] == "2.0 to 3.0", "one that was faster is no reason for a note"


def test_a_claim_of_searches_leaves_out_what_was_not_timed_in_full() -> None:
    rows = []
    for prompt, new, every, theirs in ((60, 50, 1, 40.0), (300, 50, 1, 80.0), (300, 256, 8, 990.0)):
        shape = {"width": 4, "samples": 4, "chunk_length": 5, "prompt": prompt, "new": new}
        for name, s in ((OURS, 10.0), (speed.search.OFFICIAL, theirs)):
            rows.append({"shape": shape, "contender": name, "seconds": s, "rounds_s": [s]})
        rows[-1]["scored_every"] = every
    (claim,) = speed.of_searches({"rows": rows, "settings": {"model": "m"}, "machine": CPU})
    assert "60 + 50 tokens" in claim[0]
    assert claim[1:4] == ["10.0 s", "the official algorithm: 40.0 s", "4.0 to 8.0"]


def test_a_claim_of_log_probs_is_against_the_fastest_that_can_do_the_same() -> None:
    report = copy.deepcopy(tables.figures("logp"))
    (row,) = report["rows"] = [r for r in report["rows"] if r["head"] == "frozen"]
    row["seconds"] |= {"ours": 2.0, "checkpoints": 3.0, "torch's chunks, mean alone": 0.1}
    row["seconds"] |= dict.fromkeys(["naive", "TRL's chunks"], 9.0)
    row["seconds"] |= {n: 4.0 for n in row["seconds"] if n.startswith("TRL's selective")}
    row["seconds"] |= {"torch's chunks of 256": 4.0}
    row["memory_mb"] |= {"ours": 10.0, "checkpoints": 500.0}
    (claim,) = speed.of_log_probs(report)
    assert claim[2] == "checkpoints: 3.00 s, 500 MB"
    assert claim[3] == "1.5, in 50 times less memory"


def test_a_claim_of_kernels_has_eight_rows() -> None:
    report = {"hardware": CPU, "results": []}
    for batch, dtype in ((1, "float32"), (8, "float32"), (8, "float16"), (32, "float32")):
        us = {"read": 1.0, "ours": 500.0, "torch chain": 9900.0 * batch}
        case = {"dtype": dtype, "batch": batch, "vocab": 5000, "setting": speed.SAMPLING, "us": us}
        report["results"] += [case, case | {"setting": "plain"}]
    (claim,) = speed.of_kernels(report, ["float32", "bfloat16"])
    assert claim[0].endswith("8 x 5,000, float32")
    assert claim[1:4] == ["500 µs", "torch and Hugging Face's processors: 79.2 ms", "158"]


# ---- Reports that have no test beside their bench ------------------------------------------------


def test_the_notes_of_steps_tell_of_a_peer_that_is_off() -> None:
    (note,) = decode.notes(steps(flagged=True) | {"rows": []})
    assert note.endswith(
        "1.2, 1.2 in an earlier measurement on two cores. Over a fifth off at batch 1, 4."
    )


def test_the_verdict_is_of_the_smallest_p_value() -> None:
    cases = {"plain, 7 tokens": [0.5, 0.04], "plain, 9 tokens": [0.3], "flat, 9 tokens": [0.02]}
    report: dict[str, Any] = {"backend": "native", "draws": 10, "level": 0.01, "machine": CPU}
    report |= {"versions": {"torch": "2"}, "command": "c"}
    report["cases"] = {n: {"p": {str(i): x for i, x in enumerate(p)}} for n, p in cases.items()}
    lines = exact.render(report).splitlines()
    assert lines[2:4] == ["| plain | 2 | 3 | 0.04 |", "| flat | 1 | 1 | 0.02 |"]
    assert "the smallest of 4 p-values is 0.02 (flat, 9 tokens: 0); the bound is 0.0025" in lines[5]
    assert exact.verdict(report)[1]
    report["cases"]["flat, 9 tokens"]["p"]["0"] = 0.002
    assert not exact.verdict(report)[1]


def test_refusals_are_counted_by_who_refuses() -> None:
    """And a case that is wrong is named."""
    right = {"loss": 1e-6, "metrics": 2e-6, "gradients": 3e-6, "ok": True}
    cases = {
        "sft: a": right,
        "sft: b": right | {"loss": 0.5, "ok": False},
        "sft: c": {"refused": {"ours": "E", "trl": "E"}, "ok": True},
        "dpo: d": {"refused": {"ours": "E", "trl": None}, "ok": True},
    }
    report = {"cases": cases, "limit": 1e-4, "machine": CPU, "versions": {}, "command": "c"}
    lines = trl_parity.render(report).splitlines()
    assert lines[2] == "| SFT | 2 | 5.0e-01 | 2.0e-06 | 3.0e-06 | 1 | 0 |"
    assert lines[3] == "| DPO | 0 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0 | 1 |"
    assert "sft: b is wrong" in lines[-1]


def test_what_was_not_timed_is_a_dash() -> None:
    """A call that has one length has no step, and of no pairs there is no ratio."""
    times = {"before_ms": 2.0, "after_ms": 3.0, "ratio": 1.5, "interval": [1.4, 1.6]}
    rows = [
        {"case": "search", "of": "call", "wall": times, "cpu": times},
        {"case": "one", "of": "call", "wall": times, "cpu": times},
        {"case": "one", "of": "step", "wall": {}, "cpu": {}},
    ]
    report = {"rows": rows, "before": "0" * 40, "after": "1" * 40, "machine": "m", "command": "c"}
    lines = before.render(report).splitlines()
    ratio = "1.50 (1.40 to 1.60)"
    assert lines[2] == f"| search | 2.00 | 3.00 | - | {ratio} | - | {ratio} |"
    assert lines[3] == f"| one | - | - | - | {ratio} | - | - |"


def test_growth_is_told() -> None:
    held = dict.fromkeys(session.HELD, 1000.0)
    report: dict[str, Any] = {"after two tenths": held, "at the end": held, "command": "c"}
    report |= {"left": 9, "requests": 10, "tokens": 5, "seconds": 1.0}
    assert "\nNothing grows. 9 of 10 requests ended" in session.render(report | {"grows": False})
    assert "\nWhat is held grows. 9 of" in session.render(report | {"grows": True})


def test_the_ends_of_stages() -> None:
    stage = {"seconds": 7, "summary": ["a", "b"]}
    codes = {"one": 0, "two": 124, "three": 3}
    lines = gpu.stages({n: stage | {"exit_code": c} for n, c in codes.items()}).splitlines()
    assert lines[2:] == [
        "| one | passed | 7 | a; b |",
        "| two | out of time | 7 | a; b |",
        "| three | exit code 3 | 7 | a; b |",
    ]


def test_prompts_that_differ_are_told() -> None:
    report = tables.figures("bulk") | {"prompts_equal": 990}
    assert "990 prompts got the same tokens" in bulk.render(report)
