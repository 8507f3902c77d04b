"""The sweep over families: some of every kind are run, and one that differs is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import families  # noqa: E402
from reports.families import render  # noqa: E402

ENGINE = ["llama", "gpt2", "gemma3_text", "mixtral"]
SIMPLE = ["bloom", "qwen3_next", "zamba2", "recurrent_gemma", "deepseek_v32", "git", "xlm"]


@pytest.mark.parametrize("name", ENGINE + SIMPLE)
def test_a_family_is_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "BATCHES", (3,))
    monkeypatch.setattr(families, "LENGTHS", (5, 1, 7))
    monkeypatch.setattr(families, "NEW", 6)
    record = families.try_family(name)
    assert record["path"] == ("engine" if name in ENGINE else "simple"), record
    assert record["equal"], record


def test_what_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cf.generate

    def shifted(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        out.logprobs.add_(0.01)
        return out

    monkeypatch.setattr(cf, "generate", shifted)
    record = families.try_family("llama")
    assert not record["equal"]
    assert record["wrong"][0] == "greedy tokens of 1: log-probs of row 0 are off by 0.01"


def test_the_table_says_what_was_found() -> None:
    found: list[dict[str, Any]] = [
        {"family": "a", "class": "A", "path": "engine", "equal": True},
        {"family": "b", "class": "B", "path": "simple", "equal": False, "wrong": ["scores: x"]},
        {"family": "c", "class": "C", "path": "not built", "why": "ValueError: a|b"},
    ]
    report = {"families": found, "versions": {"torch": "2", "transformers": "5"}, "command": "it"}
    head, _, _, _, *rows = render(report).splitlines()
    assert head.endswith("1 the engine, 1 the simple path, 1 not built; 1 unequal: b.")
    assert rows == [
        "| a | A | the engine | yes |  |",
        "| b | B | the simple path | **no** | scores: x |",
        r"| c | C | not built |  | ValueError: a\|b |",
    ]


def test_every_family_is_in_the_results() -> None:
    """The results have the families of the version of Transformers that made them."""
    import transformers

    report = json.loads((BENCH / "results" / "families.json").read_text())
    if report["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the results are of another version of Transformers")
    assert [r["family"] for r in report["families"]] == families.names()
