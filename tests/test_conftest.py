"""The fixture of the small model: a test without it fails where all tests must have run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("required", "outcome"), [("1", "errors"), ("", "skipped")])
def test_without_the_small_model_tests_fail_only_where_it_is_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    from crossfade import models

    def get() -> Path:
        raise OSError("no network")

    monkeypatch.setattr(models, "get", get)
    monkeypatch.setenv("CROSSFADE_REQUIRE_MODEL", required)
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile("def test_model(smollm2_folder): pass")
    pytester.runpytest_inprocess().assert_outcomes(**{outcome: 1})
