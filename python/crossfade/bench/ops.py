"""`crossfade bench ops`: how long it takes to blend logits and to sample the result.

The contenders of a case take turns, round by round, so that their ratios hold on a noisy machine,
and read inputs that are larger than the caches. On a GPU each contender is a CUDA graph that is
replayed, so that its time is the device's, without the launches.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import ops
from .contenders import SETTINGS, WEIGHTS, Case, contenders
from .timing import cpu_times, cuda_times, hardware


@dataclass(frozen=True)
class Result:
    """What was measured of a case.

    Attributes:
        us: the median time of each contender, in microseconds.
        spread: the interquartile range of our own times over their median.
        read_gb_per_s: how fast the contender "read" read the inputs.
    """

    case: Case
    us: dict[str, float]
    spread: float
    read_gb_per_s: float


def cases(device: str, quick: bool) -> list[Case]:
    """The cases that are measured on a device; `quick` leaves most of them out."""
    if device == "cuda":
        vocab, batches, dtypes = 151_936, [1, 8, 64, 256], ["bfloat16", "float32"]
    else:
        vocab, batches, dtypes = 128_256, [1, 8, 32], ["float32", "bfloat16"]
    if quick:
        dtypes, batches = dtypes[:1], batches[:2]
    return [Case(*c) for c in itertools.product(dtypes, batches, (vocab,), SETTINGS)]


def check(case: Case, device: str) -> None:
    """Check that tokens and log-probs equal those of the reference, before their time is taken."""
    generator = torch.Generator(device).manual_seed(1)
    z = [
        torch.randn(2, case.vocab, generator=generator, device=device).to(
            getattr(torch, case.dtype)
        )
        for _ in WEIGHTS
    ]
    kw: dict[str, Any] = {"seed": 3, "step": 1, **SETTINGS[case.setting]}
    got, truth = (ops.blend_sample(z, WEIGHTS, backend=b, **kw) for b in (None, "reference"))
    torch.testing.assert_close(got.tokens, truth.tokens)
    torch.testing.assert_close(got.logprobs, truth.logprobs, atol=1e-4, rtol=0)


def measure(case: Case, device: str, seconds: float) -> Result:
    """Check and time one case, for some `seconds` on a CPU."""
    check(case, device)
    calls = contenders(case, device)
    times = cpu_times(calls, seconds) if device == "cpu" else cuda_times(calls, 15)
    us = {name: statistics.median(t) for name, t in times.items()}
    low, _, high = statistics.quantiles(times["ours"], n=4)
    return Result(case, us, (high - low) / us["ours"], case.bytes / us["read"] / 1e3)


def eager_calls_us(device: str) -> list[float]:
    """Microseconds of a call on rows of 8 tokens, which is nearly all overhead; five samples."""
    z = [torch.randn(1, 8, device=device) for _ in WEIGHTS]
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(500):
            ops.blend_sample(z, WEIGHTS, seed=0, step=0)
        samples.append((time.perf_counter() - start) / 500 * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return samples


def run_ops(
    quick: bool = False, output: Path | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measure all cases. After each of them, all that is known is written to `output` as JSON."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {
        "command": "crossfade bench ops" + (" --quick" if quick else ""),
        "hardware": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "results": [],
    }
    eager: list[float] = []  # measured after each case, as the speed of a machine changes
    for case in tqdm(cases(device, quick), desc="bench ops", file=sys.stderr):
        result = measure(case, device, seconds=1.0 if quick else 4.0)
        eager += eager_calls_us(device)
        report["eager_call_us"] = round(statistics.median(eager), 2)
        report["results"].append(
            {
                **asdict(result.case),
                "us": {name: round(t, 2) for name, t in result.us.items()},
                "spread": round(result.spread, 3),
                "read_gb_per_s": round(result.read_gb_per_s, 1),
            }
        )
        if output is not None:
            output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as the lines of a Markdown table."""
    names = list(dict.fromkeys(n for r in report["results"] for n in r["us"] if n != "read"))
    peers = [n for n in names if n != "ours"]
    yield (
        "| inputs | sampling | read, us | ours, us | ours / read | "
        + " | ".join(f"{p} / ours" for p in peers)
        + " |"
    )
    yield "|---" * (5 + len(peers)) + "|"
    for r in report["results"]:
        us = r["us"]
        ratios = [f"{us[p] / us['ours']:.1f}" if p in us else "-" for p in peers]
        yield (
            f"| {r['dtype']} {r['batch']} x {r['vocab']:,} | {r['setting']} | {us['read']:,.0f} | "
            f"{us['ours']:,.0f} | {us['ours'] / us['read']:.2f} | " + " | ".join(ratios) + " |"
        )
