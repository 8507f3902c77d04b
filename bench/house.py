"""The shape of the source in figures: files, lines, circles of imports, floors and twins.

An import inside a function counts, one for type checkers alone does not. `--tree` measures another
checkout, such as an older commit in a git worktree.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
from reports.house import trees

ROOT = Path(__file__).parent.parent
TYPES_ALONE = ("TYPE_CHECKING", "typing.TYPE_CHECKING")

# What may import what, lowest first. A name is a module, or a folder with all that is in it and
# has no line of its own. It may import what stands in a line above its own, and nothing else but
# itself: names of one line do not import each other.
ORDER = """
checks elsewhere
extras lazy progress reading files identity
ops
metrics losses
models
blends
search drafts
presets
formula rewards specs
loading
decoding.forms decoding.memory decoding.streaming decoding.stats
decoding.chats
decoding.output decoding.inputs
decoding.writing decoding.ends decoding.members decoding.runner
decoding.job
decoding.settings
decoding.each
decoding.simple
decoding.ranks
decoding.engine
decoding.mixer
decoding.rows
decoding.speculation
decoding.watch decoding.strays decoding.places
decoding.drawing decoding.news
decoding.loop
decoding.search
decoding.classifiers
decoding.building decoding.figures
decoding.driver
decoding.call decoding.results
decoding.generation decoding.hook decoding.scoring
decoding.session
decoding
bulk
integrations training
policies
bulk.ray
pareto dynamics
training.clp training.stages
training.makers
training.run
serve
bench
cli
__main__
"""

# Modules of older trees, and where what they hold is today.
FORMER = """
algebra blend printing saving terms values vocabulary weights: blends
blends.formula: formula
decoding.adapters decoding.contexts decoding.own_loop decoding.replica: decoding.simple
decoding.simple_runner decoding.structure decoding.term_model: decoding.simple
decoding.contract decoding.deltas decoding.engine_runner: decoding.engine
decoding.fingerprint decoding.graph decoding.group decoding.guides: decoding.engine
decoding.head decoding.kv_cache decoding.modules decoding.prefix: decoding.engine
decoding.batching decoding.lazy decoding.plan decoding.prefill: decoding.engine
decoding.readers decoding.search_loop decoding.valuer: decoding.search
batch records: bulk
adapters hf saved_models small_model decoding.after_head: models
demo info: cli
"""

PARTS = {
    "package": ("python/crossfade", (".py",)),
    "Triton": ("kernels", (".py",)),
    "C++ and CUDA": ("csrc", (".h", ".cpp", ".cu", ".cuh")),
    "tests": ("tests", (".py", ".h", ".cpp")),
    "bench": ("bench", (".py", ".h", ".cpp", ".sh")),
}


def modules(package: Path) -> dict[str, Path]:
    """The file of each module in a package's folder, by its dotted name within the package."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).with_suffix("")
        if place.parts[0] != "kernels":  # Triton's, which an installation puts there
            files[".".join(part for part in place.parts if part != "__init__")] = path
    return files


def imports(package: Path) -> nx.DiGraph:
    """The modules of a package, with an edge from each to those that it imports.

    To import ``a.b.c`` also runs ``a`` and ``a.b``, so these count as imported too, except by
    modules inside of them, which run after they have begun. An edge's `line` is where it stands.
    """
    files = modules(package)
    edges = nx.DiGraph()
    edges.add_nodes_from(files)
    for name, path in files.items():
        own = name.split(".") if name else []
        home = own if path.name == "__init__.py" else own[:-1]
        around = {".".join(own[:n]) for n in range(len(own))}
        for statement in _statements(ast.parse(path.read_bytes())):
            for full in _names(statement, [package.name, *home]):
                first, *rest = full.split(".")
                if first != package.name or rest[:1] in (["kernels"], ["_native"]):
                    continue  # another package, or no Python of this one
                found = [p for n in range(len(rest)) if (p := ".".join(rest[: n + 1])) in files]
                asked = found[-1] if found else ""  # the package itself
                for other in {asked, *found} - {name}:
                    if other == asked or other not in around:
                        edges.add_edge(name, other, line=statement.lineno)
    return edges


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in a piece of code that run."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) in TYPES_ALONE:
        children = iter(node.orelse)
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _statements(child)


def _names(statement: ast.Import | ast.ImportFrom, home: Sequence[str]) -> Iterator[str]:
    """The dotted names that a statement in a module of the package `home` asks for."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    above = home[: len(home) + 1 - statement.level] if statement.level else []
    start = [*above, *([statement.module] if statement.module else [])]
    yield from (".".join([*start, alias.name]) for alias in statement.names)


def circles(edges: nx.DiGraph) -> list[list[str]]:
    """The sets of modules (or places) each of which imports all others of its set, in the end."""
    found = nx.strongly_connected_components(edges)
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def place_of(module: str, order: str = ORDER) -> str | None:
    """The name in `order` that a module comes under: the longest that begins its own."""
    known = set(order.split())
    for line in FORMER.strip().splitlines():
        olds, _, now = line.partition(": ")
        if module in olds.split() and module not in known:
            module = now
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def places(edges: nx.DiGraph, order: str = ORDER) -> nx.DiGraph:
    """The names of `order`, with an edge where a module under one imports one under another."""
    found = nx.DiGraph()
    for a, b in edges.edges:
        pair = place_of(a, order), place_of(b, order)
        if a and b and None not in pair and pair[0] != pair[1]:
            found.add_edge(*pair)
    return found


def upward(edges: nx.DiGraph, order: str = ORDER) -> list[str]:
    """The imports that `order` does not allow, and modules that have no place in it."""
    floor = {name: n for n, line in enumerate(order.split("\n")) for name in line.split()}
    wrong = [f"{m} has no place" for m in edges if m and place_of(m, order) is None]
    for a, b in edges.edges:
        above, below = place_of(a, order), place_of(b, order)
        if a and b and above and below and above != below and floor[above] <= floor[below]:
            wrong.append(f"{a} imports {b}")
    # A package is not named where a module in it is.
    return sorted(w for w in wrong if not any(other.startswith(f"{w}.") for other in wrong))


def longest_path(edges: nx.DiGraph, folder: str) -> list[str]:
    """The longest chain of modules under `folder` in which each imports the next.

    Those of a circle count as one.
    """
    inside = [m for m in edges if m == folder or m.startswith(f"{folder}.")]
    whole = nx.condensation(edges.subgraph(inside))
    chain = nx.dag_longest_path(whole, weight=None, default_weight=1)
    return [" = ".join(sorted(whole.nodes[n]["members"])) for n in chain]


def source_files(tree: Path) -> dict[str, list[Path]]:
    """The source files of each part that git knows."""
    names = _git(tree, "ls-files").splitlines()
    return {
        part: [tree / n for n in names if n.startswith(f"{folder}/") and n.endswith(ends)]
        for part, (folder, ends) in PARTS.items()
    }


def _git(tree: Path, *command: str) -> str:
    return subprocess.check_output(["git", "-C", str(tree), *command], text=True)


def size(files: Sequence[Path], tree: Path) -> dict[str, Any]:
    lines = {path: len(path.read_bytes().splitlines()) for path in files}
    longest = max(lines, key=lambda path: lines[path])
    return {
        "files": len(files),
        "folders": len({path.parent for path in files}),
        "lines": sum(lines.values()),
        "longest": {"file": str(longest.relative_to(tree)), "lines": lines[longest]},
        "over_400": sum(n > 400 for n in lines.values()),
    }


def twins(files: Sequence[Path], tree: Path) -> list[list[str]]:
    """Pairs of places with six or more lines in common, but for comments, docstrings and imports.

    Needs pylint, whose tool for this it asks.
    """
    if importlib.util.find_spec("pylint") is None:
        raise SystemExit("pylint, which finds what stands twice, is not installed; it is in .[dev]")
    found = []
    for python in (True, False):
        names = [str(f.relative_to(tree)) for f in files if (f.suffix == ".py") == python]
        skip = ["--ignore-comments", "--ignore-docstrings", "--ignore-imports"] if python else []
        command = [sys.executable, "-m", "pylint.checkers.symilar", "-d", "6", *skip, *names]
        text = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
        for block in re.split(r"(?m)^\d+ similar lines in \d+ files$", text)[1:]:
            alike = re.findall(r"(?m)^==(.+):\[(\d+):(\d+)\]$", block)
            at = [f"{name}:{int(first) + 1}-{last}" for name, first, last in alike]
            found += [[a, b] for i, a in enumerate(at) for b in at[i + 1 :]]
    return found


def measure(tree: Path) -> dict[str, Any]:
    files = source_files(tree)
    edges = imports(tree / "python" / "crossfade")
    return {
        "commit": _git(tree, "rev-parse", "--short", "HEAD").strip(),
        "sizes": {part: size(paths, tree) for part, paths in files.items()},
        "circles": {"modules": circles(edges), "places": circles(places(edges))},
        "upward": upward(edges),
        "longest_path_in_decoding": longest_path(edges, "decoding"),
        "twins": twins([path for paths in files.values() for path in paths], tree),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--json", type=Path, help="the file that all figures are written to")
    args = parser.parse_args()
    report = measure(args.tree.resolve())
    print(trees({"figure": report}))
    for name in ("upward", "twins"):
        print(
            f"\n{name}:",
            *([" and ".join([x] if isinstance(x, str) else x) for x in report[name]]),
            sep="\n  ",
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
