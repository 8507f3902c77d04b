"""Integrated Value Guidance's table (arXiv:2409.17819) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/make_guides.py --work build/guides
    python bench/reproduce/ivg.py --work build/guides --json bench/results/ivg.json

The held-out prompts of `reviews` and both its rewards, which no method sees. For each objective:
the base; EFT at several beta; best of n, chunk-level beam search (CBS) and IVG, which is EFT and
CBS together; and the model that was fine-tuned directly, by the same DPO on the same pairs with an
adapter of more weights. The implicit value is the guide's log-ratio, the explicit one its Q-head.
Then a fader from one guide to the other.

Of KL(decoded || base) of a response, both at the temperature, an upper bound is given: the mean
log-ratio of the blend and the base on the texts, and of the choice what it can add at most:
``log n - (n - 1) / n`` for best of n; the mean of ``log(W N) + (C - 1) log N`` for chunk-level beam
search, which draws W N first chunks and N continuations of each beginning: a text of C chunks at
most W N N^(C - 1) times as often as the base. EFT's reward at the same KL, between the betas that
were run, stands beside each method's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import reviews
from crossfade import metrics, training
from crossfade.bench import hardware
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))
from reports.ivg import render

BETAS = (0.125, 0.25, 0.5, 1.0)
BETA = 0.25  # the beta of searches
WIDTH, SAMPLES, CHUNK, NEW, TEMPERATURE = 2, 4, 5, 40, 0.7
ROWS = WIDTH * SAMPLES
FADER = (0.25, 0.5, 0.75)  # 0 and 1 are the guides alone, EFT with beta = 1
BATCH = 48  # rows at a time, or a few more to have whole prompts


def load(work: Path) -> dict[str, Any]:
    """The base, the guides and the directly fine-tuned models as terms, and the explicit values."""
    model, tokenizer = cf.models.smollm2()
    heads = {o: training.load_value_head(work / f"{o}_value", model) for o in reviews.REWARDS}
    names = [name for o in reviews.REWARDS for name in (o, f"{o}_direct")]
    wrapped = cf.models.with_adapters(model, {name: work / name for name in names})
    found: dict[str, Any] = {
        name: cf.Model(wrapped, tokenizer=tokenizer, adapter=name, name=name) for name in names
    }
    found["base"] = cf.Model(wrapped, tokenizer=tokenizer, adapter=None, name="base")
    for o, head in heads.items():
        found[f"{o}_value"] = cf.ValueHead(head, tokenizer=tokenizer, name=f"{o}_value")
    return found


def tasks(terms: dict[str, Any]) -> dict[tuple[str, str], Callable[[], tuple[Any, Any]]]:
    """By objective and method: the blend, and the search or None."""
    base = terms["base"]

    def eft(objective: str, beta: float) -> cf.Blend:
        return cf.presets.eft(base, terms[objective], base, beta)

    def cbs(value: Any) -> cf.ChunkBeamSearch:
        return cf.ChunkBeamSearch(WIDTH, SAMPLES, CHUNK, value)

    found: dict[tuple[str, str], Callable[[], tuple[Any, Any]]] = {
        ("both", "base"): lambda: (base, None)
    }
    for o in reviews.REWARDS:
        found[o, "fine-tuned directly"] = lambda o=o: (terms[f"{o}_direct"], None)
        for beta in BETAS:
            found[o, f"EFT, beta = {beta:g}"] = lambda o=o, b=beta: (eft(o, b), None)
    a, b = reviews.REWARDS
    for w in FADER:
        blend = (1 - w) * terms[a] + w * terms[b]
        found["fader", f"w = {w:g}"] = lambda x=blend: (x, None)
    for o in reviews.REWARDS:
        values = {"implicit": cf.LogRatio(terms[o], base), "explicit": terms[f"{o}_value"]}
        for name, value in values.items():
            found[o, f"best of {ROWS}, {name}"] = lambda v=value: (base, cf.BestOfN(ROWS, v))
            found[o, f"CBS, {name}"] = lambda v=value: (base, cbs(v))
        found[o, "IVG"] = lambda o=o, v=values["explicit"]: (eft(o, BETA), cbs(v))
    return found


def run(blend: Any, search: Any, base: cf.Model, prompts: list[Any]) -> dict[str, Any]:
    """Decode every prompt and measure the texts.

    Sampling at a temperature is sampling the blend with weights over it, whose log-probs are then
    those of what was sampled.
    """
    rows = 1 if search is None else search.rows
    out: Any = cf.generate(
        blend / TEMPERATURE,
        prompts,
        do_sample=True,
        temperature=1.0,
        max_new_tokens=NEW,
        seed=1,
        max_batch=rows * max(1, BATCH // rows),
        search=search,
    )
    texts = [text.strip() for text in out.text]
    own = cf.score(base / TEMPERATURE, prompts, out.responses, return_term_logprobs=True)
    ratios = out.logprobs.double().sum(dim=1) - own.totals.double()
    of_choice = ratios.new_tensor([choice_kl(search, length) for length in out.lengths.tolist()])
    kl, kl_interval = metrics.mean_interval((ratios + of_choice).tolist())
    plain = float(own.term_logprobs.double().sum())
    found = {
        "seconds": round(out.stats.seconds / len(prompts), 3),
        "tokens": float(out.lengths.double().mean()),
        "kl": kl,
        "kl_interval": kl_interval,
        "of_it_choice": float(of_choice.mean()),
        "perplexity": metrics.perplexity(plain, int(out.lengths.sum())),
        "distinct_2": metrics.distinct_n(texts, 2),
        "texts": texts,
    }
    for name, reward in reviews.REWARDS.items():
        found[name], found[f"{name}_interval"] = metrics.mean_interval(reward(prompts, texts))
    return found


def choice_kl(search: cf.ChunkBeamSearch | None, length: int) -> float:
    """The nats that choosing a text of `length` tokens adds to the divergence, at most."""
    if search is None:
        return 0.0
    if search.chunk_length is None:
        return math.log(search.rows) - 1 + 1 / search.rows
    chunks = -(-length // search.chunk_length)
    return math.log(search.rows) + (chunks - 1) * math.log(search.samples)


def settings(prompts: int) -> dict[str, Any]:
    """What a reader of the table must know, and what a run that goes on must share."""
    return {
        "prompts": prompts,
        "rewards": list(reviews.REWARDS),
        "new": NEW,
        "temperature": TEMPERATURE,
        "search": [WIDTH, SAMPLES, CHUNK],
        "beta": BETA,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """The two rewards: EFT's path from the base as beta grows, every other method, the fader."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    a, b = reviews.REWARDS
    keys = (a, b, f"{a}_interval", f"{b}_interval")
    at = {(r["objective"], r["method"]): r for r in report["rows"]}
    base = at["both", "base"]
    figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")

    def draw(rows: Sequence[dict[str, Any]], style: str, **options: Any) -> None:
        x, y, xerr, yerr = ([r[key] for r in rows] for key in keys)
        axes.errorbar(x, y, yerr, xerr, style, elinewidth=0.7, **options)

    eft = {o: [at[o, f"EFT, beta = {beta:g}"] for beta in BETAS] for o in (a, b)}
    fader = [r for r in report["rows"] if r["objective"] == "fader"]
    draw([eft[a][-1], *fader, eft[b][-1]], "o-", color="C0", label=f"fader from {a} to {b}")
    for color, o in (("C3", a), ("C2", b)):
        draw([base, *eft[o]], ".--", color=color, label=f"{o}: EFT, beta from 0 to {BETAS[-1]:g}")
        others = [r for r in report["rows"] if r["objective"] == o and r not in eft[o]]
        for marker, row in zip("v^*sDX", sorted(others, key=lambda r: r["method"]), strict=True):
            draw([row], marker, color=color, markersize=8, label=f"{o}: {row['method']}")
    draw([base], "o", color="black", label="base")
    axes.set_xlabel(f"{a} (VADER compound, from -1 to 1)")
    axes.set_ylabel(f"{b} (1 - words / 20)")
    axes.set_title(f"SmolLM2-135M-Instruct, {report['settings']['prompts']} held-out prompts")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/guides"))
    parser.add_argument("--json", type=Path, help="results, method by method; those in it are kept")
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args(given)
    prompts = reviews.prompts(reviews.HELD_OUT)[: args.prompts]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/reproduce/ivg.py", *given]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": settings(len(prompts)),
        "rows": [],
    }
    if args.json is not None and args.json.exists():
        kept = json.loads(args.json.read_text())
        if kept["settings"] != report["settings"]:
            parser.error(f"{args.json} has other settings; remove it to begin anew")
        report = kept
    terms = load(args.work)
    have = {(r["objective"], r["method"]) for r in report["rows"]}
    todo = {k: task for k, task in tasks(terms).items() if k not in have}
    for (objective, method), task in tqdm(todo.items(), file=sys.stderr):
        found = run(*task(), terms["base"], prompts)
        report["rows"].append({"objective": objective, "method": method, **found})
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.json is not None:
        plot(report, args.json.with_suffix(".png"))
    print(render(report))
    return report


if __name__ == "__main__":
    main()
