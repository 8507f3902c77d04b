"""README says what is true: its code runs, and its tables are what bench/results/ holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", README)


@pytest.mark.model
def test_python_blocks_run_one_after_the_other() -> None:
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "neutral + 0.8*happy - 0.8*bitter" in done.stdout


@pytest.mark.model
def test_command_lines_run() -> None:
    """All but the two that install and then run for minutes."""
    install, commands = blocks("bash")
    assert install.count("pip install -c constraints.txt") == 2
    for command in commands.strip().splitlines():
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


def test_tables_are_made_from_the_results() -> None:
    pytest.importorskip("trl")  # which Python 3.10 lacks
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
