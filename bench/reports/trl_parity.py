"""Our trainers against TRL's own: the largest errors of losses, metrics and gradients."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text

ERRORS = ("loss", "metrics", "gradients")


def render(report: dict[str, Any]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in report["cases"].items():
        found.setdefault(name.split(": ")[0], []).append(case)
    rows = []
    for trainer, cases in found.items():
        compared = [c for c in cases if "refused" not in c]
        refused = [c["refused"] for c in cases if "refused" in c]
        worst = [f"{max((c[e] for c in compared), default=0.0):.1e}" for e in ERRORS]
        both = sum(None not in r.values() for r in refused)
        alone = sum(r["trl"] is None for r in refused)
        rows.append([trainer.upper(), f"{len(compared)}", *worst, f"{both}", f"{alone}"])
    titles = [f"largest error, {e}" for e in ERRORS]
    wrong = [name for name, case in report["cases"].items() if not case["ok"]]
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    return text(
        table(["trainer", "options compared", *titles, "refused by both", "by ours alone"], rows),
        f"Errors up to {report['limit']:g} are those of float32 sums in another order; "
        f"{', '.join(wrong) or 'none'} {'is' if len(wrong) < 2 else 'are'} wrong. {versions}; "
        f"{machine(report['machine'])}; `{report['command']}`.",
    )
