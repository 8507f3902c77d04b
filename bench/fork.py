"""Forks of caches: ours in place, Hugging Face's copy of all, and a plain copy of as many bytes.

    python bench/fork.py --json bench/results/fork.json

The caches are SmolLM2's: 60 tensors of 16 rows, 3 heads and 64 float32. A beam's fork keeps 4 rows
of 16 and forks each 4 times; a permutation moves every row. Contenders take turns over caches that
are in no processor's cache, the plain copy right before and after each of them, and figures are
medians. On a GPU, times are of replayed CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from crossfade import ops
from crossfade.bench import check_floors, cpu_times, cuda_times, hardware, inputs_needed
from reports.fork import render
from torch import Tensor
from tqdm import tqdm

FLOOR = "copy"
TENSORS, ROWS, HEADS, DIM = 60, 16, 3, 64
CHUNK = 5  # positions that differ after a chunk
PARENTS = {
    "beam": [9] * 4 + [2] * 4 + [11] * 4 + [4] * 4,
    "permutation": [(5 * row + 3) % ROWS for row in range(ROWS)],
}


@dataclass(frozen=True)
class Case:
    """Caches of `live` positions, forked from `start` on."""

    parents: str
    live: int
    start: int

    @property
    def bytes(self) -> int:
        """The bytes read and written: those of each row that is a parent, and each that changes."""
        moved = {row: p for row, p in enumerate(PARENTS[self.parents]) if p != row}
        rows = len(moved) + len(set(moved.values()))
        return TENSORS * rows * HEADS * (self.live - self.start) * DIM * torch.float32.itemsize


def caches(case: Case, device: str) -> list[Tensor]:
    shape = ROWS, HEADS, case.live, DIM
    return [torch.randn(shape, device=device) for _ in range(TENSORS)]


def check(case: Case, device: str) -> None:
    """Check the result, before anything is timed."""
    parents = torch.tensor(PARENTS[case.parents], device=device)
    tensors = caches(case, device)
    want = [x.index_select(0, parents) for x in tensors]
    for x, y in zip(tensors, want, strict=True):
        y[:, :, : case.start] = x[:, :, : case.start]
    ops.fork_cache_(tensors, parents, case.start)
    assert all(map(torch.equal, tensors, want)), f"{case} is wrong"


def contenders(case: Case, device: str) -> dict[str, list[Callable[[], Any]]]:
    """Each contender, as a call for each set of caches."""
    parents = torch.tensor(PARENTS[case.parents], device=device)
    calls: dict[str, list[Callable[[], Any]]] = {}
    whole = TENSORS * ROWS * HEADS * case.live * DIM * torch.float32.itemsize
    for _ in range(inputs_needed(whole, device)):
        tensors = caches(case, device)
        source = torch.ones(case.bytes // 8, device=device)  # half is read, half is written
        target = torch.ones_like(source)

        def copy(target: Tensor = target, source: Tensor = source) -> None:
            target.copy_(source)

        def ours(tensors: list[Tensor] = tensors, **options: Any) -> None:
            ops.fork_cache_(tensors, parents, case.start, **options)

        def index_select(tensors: list[Tensor] = tensors) -> list[Tensor]:
            return [x.index_select(0, parents) for x in tensors]

        ways: dict[str, Callable[[], Any]] = {
            FLOOR: copy,
            "ours": ours,
            "index_select": index_select,
        }
        if device == "cuda":
            ways["ours, Triton"] = lambda call=ours: call(backend="triton")
        for name, way in ways.items():
            calls.setdefault(name, []).append(way)
    return calls


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    check(case, device)
    calls = contenders(case, device)
    cpu = device == "cpu"
    found = cpu_times(calls, FLOOR, seconds) if cpu else cuda_times(calls, FLOOR, 15)
    check_floors(str(case), found, device)
    us = {FLOOR: found["ours"].floor_us} | {name: t.us for name, t in found.items()}
    ms = {name: t / 1e3 for name, t in us.items()}
    return {
        **asdict(case),
        "ms": {name: round(t, 3) for name, t in ms.items()},
        "over_copy": round(ms["ours"] / ms[FLOOR], 2),
        "index_select_over_ours": round(ms["index_select"] / ms["ours"], 2),
        "copy_gb_per_s": round(case.bytes / ms[FLOOR] / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    cases = [
        Case(parents, live, start)
        for live in (30, 300)
        for parents in PARENTS
        for start in (0, live - CHUNK)
    ]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/fork.py", *sys.argv[1:]]),
        "machine": hardware(args.device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch")},
        "rows": [],
    }
    for case in tqdm(cases, desc="fork", file=sys.stderr):
        report["rows"].append(measure(case, args.device, args.seconds))
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
