"""The tables of README, RESULTS.md and docs/, made from bench/results/. `--check`: as they are?

It imports the reports and nothing that measures, so that any Python will do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.append(str(ROOT / "python"))  # where crossfade is not installed

from reports import (  # noqa: E402
    before,
    bulk,
    clp,
    conditioned,
    correct,
    coupling,
    cpu_peers,
    decode,
    demo,
    dpo,
    dynamics,
    exact,
    families,
    fork,
    gpu,
    guides,
    house,
    ivg,
    judge,
    lm_eval,
    logp,
    metaaligner,
    ops,
    scale,
    search,
    searches,
    self_judge,
    serving,
    session,
    speculation,
    speed,
    trl_parity,
)

Section = tuple[Callable[..., str], tuple[str, ...]]


def of(render: Callable[..., str], *results: str) -> Section:
    """A section: what makes it, and the files of bench/results/ that this takes, in order."""
    return render, results


GPU = "nvidia-h200"
PAGES: dict[str, dict[str, Section]] = {
    "README.md": {
        "speed": of(
            speed.render, "cpu", "decode", "search", "judge", "correct", "logp", "dpo", GPU
        ),
    },
    "bench/RESULTS.md": {
        "bench": of(ops.render, "cpu"),
        "gpu-bench": of(gpu.kernels, GPU),
        "exact": of(exact.render, "exact"),
        "coupling": of(coupling.render, "coupling"),
        "fork": of(fork.render, "fork"),
        "gpu-fork": of(gpu.forks, GPU),
        "decode": of(decode.render, "decode"),
        "cpu-peers": of(cpu_peers.render, "cpu_peers"),
        "gpu-decode": of(gpu.steps, GPU),
        "guides": of(guides.render, "guides"),
        "bulk": of(bulk.render, "bulk"),
        "session": of(session.render, "session"),
        "serving": of(serving.render, "serving"),
        "scale-ray": of(scale.ray, "scale"),
        "scale-shards": of(scale.shards, "scale"),
        "search": of(search.render, "search"),
        "speculation": of(speculation.render, "speculation"),
        "judge": of(judge.render, "judge"),
        "correct": of(correct.render, "correct"),
        "conditioned": of(conditioned.render, "conditioned"),
        "lm-eval": of(lm_eval.render, "lm_eval"),
        "logp": of(logp.render, "logp"),
        "dpo": of(dpo.render, "dpo"),
        "trl-parity": of(trl_parity.render, "trl_parity"),
        "demo": of(demo.render, "demo"),
        "moods": of(demo.moods, "moods"),
        "ivg": of(ivg.render, "ivg"),
        "searches": of(searches.render, "searches"),
        "self-judge": of(self_judge.render, "self_judge"),
        "metaaligner": of(metaaligner.render, "metaaligner"),
        "clp": of(clp.render, "clp"),
        "dynamics": of(dynamics.render, "dynamics"),
        "families": of(families.totals, "families"),
        "before": of(before.render, "before"),
        "gpu-stages": of(gpu.stages, GPU),
    },
    "docs/architecture.md": {"house": of(house.render, "house_before", "house")},
    "docs/conditioned.md": {"clp": of(clp.summary, "clp")},
    "docs/dynamics.md": {"dynamics": of(dynamics.summary, "dynamics")},
    "docs/families.md": {"families": of(families.render, "families")},
    "docs/searches.md": {"searches": of(searches.summary, "searches")},
}


def figures(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def filled(name: str, page: str) -> str:
    """A page in which each section between its markers has been made anew."""
    for section, (render, results) in PAGES[name].items():
        text = render(*map(figures, results))
        page, found = re.subn(
            rf"(?s)<!--{section}-->.*?<!--/{section}-->",
            lambda _, section=section, text=text: f"<!--{section}-->\n{text}\n<!--/{section}-->",
            page,
        )
        if found != 1:
            sys.exit(f"{name} has {found} sections {section!r}; it must have one")
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if they are not")
    args = parser.parse_args(arguments)
    for name in PAGES:
        old = (ROOT / name).read_text(encoding="utf-8")
        new = filled(name, old)
        if new != old and args.check:
            sys.exit(f"{name} is not what bench/results/ says: run python bench/tables.py")
        if new != old:
            (ROOT / name).write_text(new, encoding="utf-8")
            print(f"{name} is made anew")


if __name__ == "__main__":
    main()
