"""Searches at equal tokens and at equal seconds, on the two guides that ship: SmolLM2, one core.

    python bench/reproduce/searches.py --json bench/results/searches.json

The held-out prompts of `reviews` and both its rewards, which no method sees. The value is the
guide's log-ratio to the base, of an adapter that ships. Every search draws 4 rows of up to 40
tokens a prompt:

- best of n: a pool of 8 answers, of which the value chooses. The expected reward of the best of n
  of them, for each n, is exact, over all choices of n of the 8.
- CBS: chunk-level beam search, of 2 x 2 rows and chunks of 5 tokens;
- IVG: the same search of a policy that the guide also guides token by token, EFT with beta = 1/4;
- particles: a particle filter at its own temperature, 1, with chunks of 5 tokens. It gives both the
  row that the value likes best, and a draw by the weights, whose expected reward is exact;
- entropy-cut: CBS whose chunks end where the base's entropy is above a threshold. That is the 0.8
  quantile of the base's entropies over its answers to training prompts, so that chunks have 5
  tokens in the mean, as those of CBS;
- tilted: CBS of what the base proposes when a system prompt asks for what is wanted, with the tilt
  to the base without it.

Beside them are one row of each policy: the base, EFT, and the base that is asked by a system
prompt. Seconds are processor seconds of one thread, of `generate` alone, values and waiting rows
and all. All methods answer 40 prompts in turns, then the next 40, and the order of turns rotates.
The settings are fixed beforehand.

Every stage keeps what each method wrote in `--work`, and what is there is skipped. `--only` runs
some stages.

The plan, by the speed of one core in bfloat16, some 100 tokens a second: 2 seconds a prompt for 8
rows, so 13 seconds a prompt and 45 minutes in all. It took 65 minutes, as chunks that are cut by
the entropy take two and a half times the seconds of others.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import reviews
import searches_figures as figures
import stages as kept
import torch
from crossfade.bench import hardware
from crossfade.files import write_text
from stages import Row, Stage

sys.path.append(str(Path(__file__).parent.parent))
from reports.searches import render

DTYPE = torch.bfloat16
SEED, PROMPTS, BLOCK = 1, 200, 40
ROWS, POOL, WIDTH, SAMPLES, CHUNK, BETA = 4, 8, 2, 2, 5, 0.25
NEW, TEMPERATURE, BATCH = 40, 0.7, 48  # BATCH: rows at a time, or fewer to have whole prompts
BUDGET = ROWS * NEW  # tokens of a prompt
ASKED = {"sentiment": "You answer with enthusiasm.", "brevity": "You answer in a few words."}
PICTURE = Path(__file__).parent.parent / "results" / "searches.png"
THRESHOLD, TIMED = "threshold", "timed"  # `timed` is best of `ROWS`, for its seconds


class Task(NamedTuple):
    """A method.

    Attributes:
        policy: what writes.
        search: what chooses.
        returned: how many rows of a prompt come back.
        scaled: the temperature stands as weights over the policy, whose log-probs are then those of
            what is sampled.
    """

    policy: Any
    search: Any = None
    returned: int = 1
    scaled: bool = False


def settings() -> dict[str, Any]:
    """What a reader of the tables must know, and what runs that share `--work` must share."""
    return {
        "rewards": list(reviews.REWARDS),
        "seed": SEED,
        "prompts": PROMPTS,
        "block": BLOCK,
        "rows": ROWS,
        "pool": POOL,
        "search": [WIDTH, SAMPLES, CHUNK],
        "beta": BETA,
        "new": NEW,
        "temperature": TEMPERATURE,
        "asked": ASKED,
    }


def load() -> dict[str, Any]:
    """The base, asked or not, and the guides."""
    model, tokenizer = cf.models.smollm2()
    guides = {name: cf.models.guide(name) for name in reviews.REWARDS}
    wrapped = cf.models.with_adapters(model, guides).to(DTYPE)
    found = {"base": cf.Model(wrapped, tokenizer=tokenizer, adapter=None, name="base")}
    for name in reviews.REWARDS:
        found[name] = cf.Model(wrapped, tokenizer=tokenizer, adapter=name, name=name)
        found[f"asked_{name}"] = cf.Model(
            wrapped, tokenizer=tokenizer, adapter=None, system=ASKED[name], name=f"asked_{name}"
        )
    return found


def tasks(terms: dict[str, Any], nats: float) -> dict[tuple[str, str], Task]:
    """By objective and method. The first one's answers serve both objectives."""
    base = terms["base"]
    values = {o: cf.LogRatio(terms[o], base) for o in reviews.REWARDS}

    def cbs(value: Any, chunk: int | None = CHUNK, **options: Any) -> cf.ChunkBeamSearch:
        return cf.ChunkBeamSearch(WIDTH, SAMPLES, chunk, value, budget=BUDGET, **options)

    first = next(iter(values.values()))
    both = first + sum(1e-6 * v for v in [*values.values()][1:])  # all come back, so none decides
    found = {
        ("both", "pool"): Task(base, cf.BestOfN(POOL, both), POOL),
        ("both", "base"): Task(base),
        ("both", TIMED): Task(base, cf.BestOfN(ROWS, first)),
    }
    for o, value in values.items():
        eft, asked = cf.presets.eft(base, terms[o], base, BETA), terms[f"asked_{o}"]
        particles = cf.ParticleFilter(ROWS, CHUNK, value, budget=BUDGET)
        found |= {
            (o, "EFT"): Task(eft, scaled=True),
            (o, "asked"): Task(asked, scaled=True),
            (o, "CBS"): Task(base, cbs(value)),
            (o, "IVG"): Task(eft, cbs(value), scaled=True),
            (o, "particles"): Task(base, particles, ROWS),
            (o, "entropy-cut"): Task(base, cbs(value, None, chunk_end=cf.entropy_above(nats))),
            (o, "tilted"): Task(asked, cbs(value, tilt=cf.LogRatio(base, asked))),
        }
    return found


def decode(task: Task, prompts: Sequence[Any]) -> Any:
    rows = 1 if task.search is None else task.search.within(NEW).rows
    return cf.generate(
        task.policy / TEMPERATURE if task.scaled else task.policy,
        prompts,
        do_sample=True,
        temperature=1.0 if task.scaled else TEMPERATURE,
        max_new_tokens=NEW,
        seed=SEED,
        max_batch=rows * max(1, BATCH // rows),
        search=task.search,
        num_return_sequences=task.returned,
    )


# ---- stages


def threshold(work: Path, folder: Path) -> dict[str, int]:
    """The entropy that one in `CHUNK` of the base's tokens is above, on training prompts."""
    base = load()["base"]
    nothing = cf.Reward(lambda prompts, texts: [0.0] * len(texts))
    search = cf.ChunkBeamSearch(1, 1, NEW, nothing, cf.entropy_above(math.log(2**31)))
    out = decode(Task(base, search), reviews.prompts(reviews.TRAINED)[:BLOCK])
    each = [e[1:n] for e, n in zip(out.entropies.double(), out.lengths.tolist(), strict=True)]
    nats = float(torch.cat(each).quantile(1 - 1 / CHUNK))
    write_text(folder / "nats.json", json.dumps(nats))
    return {"sampled": int(out.lengths.sum())}


def block(work: Path, folder: Path, start: int) -> dict[str, int]:
    """The answers of every method to some prompts, a file each."""
    terms = load()
    every = tasks(terms, json.loads((work / THRESHOLD / "nats.json").read_text()))
    prompts = reviews.prompts(reviews.HELD_OUT)[start : min(start + BLOCK, PROMPTS)]
    decode(every["both", "pool"], prompts[:2])  # the first call of a process is slower
    turn = start // BLOCK * 3 % len(every)
    order = [*every][turn:] + [*every][:turn]
    sampled = 0
    for key in order:
        path = folder / f"{'-'.join(key)}.json"
        if not path.exists():
            found = run(*key, every[key], terms, prompts)
            write_text(path, json.dumps(found) + "\n")
            print(f"{folder.name}: {' '.join(key)}, {found['seconds']:.0f} s", flush=True)
        sampled += sum(sum(p["tokens"]) for p in json.loads(path.read_text())["prompts"])
    return {"returned": sampled}


def run(
    objective: str, method: str, task: Task, terms: dict[str, Any], prompts: Sequence[Any]
) -> Row:
    """Decode the prompts, and measure the texts that came back, several of one prompt together."""
    cpu = time.process_time()
    out = decode(task, prompts)
    seconds = time.process_time() - cpu
    base, k = terms["base"], task.returned
    again = [prompt for prompt in prompts for _ in range(k)]
    plain, ratio = logprobs(task, out, base, again)
    texts = [text.strip() for text in out.text]
    columns: Row = {
        "texts": texts,
        "tokens": out.lengths.tolist(),
        "plain": plain,
        "ratio": ratio,
        "choice": [choice(task.search, n) for n in chunks(task.search, out)],
        **{name: reward(again, texts) for name, reward in reviews.REWARDS.items()},
    }
    if out.value_parts is not None:
        parts = out.value_parts.double().reshape(len(again), -1).T.tolist()
        columns |= {f"value_{i}": part for i, part in enumerate(parts)}
    if out.weights is not None:
        columns["weights"] = out.weights.double().flatten().tolist()
    model = out.stats.models[0]
    return {
        "objective": objective,
        "method": method,
        "seconds": round(seconds, 2),
        "read": model.tokens / len(model.names),  # by the policy, all its rows together
        "prompts": [
            {name: column[i : i + k] for name, column in columns.items()}
            for i in range(0, len(again), k)
        ],
    }


def logprobs(
    task: Task, out: Any, base: Any, prompts: Sequence[Any]
) -> tuple[list[float], list[float]]:
    """Of each text the base's log-prob, and the log-ratio of the policy and the base, both at the
    temperature."""
    own = out.logprobs.double().sum(dim=1)
    if task.policy is base:
        return own.tolist(), [0.0] * len(prompts)
    wanted = cf.score(base / TEMPERATURE, prompts, out.responses, return_term_logprobs=True)
    if not task.scaled:
        own = cf.score(task.policy / TEMPERATURE, prompts, out.responses).totals.double()
    plain = wanted.term_logprobs.double().sum(dim=(1, 2))
    return plain.tolist(), (own - wanted.totals.double()).tolist()


def chunks(search: Any, out: Any) -> list[int]:
    """How many chunks each text that came back is made of."""
    lengths = out.lengths.tolist()
    if search is None or (search.chunk_length is None and search.most_entropy is None):
        return [1] * len(lengths)
    if search.most_entropy is None:
        return [-(-n // search.chunk_length) for n in lengths]
    above = (out.entropies > search.most_entropy).tolist()
    return [1 + sum(row[1:n]) for row, n in zip(above, lengths, strict=True)]


def choice(search: Any, chunks: int) -> float:
    """The nats that choosing a text of so many chunks adds to the divergence, at most.

    Beams of W x N rows write a text at most ``W N N^(C - 1)`` times as often as their policy, a
    filter of n particles at most ``n^C`` times, as each may come to be in every slot.
    """
    if search is None:
        return 0.0
    search = search.within(NEW)
    again = search.rows if isinstance(search, cf.ParticleFilter) else search.samples
    return math.log(search.rows) + (chunks - 1) * math.log(again)


def stages() -> dict[str, Stage]:
    """All stages by name, in an order in which each finds what it needs."""
    found: dict[str, Stage] = {THRESHOLD: threshold}
    for start in range(0, PROMPTS, BLOCK):
        found[f"prompts-{start}"] = partial(block, start=start)
    return found


def report(work: Path, command: str) -> Row:
    """All figures, once every stage is there."""
    names = [name for name in stages() if name != THRESHOLD]
    files = itertools.chain.from_iterable(sorted((work / name).glob("*-*.json")) for name in names)
    found = figures.merged([json.loads(file.read_text()) for file in files])
    result = {
        "command": command,
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "peft")},
        "settings": settings(),
        "nats": json.loads((work / THRESHOLD / "nats.json").read_text()),
        **figures.compared(found, reviews.REWARDS, ROWS),
    }
    figures.plot(result, PICTURE)
    return result


def main(arguments: Sequence[str] | None = None) -> Row | None:
    return kept.main("searches", __doc__ or "", stages(), settings(), report, render, arguments)


if __name__ == "__main__":
    main()
