"""Whether anything races: the same calls in fresh processes under load, compared bit by bit.

    python bench/soak.py --runs 1000 --load 2 --json soak.json

Each run is a process of its own, with its own number of threads, other numbers in the memory that
it is given (glibc's M_PERTURB) and other addresses. It scores two rows in both orders with several
blends of tiny models, and calls every op. Results must be those of the first run with as many
threads: bit for bit where only our kernels compute, within rounding where torch multiplies matrices
too, whose last bits may depend on where its memory lies. A run that differs is kept in the report.

The report is written after every run. Started again with the same file, the soak goes on to as many
runs in all. The exit code is 1 if any run differed by more than rounding, or died.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

THREADS = (1, 2, 3, 4)
ROUNDING = 2e-5  # in nats: far above float32's rounding, far below a wrong result
M_PERTURB = -6  # an option of glibc's mallopt
# Results that only our kernels compute begin so.
EXACT = ("blend", "sample", "linear", "attend", "fork", "select")
Results = dict[str, list[float]]


def run_once(index: int, folder: str | None) -> Results:
    """The results of every call, in this process; a model in `folder` is read and scored too."""
    import torch

    rng = random.Random(index)
    torch.set_num_threads(threads_of(index))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_PERTURB, rng.randrange(256))
    kept = [torch.empty(rng.randrange(1, 5000)) for _ in range(rng.randrange(50))]
    results = {**scores(folder), **ops_results()}
    del kept
    return results


def threads_of(index: int) -> int:
    return THREADS[index % len(THREADS)]


def tiny(kind: str, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 1}
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_attention_heads": 2}
    if kind != "gpt2":
        shape |= {"num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, **shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model


def scores(folder: str | None) -> Results:
    """Log-probs of two rows of different lengths, in both orders, put back into the first order."""
    import crossfade as cf
    import torch
    from transformers import AutoModelForCausalLM

    a, b, c = tiny("llama", 0), tiny("gpt2", 1), tiny("qwen3", 2)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    responses = [[20, 21, 22], [30, 31, 32, 33, 34, 35]]
    blends = {
        "plain": cf.Model(a) + 0.0 * cf.Model(b),
        "geometric": cf.Model(a) + 0.8 * (cf.Model(b) - cf.Model(c)),
        "mixture": cf.power_mean([a, b], weights=[0.3, 0.7], r=1.0),
        "harmonic": cf.power_mean([a, c], weights=[0.5, 0.5], r=-1.0),
        "supported": (cf.Model(a) + 0.5 * cf.Model(c)).within(cf.Support(min_p=1e-4)),
    }
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        blends["model"] = cf.Model(model) + 0.0 * cf.Model(model, prompt=[5, 6])
    results: Results = {}
    for name, blend in blends.items():
        straight = cf.score(blend, prompts, responses).logprobs
        turned = cf.score(blend, prompts[::-1], responses[::-1]).logprobs.flip(0)
        results[f"score {name}"] = numbers(straight)
        results[f"score {name}, turned"] = numbers(turned)
        difference = (straight - turned).nan_to_num(0, 0, 0).abs().max()
        results[f"score {name}, difference"] = numbers(torch.as_tensor(difference))
    return results


def ops_results() -> Results:
    """What every op gives for fixed random numbers."""
    import torch
    from crossfade import ops

    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    results: Results = {}
    z = [normal(3, 20011) * 3, normal(3, 20011, dtype=torch.bfloat16), normal(3, 20032)]
    for power, w in ((0.0, [1.0, 0.8, -0.8]), (-1.0, [0.2, 0.3, 0.5])):
        cut = ops.Support(1, top_p=0.95)
        results[f"blend {power}"] = digest(ops.blend(z, w, power=power, support=cut))
        drawn = ops.blend_sample(
            z,
            w,
            power=power,
            top_k=500,
            top_p=0.9,
            seed=7,
            step=3,
            return_term_logprobs=True,
            return_pushes=power == 0,
        )
        for field, x in zip(drawn._fields, drawn, strict=True):
            if x is not None:
                results[f"sample {power} {field}"] = numbers(x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight = normal(5, 333, dtype=dtype), normal(517, 333, dtype=dtype)
        lora = ops.Lora(normal(7, 333, dtype=dtype), normal(517, 7, dtype=dtype), normal(5, 7))
        y = ops.linear(x, weight, normal(517, dtype=dtype), lora=lora, backend="native")
        results[f"linear {dtype}"] = digest(y)
        for tokens in (1, 40):
            query = normal(3, 6, tokens, 40, dtype=dtype)
            key, value = (normal(3, 2, tokens, n, dtype=dtype) for n in (40, 24))
            keys, values = (normal(3, 2, 700, n, dtype=dtype) for n in (40, 24))
            lengths = torch.tensor([5, 300, 640])
            out = ops.attend_(query, key, value, keys, values, lengths, scale=0.2)
            results[f"attend {dtype} {tokens}"] = digest(out)
            parents = torch.tensor([2, 0, 0])
            ops.fork_cache_([keys, values], parents, 3, 690)
            results[f"fork {dtype} {tokens}"] = digest(keys) + digest(values)
    parents = ops.chunk_select(normal(40, 64), normal(40, 64) > 0, 8)
    results["select"] = digest(parents)
    hidden, head = (normal(*s).requires_grad_() for s in ((300, 48), (2100, 48)))
    done = ops.linear_logp(hidden, head, torch.arange(300) * 7, return_entropy=True)
    (done.logp.sum() + (done.entropy * torch.arange(300)).sum()).backward()
    tensors = {"logp": done.logp, "entropy": done.entropy, "hidden": hidden.grad[::29, ::7]}
    results |= {f"logp {name}": numbers(x) for name, x in tensors.items()}
    return results


def numbers(x: Any) -> list[float]:
    return [float(n) for n in x.detach().double().flatten()]


def digest(x: Any) -> list[float]:
    """Two numbers that any changed bit changes."""
    import hashlib

    import torch

    data = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [float(int.from_bytes(hashlib.sha256(data).digest()[i : i + 6], "big")) for i in (0, 6)]


def in_fork(index: int, folder: str | None) -> tuple[Results | None, str]:
    """A run in a fork of this process, which has imported everything and run nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            text = json.dumps({"results": run_once(index, folder)})
        except BaseException:
            text = json.dumps({"error": traceback.format_exc()})
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return None, f"ended with status {status}"
    said = json.loads(text)
    return said.get("results"), said.get("error", "")


def in_process(index: int, folder: str | None) -> tuple[Results | None, str]:
    """A run in a new interpreter."""
    command = [sys.executable, __file__, "--worker", str(index)]
    command += [] if folder is None else ["--model", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout), ""


def compare(first: Results, found: Results) -> dict[str, Any]:
    """Which of a run's results have other bits than the first run's, and which are wrong."""
    bits, wrong = [], {}
    for name, want in first.items():
        got = found[name]
        pairs = zip(want, got, strict=True)
        if want == got or all(x == y or (x != x and y != y) for x, y in pairs):
            continue
        most = max(
            (float("inf") if (x != x) != (y != y) else abs(x - y))
            for x, y in zip(want, got, strict=True)
            if x == x or y == y
        )
        bits.append(name)
        if most > ROUNDING or name.startswith(EXACT):
            wrong[name] = most
    for name, got in found.items():
        if name.endswith("difference") and got[0] > ROUNDING:
            wrong[name] = got[0]
    return {"bits": bits, "wrong": wrong}


def burn() -> None:
    """Keep processors busy, with teams of threads as the runs have them."""
    import torch

    torch.set_num_threads(2)
    x = torch.randn(300, 300)
    while os.getppid() != 1:
        x = (x @ x).softmax(-1)


def soak(
    report: dict[str, Any], runs: int, run: Callable[[int], Any], save: Callable[[], None]
) -> None:
    for index in tqdm(range(report["runs"], runs), desc="runs", file=sys.stderr):
        found, error = run(index)
        report["runs"] = index + 1
        threads = str(threads_of(index))
        if found is None:
            report["died"].append({"run": index, "error": error})
        elif threads not in report["first"]:
            report["first"][threads] = found
            differs = compare(found, found)
        else:
            differs = compare(report["first"][threads], found)
        if found is not None:
            report["bits_differ"] += bool(differs["bits"])
            for name in differs["bits"]:
                report["bits_of"][name] = report["bits_of"].get(name, 0) + 1
            if differs["wrong"]:
                kept = {name: found[name] for name in differs["wrong"]}
                report["wrong"].append({"run": index, "by": differs["wrong"], "found": kept})
                print(f"run {index}, {threads} threads: {differs['wrong']}", file=sys.stderr)
        save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="runs in all")
    parser.add_argument("--load", type=int, default=0, help="processes that keep cores busy")
    parser.add_argument("--model", help="folder of a model that every run reads and scores too")
    parser.add_argument("--start", choices=["process", "fork"], default="process")
    parser.add_argument("--json", type=Path, help="the report, and what to go on from")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(run_once(args.worker, args.model)))
        return 0

    report: dict[str, Any] = {"runs": 0, "bits_differ": 0, "bits_of": {}, "wrong": [], "died": []}
    report["first"] = {}
    if args.json is not None and args.json.exists():
        report = json.loads(args.json.read_text())

    def save() -> None:
        if args.json is not None:
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps(report) + "\n")
            part.replace(args.json)

    run = in_process
    if args.start == "fork":
        import crossfade.ops.native  # noqa: F401
        from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401

        run = in_fork
    code = "import soak; soak.burn()"
    beside = {"cwd": Path(__file__).parent}
    burners = [subprocess.Popen([sys.executable, "-c", code], **beside) for _ in range(args.load)]
    try:
        soak(report, args.runs, lambda index: run(index, args.model), save)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    counts = {name: len(report[name]) for name in ("wrong", "died")}
    print(json.dumps({"runs": report["runs"], "bits_differ": report["bits_differ"], **counts}))
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
