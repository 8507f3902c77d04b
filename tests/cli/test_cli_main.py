"""The command line as a whole: the module, its usage and tracebacks."""

from __future__ import annotations

import io
import os
import runpy
import shlex
import sys
import warnings

import pytest
from crossfade import cli
from crossfade.cli import info
from crossfade.cli.main import COMMANDS, parser, share_cores


def test_the_module_runs_too(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["crossfade", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("crossfade", run_name="__main__")
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "usage", "error"),
    [
        ([], "crossfade [-h]", "the following arguments are required: COMMAND"),
        (["genrate", "a"], "crossfade [-h]", "'genrate' is none of demo, generate"),
        (["genrate", "a"], "crossfade [-h]", "did you mean 'generate'?"),
        (["--model=a", "generate"], "crossfade [-h]", "there is no option --model; see crossfade"),
        (
            ["generate", "a", "--temprature", "1"],
            "crossfade generate [PROMPT ...]",
            "there is no option --temprature; did you mean '--temperature'?\n",
        ),
        (
            ["generate", "--max-tokens=3"],
            "crossfade generate [PROMPT ...]",
            "there is no option --max-tokens; did you mean '--max-new-tokens'?\n",
        ),
        (["generate", "--dtype=flot32"], "crossfade generate", "did you mean 'float32'?\n"),
        (["generate", "--temperature=hot"], "crossfade generate", "argument --temperature: "),
        (["generate", "--batch-size=0"], "crossfade generate", "argument --batch-size: '0' must"),
        (["generate", "--chat", "--no-chat"], "crossfade generate", "--no-chat: not allowed with"),
        (["chat", "hello"], "crossfade chat", "'hello' is one argument too many"),
        (["score", "a.jsonl", "--greedy"], "crossfade score", "there is no option --greedy; see"),
        (["bench", "x"], "crossfade bench", "'x' is none of ops"),
    ],
)
def test_what_argparse_refuses_is_said_with_the_usage_of_the_command(
    argv: list[str], usage: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"usage: {usage}")
    assert error in err.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("command", ["", *(c.__name__.rpartition(".")[2] for c in COMMANDS)])
def test_help_is_complete_and_its_examples_are_read(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    examples = text.replace("\\\n", " ").splitlines()
    for line in (x for x in examples if x.startswith("  crossfade ")):
        argv = shlex.split(line.partition("<")[0])[1:]
        assert parser().parse_args(argv).command == argv[0]


def test_a_warning_is_a_line(
    paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        warnings.simplefilter("default")
        warnings.warn("half of it", RuntimeWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(info, "run", run)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "crossfade info: warning: half of it\n"


def test_closed_streams_lose_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        print("a result", flush=True)
        print(sys.stdout.encoding, file=sys.stderr)
        return 0

    monkeypatch.setattr(info, "run", run)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["info"]) == 0
    assert sys.stdout is None


def test_what_stdout_cannot_write_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        print("\N{SNOWMAN}", flush=True)
        return 0

    written = io.BytesIO()
    monkeypatch.setattr(info, "run", run)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["info"]) == 0
    assert written.getvalue() == b"\\u2603\n"


def test_a_traceback_is_shown_on_request(paths) -> None:
    with pytest.raises(ValueError, match="--blend is missing"):
        cli.main(
            ["inspect", "--traceback", *(f"--model={n}={paths[n]}" for n in ("base", "tuned"))]
        )


@pytest.mark.parametrize("loaded", [False, True])
def test_waiting_threads_sleep_unless_torch_has_started_them(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "modules", {"torch": None} if loaded else {})
    monkeypatch.setattr(os, "environ", {})
    share_cores()
    assert os.environ == ({} if loaded else {"OMP_WAIT_POLICY": "passive"})


def test_a_wait_policy_of_the_caller_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", {})
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    share_cores()
    assert os.environ == {"OMP_WAIT_POLICY": "active"}
