"""Three saved models, the blend of them, and a way to run commands."""

from __future__ import annotations

import json
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from word_models import loaded, save_model


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {n: save_model(folder / n, seed) for seed, n in enumerate(["base", "tuned", "ref"])}


@pytest.fixture(scope="session")
def blend(paths: dict[str, str]) -> cf.Blend:
    """The blend that the options of `trio` ask for, made without the command line."""
    terms = {name: cf.Model(loaded(path), name=name) for name, path in paths.items()}
    return cf.parse("base + 0.8 * (tuned - ref)", **terms)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must succeed, and gives the JSON lines that it prints, or its text."""

    def call(*argv: str, lines: bool = True) -> Any:
        assert cli.main(list(argv)) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return [json.loads(line) for line in out.splitlines()] if lines else out

    return call
