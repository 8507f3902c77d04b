"""`crossfade bench ops`: how long it takes to blend logits and to sample the result.

The contenders of a case take turns, and a read of their inputs is timed right before and after each
of them (see timing.py), so that their ratios hold on a noisy machine. Inputs are cold, and on a CPU
warm as well. On a GPU each contender is a CUDA graph that is replayed, so that its time is the
device's, without the launches.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import ops
from .contenders import SETTINGS, WEIGHTS, Case, contenders, logits
from .report import FLOOR, OURS
from .timing import Timing, check_floors, cpu_times, cuda_times, hardware

SAMPLED = [  # settings, and the rows that they are measured on
    ("plain", "normal"),
    ("top-p 0.9", "flat"),
    ("top-p 0.9", "normal"),
    ("top-p 0.9", "real"),
    ("top-k 50, top-p 0.9", "normal"),
]
INPUTS = {
    "cpu": "cold: in no cache, but in resident pages; warm: read right before",
    "cuda": "cold: those of a replayed graph's calls are larger than the caches",
}


@dataclass(frozen=True)
class Result:
    """What was measured of a case: its contenders, and on a CPU our own one over warm inputs."""

    case: Case
    cold: dict[str, Timing]
    warm: Timing | None = None

    def figures(self) -> dict[str, Any]:
        """What a report says of the case: microseconds, with ours beside the reads around it."""
        ours = self.cold[OURS]
        us = {FLOOR: ours.floor_us} | {name: t.us for name, t in self.cold.items()}
        result: dict[str, Any] = {
            **asdict(self.case),
            "us": {name: round(t, 2) for name, t in us.items()},
            "spread": round(ours.spread, 3),
            "read_gb_per_s": round(self.case.bytes / ours.floor_us / 1e3, 1),
        }
        if self.warm is not None:
            warm = {FLOOR: self.warm.floor_us, OURS: self.warm.us}
            result["warm_us"] = {name: round(t, 2) for name, t in warm.items()}
            result["interrupted"] = {
                FLOOR: round(ours.floor_interrupted, 2),
                OURS: round(ours.interrupted, 2),
            }
        return result


def cases(device: str, quick: bool) -> list[Case]:
    """The cases that are measured on a device; `quick` leaves most of them out."""
    if device == "cuda":
        vocab, batches, dtypes = 151_936, [1, 8, 64, 256], ["bfloat16", "float32"]
    else:
        vocab, batches, dtypes = 128_256, [1, 8, 32], ["float32", "bfloat16"]
    inputs = list(itertools.product(dtypes, batches))
    if quick:
        inputs = inputs[:2]
    elif device == "cpu":
        inputs.append(("float16", 8))
    return [Case(*i, vocab, *sampled) for i in inputs for sampled in SAMPLED]


def check(case: Case, device: str) -> None:
    """Check that tokens and log-probs equal those of the reference, before their time is taken."""
    two_rows = replace(case, batch=2)
    z = list(logits(two_rows, torch.Generator(device).manual_seed(1)))
    kw: dict[str, Any] = {"seed": 3, "step": 1, **SETTINGS[case.setting]}
    got, truth = (ops.blend_sample(z, WEIGHTS, backend=b, **kw) for b in (None, "reference"))
    torch.testing.assert_close(got.tokens, truth.tokens)
    torch.testing.assert_close(got.logprobs, truth.logprobs, atol=1e-4, rtol=0)


def measure(case: Case, device: str, seconds: float) -> Result:
    """Check and time one case, on a CPU for some `seconds` and a quarter of them with warm inputs.

    Raises:
        FasterThanItsFloor: a contender takes less time than the reads of its inputs beside it.
    """
    check(case, device)
    calls = contenders(case, device)
    if device == "cuda":
        result = Result(case, cuda_times(calls, FLOOR, 15))
    else:
        ours = {name: calls[name] for name in (FLOOR, OURS)}
        warm = cpu_times(ours, FLOOR, seconds / 4, cold=False)
        result = Result(case, cpu_times(calls, FLOOR, seconds), warm[OURS])
        check_floors(f"{case}, warm", warm, device)
    check_floors(f"{case}, cold", result.cold, device)
    return result


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


@torch.no_grad()  # as in a decoder
def run_ops(
    quick: bool = False, output: Path | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measure all cases. After each of them, all that is known is written to `output` as JSON."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {
        "command": "crossfade bench ops" + (" --quick" if quick else ""),
        "hardware": hardware(device),
        "inputs": INPUTS[device],
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "results": [],
    }
    eager: list[float] = []  # measured after each case, as the speed of a machine changes
    for case in tqdm(cases(device, quick), desc="bench ops", file=sys.stderr):
        result = measure(case, device, seconds=1.0 if quick else 4.0)
        eager += eager_calls_us(device)
        report["eager_call_us"] = round(statistics.median(eager), 2)
        report["results"].append(result.figures())
        if output is not None:
            output.write_text(json.dumps(report, indent=1) + "\n")
    return report
