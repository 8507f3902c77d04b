"""What the stages of `clp` have shown: figures of fronts, from the files that they kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from crossfade.pareto import Front, measures
from stages import Row

DRAWS = 1000  # of the bootstrap over prompts


def of_fronts(fronts: Sequence[Front], reference: Mapping[str, float]) -> Row:
    """Of each method, over the fronts of all seeds: its volumes, its steerability, its ends."""
    found = {}
    for method in fronts[0].methods:
        at = {name: reference[name] for name in fronts[0].rewards}
        volumes = [front.hypervolume(at)[method] for front in fronts]
        ends = {}
        for name in fronts[0].rewards:
            best = [
                max(
                    (p for p in front.points if p["method"] == method),
                    key=lambda p: p["weights"].get(name, 0.0),
                )["rewards"][name]
                for front in fronts
            ]
            ends[name] = statistics.fmean(best)
        kls = [p["kl"] for front in fronts for p in front.points if p["method"] == method]
        found[method] = {
            "volume": statistics.fmean(v.value for v in volumes),
            "volumes": [list(v) for v in volumes],
            "interval": interval(draws(fronts, reference, method)),
            "steerability": [front.steerability[method] for front in fronts],
            "correlations": [front.correlations[method] for front in fronts],
            "ends": ends,
            "kl": statistics.fmean(kls) if None not in kls else None,
        }
    return found


def differences(fronts: Sequence[Front], reference: Mapping[str, float], than: str) -> Row:
    """How much larger a method's volume is than each other's, of the same draws of prompts."""
    own = draws(fronts, reference, than)
    found = {}
    for method in fronts[0].methods:
        if method == than:
            continue
        gaps = own - draws(fronts, reference, method)
        at = {name: reference[name] for name in fronts[0].rewards}
        each = [
            front.hypervolume(at)[than].value - front.hypervolume(at)[method].value
            for front in fronts
        ]
        low, high = interval(gaps)
        agree = all(x > 0 for x in each) or all(x < 0 for x in each)
        found[method] = {
            "difference": statistics.fmean(each),
            "interval": [low, high],
            "each": each,
            "resolved": agree and (low > 0 or high < 0),
        }
    return found


def draws(fronts: Sequence[Front], reference: Mapping[str, float], method: str) -> torch.Tensor:
    """``[draws]``: the mean volume over seeds, of prompts drawn alike for all seeds and methods."""
    total = torch.zeros(DRAWS, dtype=torch.float64)
    for front in fronts:
        n = len(front.prompts)
        taken = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(0))
        at = torch.tensor([reference[name] for name in front.rewards], dtype=torch.float64)
        each = torch.tensor(
            [
                [[statistics.fmean(own) for own in front.scores[i][name]] for name in front.rewards]
                for i in front.whole(method)
            ],
            dtype=torch.float64,
        )  # [points, rewards, prompts]
        means = each[:, :, taken].mean(dim=3).permute(2, 0, 1)
        total += measures.volumes(means - at)
    return total / len(fronts)


def interval(x: torch.Tensor) -> list[float]:
    """The 95 % interval of bootstrap draws."""
    return x.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def parameters(work: Path, seed: int, scopes: Sequence[str], rewards: Sequence[str]) -> Row:
    """How many parameters each method of two rewards trains and keeps."""

    def of(name: str) -> int:
        return json.loads((work / name / "parameters.json").read_text())

    experts = sum(of(f"expert-{reward}-{seed}") for reward in rewards)
    found = {scope: of(f"two-{scope}-{seed}") for scope in (*scopes, "prompt")}
    return {**found, "soup": experts, "mod": experts}


def learnt(work: Path, names: Sequence[str]) -> list[Row]:
    """What each run's first and last quarter of steps logged, in the mean."""
    found = []
    for name in names:
        file = work / name / "history.json"
        if not file.exists():
            continue
        logs = [log for log in json.loads(file.read_text()) if "objective" in log]
        quarter = max(1, len(logs) // 4)
        ends = {
            end: {key: statistics.fmean(log[key] for log in some) for key in ("objective", "kl")}
            for end, some in (("first", logs[:quarter]), ("last", logs[-quarter:]))
        }
        found.append({"run": name, **ends})
    return found


def texts(front: Front, method: str) -> Row:
    """What a method wrote to the first prompt at each weighting."""
    rows: list[Any] = [
        {"weights": point["weights"], "text": front.texts[i][0][0]}
        for i, point in enumerate(front.points)
        if point["method"] == method
    ]
    return {"prompt": front.prompts[0][-1]["content"], "rows": rows}
