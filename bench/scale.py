"""What more than one process is worth. Its parts are measured alone: ``python bench/scale.py ray``.

ray: prompts a second of `crossfade generate` in one process, and by actors of Ray on the same
machine. Each way is a command that is timed from its start to its end. How many prompts a second
it decodes is told by itself, where it is one process, and with Ray by when each part was written:
the rest of its time is what it costs to begin and to end. Texts are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crossfade.bench import hardware
from reports.scale import render
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
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


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"ray": ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--prompts", type=int, help="by default more for the smaller model")
    parser.add_argument("--batch", type=int, default=8, help="rows decoded at a time")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path, help="also write the part there, beside other parts")
    args = parser.parse_args()
    report = {args.part: PARTS[args.part](args)}
    print(render(report, args.part))
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**before, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
