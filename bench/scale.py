"""What more than one process is worth. Its parts are measured alone: ``python bench/scale.py ray``.

ray: prompts a second of `crossfade generate` in one process, and by actors of Ray on the same
machine. Each way is a command that is timed from its start to its end. How many prompts a second
it decodes is told by itself, where it is one process, and with Ray by when each part was written:
the rest of its time is what it costs to begin and to end. Texts are compared.

shards: steps of a model that lies in shards on two ranks, with its head in shards and with logits
that are gathered, beside one process; what goes between ranks and how long that takes; and what a
step should take by these. Then draws of one process over a vocabulary in 1 to 4 parts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crossfade import ops
from crossfade.bench import hardware
from reports.scale import render
from scale_ranks import step_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 512
SIZES = {"tiny": (64, 2, 4), "small": (512, 6, 8)}  # the width, layers and heads of a model
PROMPTS = {"tiny": 3000, "small": 800}
TOKENS = 32
SAID = re.compile(r"(\d+) prompts.*, (\d+) tokens, ([\d.]+) tokens/s")


def save_model(folder: Path, size: str) -> None:
    """A random model of a size, and a tokenizer of its words."""
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w2"))
    core.pre_tokenizer = WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2"
    )
    words.save_pretrained(folder)


def save_prompts(file: Path, count: int) -> None:
    draws = random.Random(0)
    with open(file, "w") as lines:
        for _ in range(count):
            words = [f"w{draws.randrange(3, WORDS)}" for _ in range(draws.randint(4, 24))]
            lines.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def run(argv: list[str], output: Path, threads: int) -> tuple[float, float, dict[int, str]]:
    """How long a command takes, its prompts a second while it decodes, and its texts."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    start = time.perf_counter()
    command = [sys.executable, "-m", "crossfade", "generate", *argv, "--output", str(output)]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    files = [output] if output.is_file() else list((output / "parts").iterdir())
    lines = {f: [json.loads(line) for line in f.read_text().splitlines()] for f in files}
    said = SAID.search(done.stderr)
    rate = _rate(lines) if said is None or output.is_dir() else _said(said)
    (shutil.rmtree if output.is_dir() else os.unlink)(output)
    return seconds, rate, {x["index"]: x["text"] for part in lines.values() for x in part}


def _said(said: re.Match[str]) -> float:
    prompts, tokens, rate = map(float, said.groups())
    return prompts * rate / tokens


def _rate(parts: dict[Path, list[Any]]) -> float:
    """Prompts a second between the first part that was written and the last one."""
    when = {file: file.stat().st_mtime for file in parts}
    first, last = min(when, key=when.__getitem__), max(when.values())
    rest = sum(len(lines) for file, lines in parts.items() if file != first)
    return rest / max(last - when[first], 1e-9)


def ray(args: argparse.Namespace) -> dict[str, Any]:
    """One process against actors, for models of some sizes."""
    cores = os.cpu_count() or 1
    ways: dict[str, tuple[list[str], int]] = {"one process, 1 thread": ([], 1)}
    if cores > 1:
        ways[f"one process, {cores} threads"] = ([], cores)
    ways |= {f"--ray {n}": (["--ray", str(n)], 1) for n in args.actors}
    found: dict[str, Any] = {}
    todo = [(size, way) for size in args.sizes for way in ways]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for size in args.sizes:
            save_model(place / size, size)
            save_prompts(place / f"{size}.jsonl", args.prompts or PROMPTS[size])
        for size, way in tqdm(todo, desc="scale ray", file=sys.stderr):
            more, threads = ways[way]
            argv = ["--model", str(place / size), "--max-new-tokens", str(TOKENS), "--sample"]
            argv += ["--batch-size", str(args.batch), *more]
            argv += ["--prompts", str(place / f"{size}.jsonl")]
            seconds, rate, texts = run(argv, place / "out", threads)
            first = found.setdefault(size, {"texts": texts, "ways": {}})
            equal = sum(texts[i] == text for i, text in first["texts"].items())
            if equal < 0.98 * len(texts):  # a draw at a near tie may differ
                raise RuntimeError(f"{way} gave {len(texts) - equal} prompts other texts")
            first["ways"][way] = {"seconds": seconds, "rate": rate, "equal": equal}
    return {
        "command": " ".join(["python bench/scale.py", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        "cores": cores,
        "batch": args.batch,
        "tokens": TOKENS,
        "sizes": {
            size: {"shape": SIZES[size], "prompts": len(x["texts"]), "ways": x["ways"]}
            for size, x in found.items()
        },
    }


# ---- Shards --------------------------------------------------------------------------------------

RANKS = 2
LAYERS, WIDTH, VOCAB = 8, 1024, 49152
STEPS = 16  # of each measurement
DRAWS = {"plain": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}}


def shards(args: argparse.Namespace) -> dict[str, Any]:
    """A model in shards against one process, and draws from a vocabulary in parts."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 11 // 4,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(place)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        weights -= model.get_input_embeddings().weight.nbytes
        ranks = on_ranks(place, args.batches)
    alone = {
        threads: {rows: one_process(model, rows, threads) for rows in args.batches}
        for threads in dict.fromkeys((1, os.cpu_count() or 1))
    }
    return {
        "command": " ".join(["python bench/scale.py", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        "shape": (LAYERS, WIDTH, VOCAB),
        "ranks": RANKS,
        "weights": weights,
        "alone": alone,
        "in ranks": ranks,
        "draws": draws(args.batches),
    }


def on_ranks(folder: Path, batches: list[int]) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("scale_ranks.py")
    run = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), str(script)]
    given = [str(folder), json.dumps(batches), str(STEPS)]
    subprocess.run([sys.executable, "-m", *run, *given], env=env, check=True)
    return json.loads((folder / "measured.json").read_text())


def one_process(model: LlamaForCausalLM, rows: int, threads: int) -> float:
    torch.set_num_threads(threads)
    return step_of(model, rows, STEPS)


def draws(batches: list[int]) -> list[dict[str, Any]]:
    """Seconds of a draw of three terms from the whole, and from parts one after the other."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows in batches:
        logits = [3 * torch.randn(rows, VOCAB, generator=generator) for _ in range(3)]
        for name, cut in DRAWS.items():
            settings: dict[str, Any] = {"weights": [1.0, 0.5, -0.5], "seed": 1, "step": 0, **cut}
            timed = {1: median_of(lambda z=logits, s=settings: ops.blend_sample(z, **s))}
            for parts in (2, 4):
                timed[parts] = median_of(lambda z=logits, s=settings, n=parts: in_parts(z, n, s))
            found.append({"rows": rows, "draw": name, "seconds": timed})
    return found


def in_parts(logits: list[Tensor], count: int, settings: dict[str, Any]) -> ops.BlendSample:
    size = VOCAB // count
    return ops.merge(
        [
            ops.blend_sample(
                [z[:, first : first + size] for z in logits],
                **settings,
                first_token=first,
                return_partial=True,
            )
            for first in range(0, VOCAB, size)
        ]
    )


def median_of(call: Callable[[], Any]) -> float:
    call()
    each = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        each.append(time.perf_counter() - start)
    return statistics.median(each)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"ray": ray, "shards": shards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--prompts", type=int, help="by default more for the smaller model")
    parser.add_argument("--batch", type=int, default=8, help="rows decoded at a time")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="of shards: rows")
    parser.add_argument("--json", type=Path, help="also write the part there, beside other parts")
    args = parser.parse_args()
    report = json.loads(json.dumps({args.part: PARTS[args.part](args)}))
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**before, **report}, indent=1) + "\n")
    print(render(report, args.part))


if __name__ == "__main__":
    main()
