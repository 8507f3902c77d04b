"""A tiny model of every causal-LM class of the installed Transformers, against its `generate`.

Each family gets a small config, random parameters of which none is neutral, and prompts of several
lengths. What `crossfade.generate` writes for a batch must be what `model.generate` writes for each
row alone: greedy tokens, drawn tokens, their log-probs, and `crossfade.score` of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
import transformers
from crossfade import ops
from family_models import EOS, PAD, VARIANTS, VOCAB, build
from reports.families import totals
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NEW = 14
LENGTHS = (9, 5, 1, 7, 3)
BATCHES = (1, 2, 5)
TOLERANCE = 2e-3  # nats, in float32


class Draws:
    """A logits processor that lets Hugging Face draw what the kernel draws, or write a text."""

    def __init__(self, row: int, seed: int, forced: list[int] | None = None) -> None:
        self.row, self.seed, self.forced, self.step = row, seed, forced, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.forced is not None:
            token = torch.tensor([self.forced[self.step]])
        else:
            token = ops.blend_sample(
                [scores.float()], [1.0], seed=self.seed, stream=self.row, step=self.step
            ).tokens
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def alone(model: Any, prompt: list[int], *draws: Draws) -> tuple[list[int], Tensor]:
    """What `model.generate` writes after one prompt, and the log-probs of its tokens."""
    # A copy is called, as dynamic frequencies remember the longest text that a model has read.
    out = copy.deepcopy(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=NEW,
            pad_token_id=PAD,
            eos_token_id=EOS,
            output_logits=True,
            return_dict_in_generate=True,
        ),
        logits_processor=LogitsProcessorList(draws),
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logits = torch.stack([z[0] for z in out.logits])[: len(tokens)]
    log_p = logits.float()[:, :VOCAB].log_softmax(-1)
    return tokens, log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def compare(model: Any) -> dict[str, Any]:
    """The path that a model takes, and what differs from Hugging Face there."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    try:
        greedy = [alone(model, p) for p in prompts]
        drawn = [alone(model, p, Draws(i, 7)) for i, p in enumerate(prompts)]
    except Exception as error:
        return {"path": "generate itself cannot", "why": told(error)}
    wrong: list[str] = []
    notes: Counter[str] = Counter()
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": PAD}
    try:
        for count in BATCHES:
            for draw, theirs in (({}, greedy), ({"do_sample": True, "seed": 7}, drawn)):
                out = cf.generate(model, prompts[:count], **arguments, **draw)
                notes.update(out.stats.notes)
                what = f"{'drawn' if draw else 'greedy'} tokens of {count}"
                wrong += differences(out.responses, out.logprobs, theirs[:count], what)
        texts = [tokens for tokens, _ in drawn]
        forced = cf.score(model, prompts, texts)
        wrong += differences(texts, forced.logprobs, drawn, "scores")
    except Exception as error:
        kinds = (NotImplementedError, TypeError, ValueError)
        path = "refused" if isinstance(error, kinds) else "error"
        return {"path": path, "why": told(error)}
    simple = [n for n in notes if n.startswith("the simple path")]
    return {
        "path": "simple" if simple else "engine",
        **({"why": simple[0].split(": ", 1)[1]} if simple else {}),
        "equal": not wrong,
        **({"wrong": wrong} if wrong else {}),
        "distinct tokens": len({t for tokens, _ in drawn for t in tokens}),
    }


def differences(
    ours: list[list[int]], logprobs: Tensor, theirs: list[tuple[list[int], Tensor]], what: str
) -> list[str]:
    for i, (tokens, (expected, log_p)) in enumerate(zip(ours, theirs, strict=True)):
        if tokens != expected:
            same = [a == b for a, b in zip(tokens, expected, strict=False)]
            at = same.index(False) if False in same else len(same)
            return [f"{what}: row {i} differs from token {at} on"]
        error = (logprobs[i, : len(tokens)].cpu() - log_p).abs().max().item()
        if not error < TOLERANCE:
            return [f"{what}: log-probs of row {i} are off by {error:.2g}"]
    return []


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def try_family(name: str) -> dict[str, Any]:
    kind = VARIANTS.get(name, (name, {}))[0]
    record: dict[str, Any] = {"family": name, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}
    try:
        model = build(name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{told(error)} ({Path(where.filename).name}:{where.lineno})"
        return {**record, "path": "not built", "why": why}
    return {**record, **compare(model)}


def names() -> list[str]:
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def report_of(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python bench/families.py --json bench/results/families.json",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "python": platform.python_version(),
        "families": [found[n] for n in names() if n in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the results go; families in it are kept")
    parser.add_argument("--only", nargs="+", help="families to try, again if they are in the file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.json and args.json.exists():
        found = {r["family"]: r for r in json.loads(args.json.read_text())["families"]}
    for name in args.only or [n for n in names() if n not in found]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = try_family(name)
        print(json.dumps(found[name]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report_of(found), indent=1) + "\n")
    print(totals(report_of(found)))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
