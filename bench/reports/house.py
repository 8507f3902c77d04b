"""The shape of the source in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import table


def render(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The figures of the trees before and after the files were moved."""
    return trees({f"before ({before['commit']})": before, "after": after})


def trees(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of one tree a column."""
    rows: dict[str, list[str]] = {}
    for r in reports.values():
        figures = {
            "files": f"{sum(s['files'] for s in r['sizes'].values())}",
            "folders": f"{sum(s['folders'] for s in r['sizes'].values())}",
            "lines": f"{sum(s['lines'] for s in r['sizes'].values()):,}",
            **{
                f"longest file, {part}": f"{s['longest']['lines']} lines"
                for part, s in r["sizes"].items()
            },
            "files of more than 400 lines": f"{sum(s['over_400'] for s in r['sizes'].values())}",
            "circles of modules": f"{len(r['circles']['modules'])}",
            "circles of folders and files": f"{len(r['circles']['places'])}",
            "imports upward or sideways": f"{len(r['upward'])}",
            "modules in the longest chain of `decoding`": f"{len(r['longest_path_in_decoding'])}",
            "pairs of places with six lines in common": f"{len(r['twins'])}",
        }
        for name, figure in figures.items():
            rows.setdefault(name, []).append(figure)
    return "\n".join(table(["", *reports], [[name, *row] for name, row in rows.items()]))
