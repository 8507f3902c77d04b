"""What an optional dependency that is missing, or broken, is said to be."""

from __future__ import annotations

import importlib

import pytest
from crossfade import extras


def test_a_missing_package_is_said_with_its_extra() -> None:
    with pytest.raises(ImportError, match=r'pip install "crossfade\[demo\]"'):
        extras.require("a_package_that_nobody_wrote", "demo")


def test_a_broken_package_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # the advice to install what is installed would send people in circles
    def broken(name: str) -> None:
        raise ImportError("no libfoo", name="libfoo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="no libfoo"):
        extras.require("json", "demo")
