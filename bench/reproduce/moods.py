"""How the demo's fader was chosen: candidates for its two ends, measured on prompts of their own.

    python bench/reproduce/moods.py --json bench/results/moods.json

A candidate is a pair of system prompts, a form of the blend and a temperature, or the guide
`sentiment` that ships and its opposite. Best is what moves the sentiment of the texts farthest
between its ends, among those whose texts keep, at every position, at most twice the perplexity of
the base's own texts. The demo's prompts are none of these: `crossfade demo` measures on others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import crossfade as cf
from crossfade.cli import fader
from crossfade.cli.fader_report import LIMIT

SUBJECTS = (
    "hotel",
    "restaurant",
    "night train",
    "school play",
    "crime novel",
    "city tour",
    "new phone",
    "weekend",
)
SETTINGS = fader.Settings(
    samples=3, prompts=tuple(fader.QUESTION.format(subject) for subject in SUBJECTS)
)
PAIRS = {  # what the model is told for its cheerful and for its gloomy end
    "plain": (
        "You are cheerful. You love everything and praise it warmly.",
        "You are gloomy. You hate everything and complain about it bitterly.",
    ),
    "critic": (
        "You are a cheerful critic. You love everything you review.",
        "You are a gloomy critic. You hate everything you review.",
    ),
}
REACHES = (1.0, 2.0)  # the fader's ends, on both sides of the base
TEMPERATURES = (0.5, 0.3, 0.7)  # the others than the first are tried on one candidate alone
Candidate = tuple[str, float, float, Callable[[], cf.Blend]]


def candidates(model: Any, tokenizer: Any) -> Iterator[Candidate]:
    """Names, temperatures, positions, and what makes each position's blend."""
    wrapped = cf.models.with_adapters(model, {"sentiment": cf.models.guide("sentiment")})

    def term(name: str, adapter: str | None = None, system: str | None = None) -> cf.Model:
        return cf.Model(wrapped, tokenizer=tokenizer, adapter=adapter, system=system, name=name)

    base, guide = term("base"), term("sentiment", "sentiment")
    for temperature in TEMPERATURES:
        yield "base", temperature, 0.0, lambda: base + 0 * guide
        for pair, (warm, bitter) in PAIRS.items():
            cheerful, gloomy = term("cheerful", system=warm), term("gloomy", system=bitter)
            for w in sorted(sign * reach for reach in REACHES for sign in (-1, 1)):
                name = f"{fader.FORMULA}: {pair}"
                if temperature == TEMPERATURES[0] or (pair == "plain" and abs(w) == REACHES[-1]):
                    yield name, temperature, w, lambda w=w, c=cheerful, g=gloomy: base + w * (c - g)
    warm, bitter = (term(name, system=said) for name, said in fader.MOODS.items())
    for w in (0.0, 1.0):
        name = "(1 - w) * gloomy + w * cheerful: plain"
        yield name, TEMPERATURES[0], w, lambda w=w: 0 * base + (1 - w) * bitter + w * warm
    for w in (-1.0, 1.0):
        name = "base + w * (sentiment - base)"
        yield name, TEMPERATURES[0], w, lambda w=w: base + w * (guide - base)


def measured(work: Path) -> list[dict[str, Any]]:
    """The figures of every candidate's positions; those that are in `work` are not made again."""
    rows = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    known = {(row["candidate"], row["temperature"], row["weight"]) for row in rows}
    for name, temperature, w, blend in candidates(*cf.models.smollm2()):
        if (name, temperature, w) not in known:
            settings = replace(SETTINGS, temperature=temperature)
            position = asdict(fader.measure(blend(), w, settings, lambda: None))
            rows.append({"candidate": name, "temperature": temperature, **position})
            with work.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(name, temperature, w, position["sentiment"], position["perplexity"], flush=True)
    return rows


def ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each candidate and reach: how far the sentiment moves, and the largest perplexity."""
    found = []
    bases = {row["temperature"]: row for row in rows if row["candidate"] == "base"}
    for name, temperature in dict.fromkeys((r["candidate"], r["temperature"]) for r in rows):
        if name == "base":
            continue
        own = {
            row["weight"]: row
            for row in rows
            if (row["candidate"], row["temperature"]) == (name, temperature)
        }
        for to in (w for w in sorted(own) if w > 0):
            start = min(own) if min(own) >= 0 else -to  # a mix has no base between its ends
            inside = [row for w, row in own.items() if start <= w <= to]
            over = max(r["perplexity"] for r in inside) / bases[temperature]["perplexity"]
            found.append(
                {
                    "candidate": name,
                    "temperature": temperature,
                    "from": start,
                    "to": to,
                    "sentiment": [own[start]["sentiment"], own[to]["sentiment"]],
                    "range": own[to]["sentiment"] - own[start]["sentiment"],
                    "perplexity_over_base": over,
                    "within": over <= LIMIT,
                }
            )
    return sorted(found, key=lambda end: (not end["within"], -end["range"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/moods.jsonl"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.parent.mkdir(parents=True, exist_ok=True)
    found = ends(measured(args.work))
    for end in found:
        print(
            f"{end['candidate']:42} temperature {end['temperature']}, {end['from']:+g} .. "
            f"{end['to']:+g}: sentiment {end['sentiment'][0]:+.2f} .. {end['sentiment'][1]:+.2f}, "
            f"perplexity at most {end['perplexity_over_base']:.2f} x the base's"
            f"{'' if end['within'] else ': too much'}"
        )
    if args.json:
        settings = {
            k: v for k, v in asdict(SETTINGS).items() if k not in ("weights", "temperature")
        }
        report = {"moods": PAIRS, "settings": settings, "ends": found}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
