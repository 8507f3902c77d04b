"""Integrated Value Guidance's table (arXiv:2409.17819) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/guides.py --work build/guides
    python bench/reproduce/ivg.py --work build/guides --json bench/results/ivg.json

The held-out prompts of `reviews` and both its rewards, which no method sees. For each objective:
the base; EFT at several beta; best of n, chunk-level beam search (CBS) and IVG, which is EFT and
CBS together; and the model that was fine-tuned directly, by the same DPO on the same pairs with an
adapter of more weights. The implicit value is the guide's log-ratio, the explicit one its Q-head.
Then a fader from one guide to the other.

KL(decoded || base) of a response is bounded from above, as `bench/steered.py` says. EFT's reward at
the same KL, between the betas that were run, stands beside each method's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import reviews
from crossfade import metrics, training
from crossfade.bench import hardware
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

from steered import between, figures

BETAS = (0.5, 1.0, 2.0, 4.0)
BETA = 1.0  # of what is searched
WIDTH, SAMPLES, CHUNK, NEW, TEMPERATURE = 4, 4, 5, 40, 0.7
ROWS = WIDTH * SAMPLES
FADER, FADER_BETA = (0.0, 0.25, 0.5, 0.75, 1.0), 2.0
BATCH = 48  # rows at a time, or a few more to have whole prompts


def load(work: Path) -> dict[str, Any]:
    """The base, the guides and the directly fine-tuned models as terms, and the explicit values."""
    model, tokenizer = cf.models.smollm2()
    heads = {o: training.load_value_head(work / f"{o}_value", model) for o in reviews.REWARDS}
    names = [name for o in reviews.REWARDS for name in (o, f"{o}_direct")]
    wrapped: Any = None
    for name in names:
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(model, work / name, adapter_name=name)
        else:
            wrapped.load_adapter(work / name, adapter_name=name)
    wrapped.eval()
    found: dict[str, Any] = {
        name: cf.Model(wrapped, tokenizer=tokenizer, adapter=name, name=name) for name in names
    }
    found["base"] = cf.Model(wrapped, tokenizer=tokenizer, adapter=None, name="base")
    for o, head in heads.items():
        found[f"{o}_value"] = cf.ValueHead(head, tokenizer=tokenizer, name=f"{o}_value")
    return found


def eft(terms: dict[str, Any], guides: dict[str, float]) -> cf.Blend:
    """``base + sum_k beta_k (guide_k - base)``."""
    blend = cf.as_blend(terms["base"])
    for name, beta in guides.items():
        blend = blend + beta * (terms[name] - terms["base"])
    return blend


def tasks(terms: dict[str, Any]) -> dict[tuple[str, str], Callable[[], tuple[Any, Any]]]:
    """By objective and method: the blend, and the search or None."""
    base = cf.as_blend(terms["base"])
    found: dict[tuple[str, str], Callable[[], tuple[Any, Any]]] = {
        ("both", "base"): lambda: (base, None)
    }
    for o in reviews.REWARDS:
        implicit = cf.LogRatio(terms[o], terms["base"])
        explicit = terms[f"{o}_value"]
        found[o, "fine-tuned directly"] = lambda o=o: (terms[f"{o}_direct"], None)
        for beta in BETAS:
            found[o, f"EFT, beta = {beta:g}"] = lambda o=o, b=beta: (eft(terms, {o: b}), None)
        for name, value in (("implicit", implicit), ("explicit", explicit)):
            search = cf.ChunkBeamSearch(WIDTH, SAMPLES, CHUNK, value)
            found[o, f"best of {ROWS}, {name}"] = lambda v=value: (base, cf.BestOfN(ROWS, v))
            found[o, f"CBS, {name}"] = lambda s=search: (base, s)
            if name == "explicit":
                found[o, "IVG"] = lambda o=o, s=search: (eft(terms, {o: BETA}), s)
    a, b = reviews.REWARDS
    for share in FADER:
        weights = {a: FADER_BETA * (1 - share), b: FADER_BETA * share}
        found["fader", f"{share:g}"] = lambda w=weights: (eft(terms, w), None)
    return found


def run(blend: Any, search: Any, base: Any, prompts: list[Any]) -> dict[str, Any]:
    """Decode every prompt and measure the texts."""
    rows = 1 if search is None else search.rows
    out: Any = cf.generate(
        blend,
        prompts,
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=NEW,
        seed=1,
        max_batch=rows * max(1, BATCH // rows),
        search=search,
    )
    found = figures(out, base, prompts, search, NEW)
    found["tokens"] = float(out.lengths.double().mean())
    for name, reward in reviews.REWARDS.items():
        scores = reward(prompts, found["texts"])
        found[name], found[f"{name}_interval"] = metrics.mean_interval(scores)
    return found


def at_kl(rows: Sequence[dict[str, Any]], objective: str, kl: float) -> float | None:
    """EFT's reward at a divergence, between the betas that were run; None: beyond them."""
    of = [r for r in rows if r["objective"] == objective and r["method"].startswith("EFT")]
    base = [r for r in rows if is_base(r)]
    return between([(r["kl"], r[objective]) for r in [*base, *of]], kl) if of else None


def is_base(row: dict[str, Any]) -> bool:
    return (row["objective"], row["method"]) == ("both", "base")


def summary(report: dict[str, Any]) -> str:
    rows, names = report["rows"], list(reviews.REWARDS)
    lines = [
        "| objective | method | s a prompt | "
        + " | ".join(names)
        + " | EFT's at this KL | perplexity (base) | distinct-2 | KL, nats a response, at most |",
        "|---" * (7 + len(names)) + "|",
    ]
    for r in rows:
        same = None
        if r["objective"] in names and not r["method"].startswith("EFT"):
            same = at_kl(rows, r["objective"], r["kl"])
        rewards = " | ".join(f"{r[n]:+.2f} ± {r[f'{n}_interval']:.2f}" for n in names)
        lines.append(
            f"| {r['objective']} | {r['method']} | {r['seconds']:.2f} | {rewards} | "
            f"{'-' if same is None else f'{same:+.2f}'} | {r['perplexity']:.1f} | "
            f"{r['distinct_2']:.2f} | {r['kl']:.2f} ± {r['kl_interval']:.2f} |"
        )
    machine, s = report["machine"], report["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"{s['prompts']} held-out prompts, up to {NEW} tokens at temperature {TEMPERATURE}; W, "
            f"N, L = {WIDTH}, {SAMPLES}, {CHUNK}; searched: beta = {BETA:g}; fader: beta = "
            f"{FADER_BETA:g} shared out; ± is a 95 % interval of the mean. {machine['device']}, "
            f"{machine['threads']} threads; `{report['command']}`.",
        ]
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """The two rewards of every method, and the fader's front."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    a, b = reviews.REWARDS
    figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
    fader = [r for r in report["rows"] if r["objective"] == "fader"]
    axes.errorbar(
        [r[a] for r in fader],
        [r[b] for r in fader],
        xerr=[r[f"{a}_interval"] for r in fader],
        yerr=[r[f"{b}_interval"] for r in fader],
        marker="o",
        capsize=3,
        color="C0",
        label=f"fader from {a} to {b}",
    )
    for color, objective in (("0.3", "both"), ("C3", a), ("C2", b)):
        for r in (r for r in report["rows"] if r["objective"] == objective):
            axes.plot(r[a], r[b], "s", color=color)
            axes.annotate(
                r["method"],
                (r[a], r[b]),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
                color=color,
            )
    axes.set_xlabel(f"{a} (VADER compound, from -1 to 1)")
    axes.set_ylabel(f"{b} (1 - words / 20)")
    axes.set_title(f"SmolLM2-135M-Instruct, {report['settings']['prompts']} held-out prompts")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/guides"))
    parser.add_argument("--json", type=Path, help="results, method by method; those in it are kept")
    parser.add_argument("--prompts", type=int, default=210)
    args = parser.parse_args(given)
    prompts = reviews.prompts(reviews.HELD_OUT)[: args.prompts]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/reproduce/ivg.py", *given]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {"prompts": len(prompts), "new": NEW, "temperature": TEMPERATURE},
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
    print(summary(report))
    return report


if __name__ == "__main__":
    main()
