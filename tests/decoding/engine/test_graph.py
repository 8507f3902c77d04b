"""When a step is captured, replayed, captured anew or not at all; the CUDA graph is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from crossfade.decoding.engine.graph import WARM, Stepper


class Tape:
    """Stands in for a CUDA graph, and notes what is done with it."""

    played: list[str] = []  # noqa: RUF012

    def replay(self) -> None:
        self.played.append("replay")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextmanager
    def capture(graph: Any) -> Iterator[None]:
        Tape.played.append("capture")
        yield

    monkeypatch.setattr(Tape, "played", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return Tape.played


def test_a_step_is_captured_when_it_is_warm(played: list[str]) -> None:
    stepper = Stepper(capture=True)

    def step() -> list[torch.Tensor]:
        played.append("step")
        return []

    for _ in range(WARM + 3):
        stepper(step, False)
    # A step that is captured is recorded, and not carried out.
    assert played == ["step"] * WARM + ["capture", "step"] + ["replay"] * 3
    played.clear()
    stepper(step, True)  # The caches have moved.
    for _ in range(WARM + 1):
        stepper(step, False)
    assert played == ["step"] * WARM + ["capture", "step"] + ["replay"] * 2
    assert stepper.note is None


def test_a_step_that_cannot_be_captured(played: list[str]) -> None:
    stepper = Stepper(capture=True)
    calls = 0

    def step() -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if played:
            played.clear()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return []

    for _ in range(WARM + 3):
        stepper(step, False)
    assert calls == WARM + 4
    assert stepper.note == "no CUDA graph: operation not permitted when stream is capturing"


def test_without_capture(played: list[str]) -> None:
    stepper = Stepper(capture=False)
    for _ in range(WARM + 3):
        stepper(list, False)
    assert not played
