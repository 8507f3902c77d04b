"""Draws against the probabilities that they should have."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in report["cases"].items():
        found.setdefault(name.split(", ")[0], []).append(case)
    rows = []
    for kind, cases in found.items():
        p = [x for case in cases for x in case["p"].values()]
        rows.append([kind, f"{len(cases)}", f"{len(p)}", f"{min(p):.2g}"])
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    return text(
        table(["draws", "cases", "p-values", "the smallest"], rows),
        f"{verdict(report)[0]}.",
        f"{machine(report['machine'])}; {versions}; `{report['command']}`.",
    )


def verdict(report: dict[str, Any]) -> tuple[str, bool]:
    """One line on the smallest p-value, and whether it is as large as it should be."""
    p = {(n, name): x for n, case in report["cases"].items() for name, x in case["p"].items()}
    (case, name), smallest = min(p.items(), key=lambda item: item[1])
    bound = report["level"] / len(p)
    return (
        f"{report['backend']}, {report['draws']:,} draws a case: the smallest of {len(p)} p-values "
        f"is {smallest:.2g} ({case}: {name}); the bound is {bound:.2g}",
        smallest >= bound,
    )
