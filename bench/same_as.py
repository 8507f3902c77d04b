"""Whether a checkout decodes what another one does: random calls, made by two processes.

    git worktree add --detach ../before COMMIT  # with the native module built or copied there
    python bench/same_as.py --before ../before --after . --minutes 10

Each checkout runs in a process of its own and makes the same calls, given as JSON. What they give
is compared: tokens, log-probs, values and divergences, flags, counts, notes, warnings and errors.
Calls that differ are printed with their seeds; `--seed N --calls 1` makes one again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAN_TOKEN = 33  # of which the model `nan` makes bad logits
MODELS = {
    "llama": ("llama", 0),
    "llama1": ("llama", 1),
    "gpt2": ("gpt2", 1),
    "qwen3": ("qwen3", 2),
    "gemma3": ("gemma3", 3),
}
ADAPTED = ("plain", "tuned", "ref")
HARD = ("short", "nan", "mamba", "longrope")
Spec = dict[str, Any]

# ------------------------------------------------------------------------------------------------
# Random calls
# ------------------------------------------------------------------------------------------------


def term(pick: random.Random, names: list[str]) -> Spec:
    found: Spec = {"model": pick.choice(names)}
    if pick.random() < 0.1:
        found["system"] = pick.choice(["the cast was", "very dull"])
    elif pick.random() < 0.1:
        found["prompt"] = pick.choice(["a bright film", [5, 6, 7], None])
    if pick.random() < 0.5:
        found["tokenizer"] = "words"
    return found


def blend(pick: random.Random, requests: int) -> Spec:
    kind = pick.choice(["whole", "whole", "adapted", "adapted", "mixed", "hard"])
    names = {
        "whole": list(MODELS),
        "adapted": list(ADAPTED),
        "mixed": [*MODELS, *ADAPTED],
        "hard": [*HARD, "llama"],
    }[kind]
    if kind == "hard":
        names = pick.choice([["short", "llama"], ["nan", "gpt2"], ["mamba", "qwen3"], ["longrope"]])
    terms = [term(pick, names) for _ in range(pick.choice([1, 1, 2, 3]))]
    found: Spec = {"terms": terms, "weights": [1.0], "power": 0.0}
    for _ in terms[1:]:
        w = round(pick.uniform(-0.9, 1.2), 2)
        if pick.random() < 0.15:
            found["weights"].append([round(pick.uniform(-1, 1), 2) for _ in range(requests)])
        else:
            found["weights"].append(w)
    if len(terms) > 1 and pick.random() < 0.15:
        found["power"] = pick.choice([1.0, -0.5, 2.0])
        found["weights"] = [1 / len(terms)] * len(terms)
    if pick.random() < 0.3:
        found["support"] = {
            "term": pick.randrange(len(terms)),
            **pick.choice([{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 1}]),
        }
    if pick.random() < 0.15:
        found["values"] = [pick.choice(["q0", "q1"])]
        found["value_weights"] = [
            [round(pick.uniform(0, 1), 2) for _ in range(requests)]
            if pick.random() < 0.3
            else round(pick.uniform(0.1, 1), 2)
        ]
    return found


def ids(pick: random.Random, longest: int = 14) -> list[int]:
    n = longest if pick.random() < 0.05 else pick.randint(1, 12)
    found = [pick.randrange(5, 61) for _ in range(n)]
    return [x for x in found if x != NAN_TOKEN or pick.random() < 0.3] or [7]


def words(pick: random.Random) -> str:
    pool = ["great", "awful", "film", "the", "a", "was", "plot", "cast", "w22", "w31", "w40"]
    return " ".join(pick.choice(pool) for _ in range(pick.randint(1, 9)))


def inputs(pick: random.Random, requests: int) -> Spec:
    kind = pick.choice(["ids", "ids", "ids", "texts", "chats", "tensor"])
    if kind == "texts":
        return {"kind": kind, "items": [words(pick) for _ in range(requests)]}
    if kind == "chats":
        return {
            "kind": kind,
            "items": [[{"role": "user", "content": words(pick)}] for _ in range(requests)],
        }
    longest = pick.choice([14, 14, 14, 40, 130])
    items = [ids(pick, longest) for _ in range(requests)]
    if requests > 2 and pick.random() < 0.3:  # equal prompts, and prefixes of others
        items[1] = list(items[0])
        items[2] = [*items[0], 9]
    return {"kind": kind, "items": items}


def value(pick: random.Random) -> Spec:
    kind = pick.choice(["ratio", "ratio", "own ratio", "head", "reward model", "reward", "sum"])
    if kind == "sum":
        parts = [value(pick) for _ in range(2)]
        return {"kind": kind, "parts": parts, "weights": [0.5, round(pick.uniform(0.1, 2), 2)]}
    found: Spec = {"kind": kind}
    if kind in ("ratio", "own ratio"):
        found["pair"] = pick.choice(
            [["llama1", "qwen3"], ["tuned", "ref"], ["llama", "gpt2"], ["gemma3", "llama1"]]
        )
        found["normalize"] = pick.random() < 0.3
        found["tokenizer"] = "letters" if kind == "own ratio" else None
    if kind == "head":
        found["head"] = pick.choice(["q0", "scalar"])
    if kind == "reward model":
        found["label"] = pick.choice([None, 1])
        found["template"] = pick.random() < 0.3
    return found


def search(pick: random.Random) -> Spec:
    if pick.random() < 0.25:
        return {"best_of": pick.choice([2, 3]), "value": value(pick)}
    return {
        "width": pick.choice([1, 2, 2, 3]),
        "samples": pick.choice([1, 2, 3]),
        "chunk_length": pick.choice([1, 2, 3, 5, None]),
        "chunk_end": pick.random() < 0.25,
        "duplicate_finished": pick.random() < 0.2,
        "value": value(pick),
    }


def engine(pick: random.Random) -> Spec:
    if pick.random() < 0.5:
        return {}
    return pick.choice(
        [
            {"simple": True},
            {"share_weights": False},
            {"share_head": False},
            {"kernels": False},
            {"restrict_guides": False},
            {"skip_guides": False},
            {"sync_every": 3},
            {"sync_every": 5},
        ]
    )


def settings(pick: random.Random, requests: int) -> Spec:
    """Arguments of `generate` that are JSON."""
    found: Spec = {"do_sample": pick.random() < 0.7, "progress": False}
    which = pick.random()
    if which < 0.7:
        found["max_new_tokens"] = pick.choice([1, 2, 5, 9, 13, 20])
    elif which < 0.9:
        found["max_length"] = pick.choice([6, 15, 22])
    if pick.random() < 0.04:
        found["max_new_tokens"] = 300
    if found["do_sample"]:
        for name, some in {
            "temperature": [0.5, 0.9, 1.7],
            "top_k": [1, 3, 20],
            "top_p": [0.3, 0.8, 0.95],
            "min_p": [0.05, 0.3],
        }.items():
            if pick.random() < 0.3:
                found[name] = pick.choice(some)
        which = pick.random()
        if which < 0.6:
            found["seed"] = pick.randrange(100)
        elif which < 0.8:
            found["seed"] = [pick.randrange(2**64) for _ in range(requests)]
    for name, some, chance in (
        ("num_return_sequences", [2, 3], 0.25),
        ("max_batch", [1, 2, 3, 4, 7], 0.5),
        ("min_new_tokens", [3, 6], 0.08),
        ("repetition_penalty", [1.3], 0.08),
        ("no_repeat_ngram_size", [2], 0.04),
        ("bad_words_ids", [[[7]], [[9, 8]]], 0.04),
        ("suppress_tokens", [[11, 12, 13]], 0.04),
        ("typical_p", [0.6], 0.03),
        ("epsilon_cutoff", [0.02], 0.03),
        ("stop_strings", ["a", ["th", "e"], ["de", "q", "xy"]], 0.12),
        ("return_term_logprobs", [True], 0.2),
        ("return_pushes", [True], 0.12),
        ("return_kl_to_base", [True], 0.12),
        ("max_time", [0.0, 1e4], 0.03),
        ("return_dict_in_generate", [False, True], 0.05),
        ("forced_eos_token_id", [1], 0.02),
        ("pad_token_id", [0, 3], 0.05),
    ):
        if pick.random() < chance:
            found[name] = pick.choice(some)
    if pick.random() < 0.8:
        found["eos_token_id"] = pick.choice([1, [1, 20], [1, *range(20, 32)], [1, *range(15, 40)]])
    return found


def call(seed: int) -> Spec:
    """A random call, the same for the same seed."""
    pick = random.Random(seed)
    requests = pick.choice([1, 2, 3, 4, 5, 9])
    spec: Spec = {
        "seed": seed,
        "blend": blend(pick, requests),
        "inputs": inputs(pick, requests),
        "engine": engine(pick),
        "tokenizer": pick.choice([None, "words", "words"]),
    }
    kind = pick.choice(["generate"] * 6 + ["search"] * 3 + ["cache"] * 2 + ["score", "hook"])
    if kind == "hook" and not isinstance(spec["inputs"]["items"][0][0], int):
        spec["inputs"] = {"kind": "ids", "items": [ids(pick) for _ in range(requests)]}
    if kind == "score":
        spec["responses"] = (
            [words(pick) for _ in range(requests)]
            if pick.random() < 0.3
            else [ids(pick) for _ in range(requests)]
        )
        spec["settings"] = {"return_term_logprobs": pick.random() < 0.5}
        spec["kl_to"] = pick.choice([None, "llama1", "plain"])
    else:
        spec["settings"] = settings(pick, requests)
        if pick.random() < 0.12:
            spec["kl_to"] = pick.choice(["llama1", "plain", "gpt2"])
    if kind == "search":
        spec["search"] = search(pick)
        rows = spec["search"].get("best_of") or spec["search"]["width"]
        spec["settings"].pop("num_return_sequences", None)
        if pick.random() < 0.4:
            spec["settings"]["num_return_sequences"] = pick.randint(1, rows)
        if pick.random() < 0.9:
            spec["settings"].pop("do_sample")
        if spec["settings"].get("max_batch"):
            spec["settings"]["max_batch"] = pick.choice([1, 4, 8, 13, 20])
    if kind == "cache":
        spec["settings"].pop("max_batch", None)
        spec["second"] = {
            "add": pick.choice([[], [9], [9, 10, 11]]),
            "copies": pick.choice([1, 1, 2, 3]),
            "same prompts": pick.random() < 0.3,
            "blend": blend(pick, requests) if pick.random() < 0.1 else None,
        }
    if kind in ("generate", "search", "cache") and pick.random() < 0.08:
        spec["fault"] = {
            "error": pick.choice(["interrupt", "memory", "memory", "os"]),
            "model": pick.choice([*MODELS, "plain"]),
            "calls": pick.choice([0, 1, 3, 8, 20]),
            "again": pick.random() < 0.2,
        }
    if kind == "generate" and pick.random() < 0.1:
        spec["streamer"] = True
    if kind in ("generate", "cache"):
        spec["own"] = [
            name
            for name in ("processor", "criterion", "vector criterion", "allowed", "raises")
            if pick.random() < 0.04
        ]
    spec["kind"] = kind
    if pick.random() < 0.95:
        possible(spec, pick)
    return spec


def possible(spec: Spec, pick: random.Random) -> None:
    """Change most of what would end in an error before anything is decoded."""
    chosen = spec["settings"]
    if chosen.get("do_sample") is False:
        chosen.pop("num_return_sequences", None)
    of_ids = isinstance(spec["inputs"]["items"][0][0], int)
    for each in spec["blend"]["terms"]:
        if of_ids:
            each.pop("system", None)
        elif spec["inputs"]["kind"] == "chats":
            each["tokenizer"] = "words"
    if not of_ids or spec.get("search") or isinstance(spec.get("responses", [[]])[0], str):
        spec["tokenizer"] = spec["tokenizer"] or "words"
    if any(isinstance(each.get("prompt"), str) for each in spec["blend"]["terms"]):
        spec["tokenizer"] = spec["tokenizer"] or "words"
    if "stop_strings" in chosen:
        spec["tokenizer"] = "letters"
        for each in spec["blend"]["terms"]:
            each.pop("tokenizer", None)
            if of_ids:
                each.pop("prompt", None)
    if spec.get("streamer"):
        chosen.pop("max_batch", None)
    if spec["kind"] == "cache":
        spec["engine"].pop("simple", None)
    if "max_length" in chosen and of_ids:
        longest = max(map(len, spec["inputs"]["items"]))
        chosen["max_length"] = max(chosen["max_length"], longest + pick.randint(1, 6))


# ------------------------------------------------------------------------------------------------
# A process over one checkout
# ------------------------------------------------------------------------------------------------


@functools.cache
def model(name: str) -> Any:
    import tiny_models as tiny
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        MambaConfig,
        MambaForCausalLM,
    )

    if name in MODELS:
        return tiny.make(*MODELS[name])
    if name in ADAPTED:
        peft = tiny.lora(4, tiny.make("llama", 4), "tuned")
        return tiny.lora(5, peft, "ref")
    sizes = {**tiny.SIZES, **tiny.HEADS, **tiny.IDS}
    torch.manual_seed(len(name))
    found: Any
    if name == "short":
        found = LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 16}))
    elif name == "longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        found = LlamaForCausalLM(
            LlamaConfig(**{**sizes, "max_position_embeddings": 64}, rope_parameters=rope)
        )
    elif name == "mamba":
        found = MambaForCausalLM(
            MambaConfig(
                vocab_size=tiny.VOCAB,
                hidden_size=16,
                num_hidden_layers=2,
                state_size=4,
                tie_word_embeddings=False,
                **tiny.IDS,
            )
        )
    elif name in ("reward1", "reward2"):
        labels = int(name[-1])
        found = LlamaForSequenceClassification(LlamaConfig(**sizes, **tiny.LONG, num_labels=labels))
    else:
        found = tiny.make("llama", 7 + len(name))
    for weight in found.parameters():
        if weight.dim() > 1 and name != "mamba":
            torch.nn.init.normal_(weight, std=0.4)
    if name == "nan":
        with torch.no_grad():
            found.model.embed_tokens.weight[NAN_TOKEN] = float("nan")
    return found.eval()


@functools.cache
def head(name: str) -> Any:
    """A Q-head or, for `scalar`, a model with one number a token."""
    import tiny_models as tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

    sizes = {**tiny.SIZES, **tiny.HEADS, **tiny.LONG, **tiny.IDS}
    torch.manual_seed(len(name) + ord(name[-1]))
    found: Any
    if name == "scalar":
        found = LlamaForTokenClassification(LlamaConfig(**sizes, num_labels=1))
    else:
        found = LlamaForCausalLM(LlamaConfig(**sizes))
    for weight in found.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return found.eval()


@functools.cache
def tokenizer(name: str | None) -> Any:
    import tiny_models as tiny

    if name is None:
        return None
    return tiny.make_letters() if name == "letters" else tiny.make_tokenizer()


def made_term(spec: Spec) -> Any:
    import crossfade as cf

    name = spec["model"]
    more: dict[str, Any] = {k: spec[k] for k in ("system", "prompt") if spec.get(k) is not None}
    if name in ADAPTED:
        more["adapter"] = None if name == "plain" else name
    return cf.Model(model(name), tokenizer=tokenizer(spec.get("tokenizer")), **more)


def made_blend(spec: Spec) -> Any:
    import crossfade as cf
    import torch

    def weight(w: Any) -> Any:
        return torch.tensor(w) if isinstance(w, list) else w

    support = spec.get("support")
    return cf.Blend(
        tuple(map(made_term, spec["terms"])),
        tuple(map(weight, spec["weights"])),
        tuple(cf.ValueHead(head(v)) for v in spec.get("values", ())),
        tuple(map(weight, spec.get("value_weights", ()))),
        power=spec["power"],
        support=None if support is None else cf.Support(**support),
    )


def made_inputs(spec: Spec) -> Any:
    import tiny_models as tiny
    import torch

    if spec["kind"] != "tensor":
        return spec["items"]
    width = max(map(len, spec["items"]))
    rows = [[tiny.PAD] * (width - len(x)) + x for x in spec["items"]]
    mask = [[0] * (width - len(x)) + [1] * len(x) for x in spec["items"]]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def made_value(spec: Spec) -> Any:
    import crossfade as cf

    kind = spec["kind"]
    if kind == "sum":
        a, b = map(made_value, spec["parts"])
        return spec["weights"][0] * a + spec["weights"][1] * b
    if kind in ("ratio", "own ratio"):
        tuned, ref = (made_term({"model": m, "tokenizer": spec["tokenizer"]}) for m in spec["pair"])
        return cf.LogRatio(tuned, ref, beta=0.7, normalize=spec["normalize"])
    if kind == "head":
        return cf.ValueHead(head(spec["head"]))
    if kind == "reward model":
        label = spec["label"]
        template = (lambda p, r: f"the film : {r}") if spec["template"] else None
        return cf.RewardModel(
            model("reward1" if label is None else "reward2"),
            tokenizer("words"),
            label=label,
            template=template,
        )
    return cf.Reward(lambda prompts, texts: [(7 * len(t) + 3 * t.count("w")) % 11 for t in texts])


def made_search(spec: Spec) -> Any:
    import crossfade as cf

    spec = dict(spec)
    found = made_value(spec.pop("value"))
    if "best_of" in spec:
        return cf.BestOfN(spec["best_of"], found)
    ends = spec.pop("chunk_end")
    end = (lambda text: text.endswith(("2", "5", "t", "e"))) if ends else None
    return cf.ChunkBeamSearch(**spec, chunk_end=end, value=found)


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, tokens: Any) -> None:
        self.seen.append(tokens.tolist())

    def end(self) -> None:
        self.seen.append("end")


def own_arguments(names: list[str]) -> dict[str, Any]:
    """Processors and criteria that are functions."""
    import torch

    def processor(seen: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, 7 + seen.shape[1] % 5] += 2.0
        scores[:, 40] -= (seen[:, -1] % 3).float()
        return scores

    def raises(seen: Any, scores: Any) -> Any:
        if (seen[:, -1] == 25).any():
            raise OSError("25")
        return scores

    found: dict[str, Any] = {}
    if "processor" in names:
        found["logits_processor"] = [processor]
    if "raises" in names:
        found.setdefault("logits_processor", []).append(raises)
    if "criterion" in names:
        found["stopping_criteria"] = [lambda seen, scores: seen.shape[1] >= 17]
    if "vector criterion" in names:
        found.setdefault("stopping_criteria", []).append(
            lambda seen, scores: seen[:, -1] % 7 == torch.arange(len(seen)) % 7
        )
    if "allowed" in names:
        found["prefix_allowed_tokens_fn"] = lambda i, seen: [
            1,
            *range(5 + i % 3, 60, 2 + len(seen) % 2),
        ]
    return found


@contextlib.contextmanager
def fault(spec: Spec | None) -> Iterator[None]:
    """The model's forward fails at one call, or at each from it on."""
    if spec is None:
        yield
        return
    error: BaseException = {
        "interrupt": KeyboardInterrupt(),
        "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        "os": OSError("of the test"),
    }[spec["error"]]
    count = iter(range(10**9))

    def hook(*_: Any) -> None:
        n = next(count)
        if n == spec["calls"] or (spec["again"] and n > spec["calls"]):
            raise error

    its = [m for n, m in model(spec["model"]).named_modules() if n.endswith(".mlp")]
    handle = its[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def plain(x: Any) -> Any:
    """Results as JSON."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.tolist()
    return x


def output(x: Any) -> Spec:
    if not hasattr(x, "stats"):
        return {"tensor": plain(x)}
    fields = [f.name for f in dataclasses.fields(x) if f.name not in ("stats", "cache")]
    found = {name: plain(getattr(x, name)) for name in fields}
    found["dtypes"] = {n: str(getattr(getattr(x, n), "dtype", None)) for n in fields}
    found["stats.tokens"] = x.stats.tokens
    found["stats.models"] = [[list(m.names), m.forwards, m.tokens] for m in x.stats.models]
    found["stats.notes"] = sorted(x.stats.notes)
    found["stats.interrupted"] = x.stats.interrupted
    found["stats.cache_bytes"] = x.stats.cache_bytes
    found["cache"] = None if x.cache is None else repr(x.cache)
    return found


def made(spec: Spec) -> Any:
    """What a call gives."""
    import crossfade as cf
    import torch

    torch.manual_seed(spec["seed"])
    mixed, prompts = made_blend(spec["blend"]), made_inputs(spec["inputs"])
    common: dict[str, Any] = {"tokenizer": tokenizer(spec["tokenizer"])}
    if spec.get("kl_to"):
        common["kl_to"] = made_term({"model": spec["kl_to"]})
    arguments = dict(spec["settings"])
    if spec["kind"] == "score":
        found = cf.score(mixed, prompts, spec["responses"], **common, **arguments)
        return {
            name: plain(getattr(found, name))
            for name in ("logprobs", "lengths", "term_logprobs", "kl", "totals", "perplexity")
        }
    if spec["kind"] == "hook":
        first = model(spec["blend"]["terms"][0]["model"])
        for name in ("max_batch", "progress", "return_term_logprobs", "return_kl_to_base"):
            arguments.pop(name, None)
        if not isinstance(prompts, dict):
            prompts = made_inputs({"kind": "tensor", "items": spec["inputs"]["items"]})
        return output(
            first.generate(**prompts, custom_generate=cf.decode, blend=mixed, **arguments)
        )
    common["engine"] = cf.Engine(**spec["engine"])
    streamer = Streamer() if spec.get("streamer") else None
    if spec.get("search"):
        common["search"] = made_search(spec["search"])
    common |= own_arguments(spec.get("own", []))
    try:
        with fault(spec.get("fault")):
            if spec["kind"] != "cache":
                out = cf.generate(mixed, prompts, streamer=streamer, **common, **arguments)
                found = output(out)
            else:
                found = conversation(spec, mixed, prompts, common, arguments)
    except BaseException as error:
        if streamer is not None:
            error.seen = streamer.seen  # type: ignore[attr-defined]
        raise
    found["streamed"] = None if streamer is None else streamer.seen
    found["next random"] = torch.rand(1).tolist()
    return found


def conversation(
    spec: Spec, mixed: Any, prompts: Any, common: Spec, arguments: Spec
) -> dict[str, Any]:
    import crossfade as cf

    first = cf.generate(mixed, prompts, return_cache=True, **common, **arguments)
    found = output(first)
    second = spec["second"]
    items = spec["inputs"]["items"]
    if isinstance(items[0][0], int) and not second["same prompts"]:
        copies = arguments.get("num_return_sequences", 1)
        items = [[*p, *first.responses[i * copies], *second["add"]] for i, p in enumerate(items)]
    arguments = {**arguments, "num_return_sequences": second["copies"]}
    other = mixed if second["blend"] is None else made_blend(second["blend"])
    try:
        again = cf.generate(
            other, items, cache=first.cache, return_cache=True, **common, **arguments
        )
        found |= {f"second {k}": v for k, v in output(again).items()}
        third = cf.generate(other, items, cache=again.cache, **common, **arguments)
        found |= {f"third {k}": v for k, v in output(third).items()}
    except (ValueError, NotImplementedError) as error:
        found["second error"] = f"{type(error).__name__}: {error}"
    return found


def answer(spec: Spec) -> Spec:
    """What a call gives, its warnings, or its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = made(spec)
        except (Exception, KeyboardInterrupt) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
            found["streamed"] = getattr(error, "seen", None)
    ours = {str(w.message) for w in caught if issubclass(w.category, (RuntimeWarning, UserWarning))}
    found["warnings"] = sorted(ours)
    return found


def work() -> None:
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except BaseException as error:  # The parent is to see it.
            found = {"error": f"outside the call: {type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(found), flush=True)


class Worker:
    def __init__(self, tree: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree.resolve() / "python"),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, spec: Spec) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(spec) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Spec:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError("a process ended")


# ------------------------------------------------------------------------------------------------
# Comparison
# ------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, numbers up to float32's rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 2e-4 + 2e-4 * abs(b)
    return a == b


def differences(before: Spec, after: Spec) -> list[str]:
    return [
        k for k in sorted(before.keys() | after.keys()) if not same(before.get(k), after.get(k))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="a checkout")
    parser.add_argument("--after", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call (default 0)")
    parser.add_argument("--calls", type=int, default=10**9, help="how many")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--show", action="store_true", help="the calls and both results in full")
    args = parser.parse_args(arguments)
    if args.work:
        work()
        return 0
    workers = [Worker(args.before), Worker(args.after)]
    end = time.monotonic() + 60 * args.minutes
    made_calls, differ, errors = 0, 0, 0
    for seed in range(args.seed, args.seed + args.calls):
        if time.monotonic() > end:
            break
        spec = call(seed)
        for worker in workers:
            worker.ask(spec)
        before, after = (worker.answer() for worker in workers)
        made_calls += 1
        errors += "error" in before
        found = differences(before, after)
        if args.show:
            print(json.dumps(spec, indent=1))
        if not found:
            continue
        differ += 1
        print(f"call {seed} ({spec['kind']}) differs in {', '.join(found)}")
        for name in found if args.show else found[:6]:
            for which, x in (("before", before), ("after", after)):
                text = json.dumps(x.get(name))
                print(f"  {name} {which}: {text if args.show else text[:300]}")
        sys.stdout.flush()
    print(f"{made_calls} calls, of which {errors} end in an error; {differ} differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
