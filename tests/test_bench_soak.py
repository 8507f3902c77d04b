"""The soak of calls: nothing grows over a few rounds, and what is made to grow is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import soak_calls

pytestmark = pytest.mark.filterwarnings("ignore")  # of rows that the soak has cut and refused


def test_nothing_grows_over_a_few_rounds() -> None:
    found = soak_calls.soak(seconds=0, least=3)
    assert found["rounds"] == 3
    early, late = found["after a tenth"], found["at the end"]
    assert late["tensors"] <= early["tensors"]
    assert late["objects"] <= early["objects"] + soak_calls.SLACK_OBJECTS


def test_what_grows_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    kept = []
    generate = cf.generate

    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(generate(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(cf, "generate", keeping)
    monkeypatch.setattr(soak_calls, "calls", _only("greedy", soak_calls.calls))
    assert soak_calls.main(["--minutes", "0", "--rounds", "3"]) == 1
    assert '"grows": true' in capsys.readouterr().out


def _only(kind: str, calls: Any) -> Any:
    return lambda: {kind: calls()[kind]}
