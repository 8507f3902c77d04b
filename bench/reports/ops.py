"""`crossfade bench ops`: blending and sampling beside a read of the inputs and a chain of torch."""

from __future__ import annotations

from typing import Any

from crossfade.bench.report import table  # this module imports the standard library alone

from .markdown import machine, text


def render(report: dict[str, Any]) -> str:
    inputs = f"Inputs are {report['inputs']}. " if "inputs" in report else ""
    return text(
        [*table(report)],
        f"{machine(report['hardware'])}; three terms; torch {report['versions']['torch']}; "
        f"`{report['command']}`. {inputs}One eager call on tiny inputs takes "
        f"{report['eager_call_us']:.0f} µs.",
    )
