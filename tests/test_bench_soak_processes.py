"""bench/soak.py: its runs agree, go on where they stopped, and show what differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def soak(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "soak.py", "--start", "fork", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_soak(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    done = soak("--runs", 2, "--json", report)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert (counts["runs"], counts["wrong"], counts["died"]) == (2, 0, 0)
    said = json.loads(report.read_text())
    assert sorted(said["first"]) == ["1", "2"]
    said["first"]["1"]["score plain"][0] += 1e-3  # so that the fifth run, with one thread, differs
    said["first"]["1"]["select"][0] += 1
    said["runs"] = 4
    report.write_text(json.dumps(said))
    assert soak("--runs", 5, "--json", report).returncode == 1
    (wrong,) = json.loads(report.read_text())["wrong"]
    assert sorted(wrong["by"]) == ["score plain", "select"]
