"""Bars share no line with what is printed beside them on the same terminal."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty")  # Windows has none of these modules.
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

SCRIPT = """
import sys, time
from crossfade import progress
progress.DELAY = 0
with progress.progress_bar(3, "line", prints=True) as bar:
    bar.refresh()
    for i in range(3):
        progress.print_line(f"result {i}")
        progress.print_line(f"note {i}", sys.stderr)
        bar.update(1)
        bar.refresh()
"""


def on_terminal(*, piped: bool) -> tuple[list[str], str]:
    """What a terminal shows, line by line, and what a pipe from stdout gets."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    pipe = subprocess.PIPE if piped else side
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=pipe, stderr=side) as process:
        os.close(side)
        out = process.stdout.read().decode() if process.stdout is not None else ""
        shown = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # Linux says so that the other side is closed.
                break
            if not part:
                break
            shown += part
    os.close(main)
    lines = []
    for line in shown.decode().replace("\x1b[A", "").split("\n"):
        cells: list[str] = []
        for piece in line.rstrip("\r").split("\r"):  # which goes back to the start of the line
            cells[: len(piece)] = piece
        lines.append("".join(cells).rstrip())
    return lines, out


def test_lines_and_a_bar_on_a_terminal() -> None:
    lines, _ = on_terminal(piped=False)
    printed = [f"{what} {i}" for i in range(3) for what in ("result", "note")]
    assert [line for line in lines if line.startswith(("result", "note"))] == printed
    assert any("3/3" in line for line in lines)


def test_no_bar_beside_whoever_reads_the_pipe() -> None:
    lines, out = on_terminal(piped=True)
    assert out == "".join(f"result {i}\n" for i in range(3))
    assert [line for line in lines if line] == [f"note {i}" for i in range(3)]
