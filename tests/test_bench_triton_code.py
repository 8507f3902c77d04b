"""The bench that counts Triton's machine code: what it counts, on a few lines of such code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import triton_code

# Where the first jump is taken, a load and a multiplication are passed over.
SASS = """
\tS2R R0, SR_TID.X
\t@P0 BRA LBB1
\tLDG.E.128 R4, desc[UR4][R2.64]
\tFMUL R4, R4, R5
LBB0:
\tMUFU.EX2 R6, R4
\tSTG.E desc[UR4][R2.64], R6
\tEXIT
LBB1:
\tFADD R4, R4, R5
\tBRA LBB0
"""


def test_the_way_with_the_most_loads() -> None:
    code, jumps = triton_code.instructions(SASS)
    assert len(code) == 9
    assert jumps == {1: 7, 8: 4}
    assert triton_code.program(code, jumps) == code[:7]


def test_the_shortest_of_ways_with_equally_many_loads() -> None:
    code, jumps = triton_code.instructions(SASS.replace("LDG.E.128", "LDS"))
    code.insert(2, "NOP")
    jumps = {1: 8, 9: 5}
    assert triton_code.program(code, jumps) == [*code[:2], *code[8:], *code[5:8]]


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    """16 bytes of one load, and one special instruction, of nine for two tokens."""
    code, _ = triton_code.instructions(SASS)
    triton_code.report("name", code, 2)
    assert capsys.readouterr().out.split(maxsplit=1)[1] == (
        "4.5 instructions a token,  0.5 of them special,  8.0 bytes read\n"
    )
