"""The tables of README and docs/, made from bench/results/. `--check`: are they up to date?"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coupling
import decode
import dpo
import families
import guides
import house
import logp
import search
from crossfade import bench

sys.path.append(str(Path(__file__).parent / "reproduce"))
import ivg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def bench_section(report: dict[str, Any]) -> str:
    h = report["hardware"]
    where = f"CUDA {h['cuda']}" if "cuda" in h else f"{h['threads']} threads, {h['isa']}"
    inputs = f"Inputs are {report['inputs']}. " if "inputs" in report else ""
    note = (
        f"{h['device']}, {where}; three terms; torch {report['versions']['torch']}; "
        f"`{report['command']}`. {inputs}One eager call on tiny inputs takes "
        f"{report['eager_call_us']:.0f} µs."
    )
    return "\n".join([*bench.table(report), "", note])


def figures(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def gpu_figures(stage: str) -> dict[str, Any]:
    return figures("nvidia-h200")[stage]["figures"]


def demo_section() -> Iterator[str]:
    report = figures("demo")
    yield (
        "| w | sentiment (VADER) | words a text | perplexity (base) | distinct-2 | KL to the base, "
        "nats a token |"
    )
    yield "|---" * 6 + "|"
    for p in report["positions"]:
        yield (
            f"| {p['weight']:g} | {p['sentiment']:+.2f} ± {p['sentiment_interval']:.2f} | "
            f"{p['words']:.1f} ± {p['words_interval']:.1f} | "
            f"{p['perplexity']:.1f} | {p['distinct_2']:.2f} | "
            f"{p['kl']:.3f} ± {p['kl_interval']:.3f} |"
        )
    yield ""
    yield (
        f"{len(report['positions'][0]['texts'])} texts a position, ± is a 95 % interval of the "
        "mean; `crossfade demo --json`."
    )


README: dict[str, Callable[[], str]] = {
    "bench": lambda: bench_section(figures("cpu")),
    "coupling": lambda: coupling.summary(figures("coupling")),
    "decode": lambda: decode.readme(figures("decode")),
    "demo": lambda: "\n".join(demo_section()),
    "dpo": lambda: dpo.summary(figures("dpo")),
    "gpu-bench": lambda: bench_section(gpu_figures("bench")),
    "gpu-decode": lambda: decode.readme(gpu_figures("steps")),
    "guides": lambda: guides.summary(figures("guides")),
    "ivg": lambda: ivg.summary(figures("ivg")),
    "logp": lambda: logp.summary(figures("logp")),
    "search": lambda: search.readme(figures("search")),
}


PAGES = {
    "README.md": README,
    "docs/architecture.md": {"house": house.page},
    "docs/families.md": {"families": lambda: families.page(figures("families"))},
}


def filled(name: str, page: str) -> str:
    """A page in which each section between its markers has been made anew."""
    for section, made in PAGES[name].items():
        text = made()
        page, found = re.subn(
            rf"(?s)<!--{section}-->.*?<!--/{section}-->",
            lambda _, section=section, text=text: f"<!--{section}-->\n{text}\n<!--/{section}-->",
            page,
        )
        if found != 1:
            sys.exit(f"{name} has {found} sections {section!r}; it must have one")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name in PAGES:
        old = (ROOT / name).read_text()
        new = filled(name, old)
        if args.check and new != old:
            sys.exit(f"{name} is not what bench/results/ says: run python bench/tables.py")
        (ROOT / name).write_text(new)
