"""An optional dependency that is missing or broken raises an error that says which it is."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import crossfade
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


def test_a_package_for_a_later_python_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra would not bring it, so that the advice to install the extra would not help."""
    monkeypatch.setitem(extras.NEEDS, "a_package_that_nobody_wrote", (3, 99))
    with pytest.raises(ImportError, match=r"; it needs Python 3\.99, and this is 3"):
        extras.require("a_package_that_nobody_wrote.inside", "train")


# ---- What pyproject.toml says -------------------------------------------------------------------

PACKAGE = Path(crossfade.__file__).parent
NAMES = {"yaml": "pyyaml", "vaderSentiment": "vadersentiment"}  # where a module's is not its own


def brought() -> dict[str, set[str]]:
    """The packages that each extra names, its own extras' included; those of none under ""."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}

    def of(name: str) -> set[str]:
        found: set[str] = set()
        for said in listed[name]:
            own = re.match(r"crossfade\[(.*)\]", said)
            for extra in own[1].split(",") if own else ():
                found |= of(extra)
            found |= set() if own else {re.split(r"[^\w-]", said)[0].lower()}
        return found

    return {name: of(name) for name in listed}


def package_of(module: str) -> str:
    top = module.split(".")[0]
    return NAMES.get(top, top).replace("_", "-").lower()


def required() -> Iterator[tuple[str, str, str]]:
    """Each ``require(module, extra)`` of the package, and where it stands."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                module, extra = (ast.literal_eval(x) for x in node.args)
                yield str(path.relative_to(PACKAGE)), module, extra


def test_extras_bring_what_is_required_of_them() -> None:
    found, asked = brought(), list(required())
    assert len(asked) > 20
    for place, module, extra in asked:
        assert package_of(module) in found[extra], f"{place}: {module} is not in {extra}"


def test_extras_bring_what_their_examples_need() -> None:
    """README trains guides for SmolLM2, on VADER's scores, as adapters; the demo plots them."""
    found = brought()
    assert found["train"] >= found["smollm2"] | found["metrics"] | found["adapters"]
    assert found["demo"] >= found["smollm2"] | found["metrics"] | found["adapters"] | found["plot"]
    assert found["train"] >= {"trl", "datasets", "accelerate"}


def test_what_every_module_imports_is_a_dependency() -> None:
    """An import at the top of a module, of another package, is of one that is always installed."""
    found = brought()[""]
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in ("kernels", "bench", "integrations", "serve"):
            continue  # an extra brings what an integration or the server imports
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] not in {*sys.stdlib_module_names, "crossfade"}:
                    assert package_of(name) in found, f"{place} imports {name}"
