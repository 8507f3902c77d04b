"""`import crossfade` is cheap, and everything it names is there, and nothing else."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import crossfade as cf
import pytest

# Packages whose names are imported at their first use, and others that list their names too.
LAZY = [
    *("crossfade", "crossfade.dynamics", "crossfade.models", "crossfade.pareto"),
    "crossfade.training",
]
PACKAGES = [*LAZY, "crossfade.decoding", "crossfade.losses", "crossfade.presets"]


def test_import_waits_for_nothing_heavy() -> None:
    """Else the help of the command line would take seconds, for torch and transformers."""
    check = (
        "import sys; before = set(sys.modules); import crossfade.cli, crossfade.training\n"
        "heavy = {'torch', 'transformers', 'yaml', 'tqdm', 'dataclasses', 'importlib.metadata'}\n"
        "assert not heavy & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_there_and_no_others_are_shown(name: str) -> None:
    package = importlib.import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None
    assert set(dir(package)) - {"__version__"} == set(package.__all__)
    assert not [x for x in package.__all__ if x.startswith("_")]


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert cf.__version__ == version("crossfade")
    assert "__version__" in dir(cf)
    with pytest.raises(AttributeError, match="has no attribute 'beam_search'"):
        _ = cf.beam_search


@pytest.mark.parametrize("name", LAZY)
def test_type_checkers_see_the_names_that_are_imported_at_their_first_use(name: str) -> None:
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    seen = {
        alias.asname: statement.module and "." * (statement.level - 1) + statement.module
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert {x: home for x, home in seen.items() if home is not None} == package._HOME
    assert set(seen) == set(package.__all__)


def test_presets_are_all_functions_that_their_module_offers() -> None:
    defined = {
        name
        for name, x in vars(cf.presets).items()
        if getattr(x, "__module__", None) == cf.presets.__name__ and not name.startswith("_")
    }
    assert set(cf.presets.__all__) == defined
