"""The harness adapter against the harness's own HFLM, over the same model."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{case['requests']}",
            f"{case['seconds']['HFLM']:.1f}",
            f"{case['seconds']['CrossfadeLM']:.1f}",
            f"{case['ratio']:.2f} ({min(case['ratios']):.2f} to {max(case['ratios']):.2f})",
        ]
        for name, case in report["cases"].items()
    ]
    return text(
        table(["requests of", "requests", "HFLM, s", "ours, s", "HFLM / ours (all rounds)"], rows),
        f"{report['model']}, float32, batches of {report['batch_size']}, {report['rounds']} rounds "
        f"in turns; lm-eval {report['lm_eval']}; {machine(report['hardware'])}; "
        f"`{report['command']}`.",
    )
