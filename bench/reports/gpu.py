"""What `gpu_check.sh` found on a GPU, stage by stage."""

from __future__ import annotations

from typing import Any

from . import decode, fork, ops
from .markdown import table


def kernels(report: dict[str, Any]) -> str:
    return ops.render(report["bench"]["figures"])


def steps(report: dict[str, Any]) -> str:
    return decode.render(report["steps"]["figures"])


def forks(report: dict[str, Any]) -> str:
    return fork.render(report["fork"]["figures"])


def stages(report: dict[str, Any]) -> str:
    """How each stage ended."""
    ends = {0: "passed", 124: "out of time"}
    rows = [
        [
            stage,
            ends.get(r["exit_code"], f"exit code {r['exit_code']}"),
            f"{r['seconds']}",
            "; ".join(r["summary"]),
        ]
        for stage, r in report.items()
    ]
    return "\n".join(table(["stage", "ended", "s", "what it said"], rows))
