"""The bench of the server, and the tables of what it reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import serving


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = serving.main(["--quick"])
    assert set(report["rates"]) == {*map(str, serving.RATES), "all at once"}
    assert all(of["tokens_per_s"] > 0 for of in report["rates"].values())
    assert "served, all at once" in capsys.readouterr().out
