"""Imports run one way, in the order of layers of bench/house.py, and in no circle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import house

EDGES = house.imports(house.ROOT / "python" / "crossfade")


def test_modules_import_each_other_in_no_circle() -> None:
    assert house.circles(EDGES) == []


def test_folders_import_each_other_in_no_circle() -> None:
    assert house.circles(house.places(EDGES)) == []


def test_no_import_is_upward() -> None:
    assert house.upward(EDGES) == []


def test_every_place_in_the_order_is_there() -> None:
    found = {house.place_of(module) for module in EDGES if module}
    assert set(house.ORDER.split()) <= found


def test_no_two_files_beside_the_package_have_one_name() -> None:
    """Tests, measurements and the pages' tools import one another as modules of one process."""
    places = [*house.ROOT.glob("tests/**/*.py"), *house.ROOT.glob("bench/*.py")]
    places += [*house.ROOT.glob("bench/reproduce/*.py"), *house.ROOT.glob("docs/*.py")]
    names = [path.name for path in places if path.name != "conftest.py"]
    assert [name for name in set(names) if names.count(name) > 1] == []


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "crossfade" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "crossfade"


@pytest.mark.parametrize(
    "back",
    [
        "from crossfade.a import f",
        "import crossfade.a as a",
        "from .a import f",
        "from . import a",
        "def g():\n    from .a import f\n",
        "class C:\n    def g(self):\n        if True:\n            import crossfade.a\n",
        "try:\n    pass\nexcept ImportError:\n    from . import a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from . import a",
        "if not TYPE_CHECKING:\n    from . import a\n",
    ],
)
def test_a_circle_is_found_wherever_its_import_hides(tmp_path: Path, back: str) -> None:
    root = package(tmp_path, {"__init__.py": "", "a.py": "from . import b", "b.py": back})
    assert house.circles(house.imports(root)) == [["a", "b"]]


@pytest.mark.parametrize("name", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_an_import_for_type_checkers_alone_makes_none(tmp_path: Path, name: str) -> None:
    back = f"if {name}:\n    from .a import f\n    from . import a\n    import crossfade.a\n"
    root = package(tmp_path, {"__init__.py": "", "a.py": "from . import b", "b.py": back})
    assert list(house.imports(root).edges) == [("a", "b")]


def test_who_imports_a_module_imports_the_packages_around_it(tmp_path: Path) -> None:
    """A module inside a package does not: it runs after the package has begun."""
    files = {"__init__.py": "", "p/__init__.py": "", "p/x.py": "from . import y"}
    root = package(tmp_path, {**files, "p/y.py": "from .. import q", "q.py": "from .p.z import f"})
    (root / "p" / "z.py").write_text("")
    assert house.circles(house.imports(root)) == []
    (root / "p" / "__init__.py").write_text("from .x import f")  # q runs this when it imports p.z
    assert house.circles(house.imports(root)) == [["p", "p.x", "p.y", "q"]]


def test_folders_can_go_round_where_modules_do_not(tmp_path: Path) -> None:
    files = {"p/x.py": "from .. import q", "p/y.py": "", "q.py": "from .p import y"}
    edges = house.imports(package(tmp_path, files))
    assert house.circles(edges) == []
    assert house.circles(house.places(edges, "p\nq")) == [["p", "q"]]


def test_what_the_order_does_not_allow_is_named(tmp_path: Path) -> None:
    files = {"a.py": "", "b.py": "from . import a", "p/x.py": "from .. import b", "p/y.py": ""}
    files |= {"p/__init__.py": "", "c.py": "def f():\n    from .p import x\n"}
    edges = house.imports(package(tmp_path, files))
    assert house.upward(edges, "a\nb\np\nc") == []
    assert house.upward(edges, "a\nb\nc\np") == ["c imports p.x"]
    # Modules of one line must not import each other.
    assert house.upward(edges, "a b\np c") == ["b imports a", "c imports p.x"]
    # p.x has a line of its own, below the others.
    assert house.upward(edges, "a\nb\np\nc\np.x") == ["c imports p.x"]
    assert house.upward(edges, "a\nb\np") == ["c has no place"]
