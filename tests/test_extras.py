"""An optional dependency that is missing or broken raises an error that says which it is."""

from __future__ import annotations

import importlib

import pytest
from crossfade import extras


def test_a_missing_package_is_said_with_its_extra() -> None:
    with pytest.raises(ImportError, match=r'pip install "crossfade\[demo\]"'):
        extras.require("a_package_that_nobody_wrote", "demo")


def test_a_broken_package_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To advise that it be installed would be wrong: it is."""

    def broken(name: str) -> None:
        raise ImportError("no libfoo", name="libfoo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="no libfoo"):
        extras.require("json", "demo")
