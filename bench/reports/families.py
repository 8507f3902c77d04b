"""Which way a tiny model of every causal-LM class runs, and whether it decodes as it should."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .markdown import table

PATHS = {
    "engine": "the engine",
    "simple": "the simple path",
    "refused": "refused",
    "error": "an error",
    "generate itself cannot": "`generate` itself cannot",
    "not built": "not built",
}


def render(report: dict[str, Any]) -> str:
    """The table of docs/families.md."""
    found = report["families"]
    rows = []
    for r in found:
        equal = {True: "yes", False: "**no**", None: ""}[r.get("equal")]
        why = "; ".join(r.get("wrong", [r.get("why", "")])).replace("|", "\\|")
        why = why.replace("model0", "it").removeprefix("it ").removeprefix("it: ")
        rows.append([r["family"], r["class"], PATHS[r["path"]], equal, why])
    return "\n".join(
        [totals(report), "", *table(["family", "class", "runs on", "equal", "why"], rows)]
    )


def totals(report: dict[str, Any]) -> str:
    """How many families there are of each kind."""
    found, versions = report["families"], report["versions"]
    wrong = [r["family"] for r in found if not r.get("equal", True)]
    counts = Counter(PATHS[r["path"]] for r in found)
    return (
        f"{len(found)} families and variants, Transformers {versions['transformers']}, torch "
        f"{versions['torch']}, `{report['command']}`: "
        + ", ".join(f"{n} {path}" for path, n in counts.most_common())
        + f"; {len(wrong) or 'none'} unequal{': ' if wrong else ''}{', '.join(wrong)}."
    )
