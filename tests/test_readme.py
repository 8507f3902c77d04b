"""README says what is true: its code runs. Its table is looked at with those of the benches."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from crossfade import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", README)


@pytest.mark.model
@pytest.mark.filterwarnings("default")  # other packages warn, as they do for a reader
def test_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("python"))
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "neutral + 0.8*happy - 0.8*bitter" in capsys.readouterr().out


@pytest.mark.model
@pytest.mark.filterwarnings("default")
def test_command_lines_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is run, but for the two that install and then take minutes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    install, commands = blocks("bash")
    assert install.count("pip install -c constraints.txt") == 2
    for command in commands.strip().splitlines():
        program, *arguments = shlex.split(command)
        assert program == "crossfade"
        assert cli.main(arguments) == 0, command
        assert capsys.readouterr().out.strip(), command
