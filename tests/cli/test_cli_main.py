"""The command line as a whole: the module, its usage and tracebacks."""

from __future__ import annotations

import runpy
import sys

import pytest
from crossfade import cli


def test_the_module_runs_too(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["crossfade", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("crossfade", run_name="__main__")
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nope"], [], ["generate", "--batch-size=0"], ["bench", "x"]])
def test_argparse_refuses_what_it_does_not_know(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: crossfade" in capsys.readouterr().err


def test_a_traceback_is_shown_on_request(paths) -> None:
    with pytest.raises(ValueError, match="--blend is missing"):
        cli.main(
            ["inspect", "--traceback", *(f"--model={n}={paths[n]}" for n in ("base", "tuned"))]
        )
