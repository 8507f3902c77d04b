"""Benchmarks of the ops: ours, the torch chain that users write, and the read of the inputs.

All contenders of a case are measured in turn, round by round, over inputs larger than the caches,
so that their ratios hold on a noisy machine. On a GPU, times are of replayed CUDA graphs: device
time, without launches.
"""

from __future__ import annotations

import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops

COLD_BYTES = 256 << 20  # inputs in rotation: more than any last-level cache here holds
WEIGHTS = (1.0, 0.8, -0.8)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


@dataclass(frozen=True)
class Case:
    """Three terms of `[batch, vocab]`, sampled with one of `SETTINGS`."""

    dtype: str
    batch: int
    vocab: int
    setting: str

    @property
    def bytes(self) -> int:
        return len(WEIGHTS) * self.batch * self.vocab * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Result:
    """Medians in microseconds; `spread` is the interquartile range of ours over its median."""

    case: Case
    us: dict[str, float]
    spread: float
    read_gb_per_s: float


def cases(device: str, quick: bool) -> list[Case]:
    """What `crossfade bench ops` measures on a device."""
    if device == "cuda":
        vocab, batches, dtypes = 151_936, [1, 8, 64, 256], ["bfloat16", "float32"]
    else:
        vocab, batches, dtypes = 128_256, [1, 8, 32], ["float32", "bfloat16"]
    if quick:
        dtypes, batches = dtypes[:1], batches[:2]
    return [Case(*c) for c in itertools.product(dtypes, batches, (vocab,), SETTINGS)]


def chain(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor]:
    """What users write: weighted log-softmax, Hugging Face's processors, softmax, multinomial."""
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    if "top_k" in setting:
        processors.append(hf.TopKLogitsWarper(setting["top_k"]))
    if "top_p" in setting:
        processors.append(hf.TopPLogitsWarper(setting["top_p"]))
    ids: Any = torch.zeros(len(logits[0]), 1, dtype=torch.long, device=logits[0].device)

    def sample() -> Tensor:
        blended: Any = sum(
            w * z.float().log_softmax(-1) for w, z in zip(WEIGHTS, logits, strict=True)
        )
        return torch.multinomial(processors(ids, blended).softmax(-1), 1)

    return sample


def flashinfer(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor] | None:
    """FlashInfer's sampler on an eagerly blended row, where it is installed."""
    if logits[0].device.type != "cuda" or util.find_spec("flashinfer") is None:
        return None
    from flashinfer import sampling

    def sample() -> Tensor:
        blended: Any = sum(w * z.float() for w, z in zip(WEIGHTS, logits, strict=True))
        if "top_k" in setting:
            return sampling.top_k_top_p_sampling_from_logits(
                blended, setting["top_k"], setting["top_p"]
            )
        if "top_p" in setting:
            return sampling.top_p_sampling_from_probs(blended.softmax(-1), setting["top_p"])
        return sampling.sampling_from_logits(blended)

    return sample


def contenders(case: Case, device: str) -> dict[str, list[Callable[[], Any]]]:
    """Each contender as one call a set of inputs; the sets together are too large for a cache."""
    sets = max(2, -(-COLD_BYTES // case.bytes))
    if device == "cuda":  # a graph holds a launch or more for each
        sets = min(sets, 64)
    dtype, setting = getattr(torch, case.dtype), SETTINGS[case.setting]
    generator = torch.Generator(device).manual_seed(0)
    calls: dict[str, list[Callable[[], Any]]] = {}
    # a graph replays the same launches: on a GPU the step is a tensor, as a decoder has it
    step = torch.zeros(case.batch, dtype=torch.int64, device=device) if device == "cuda" else 0
    for _ in range(sets):
        z = [
            (2 * torch.randn(case.batch, case.vocab, generator=generator, device=device)).to(dtype)
            for _ in WEIGHTS
        ]

        def ours(z: list[Tensor] = z, **kw: Any) -> Any:
            return ops.blend_sample(z, WEIGHTS, seed=0, step=step, **setting, **kw)

        ways: dict[str, Callable[[], Any] | None] = {
            "read": read_of(z, device),
            "ours": ours,
            "torch chain": chain(z, setting),
            "flashinfer": flashinfer(z, setting),
        }
        if device == "cuda":
            ways["ours, Triton"] = functools.partial(ours, backend="triton")
        for name, call in ways.items():
            if call is not None:
                calls.setdefault(name, []).append(call)
    return calls


def read_of(z: list[Tensor], device: str) -> Callable[[], Any]:
    """The floor: a sum of all bytes as float32 on a CPU; a copy that moves as many on a GPU."""
    if device == "cpu":
        rows = [t.view(torch.float32) for t in z]  # two bfloat16 are added up as one float32
        return lambda: [r.sum() for r in rows]
    source = torch.cat([t.flatten() for t in z])
    half = source.numel() // 2  # a copy reads and writes: half of the inputs move all their bytes
    target = torch.empty_like(source[:half])
    return lambda: target.copy_(source[:half])


def check(case: Case, device: str) -> None:
    """The result before its time: tokens equal the reference's on rows of this size."""
    generator = torch.Generator(device).manual_seed(1)
    z = [
        torch.randn(2, case.vocab, generator=generator, device=device).to(
            getattr(torch, case.dtype)
        )
        for _ in WEIGHTS
    ]
    kw: dict[str, Any] = {"seed": 3, "step": 1, **SETTINGS[case.setting]}
    got, truth = (ops.blend_sample(z, WEIGHTS, backend=b, **kw) for b in (None, "reference"))
    torch.testing.assert_close(got.tokens, truth.tokens)
    torch.testing.assert_close(got.logprobs, truth.logprobs, atol=1e-4, rtol=0)


def cpu_times(calls: dict[str, list[Callable[[], Any]]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of single calls, the contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for ways in calls.values():
        ways[0]()
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for name, ways in calls.items():
            call = ways[turn % len(ways)]
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
        if turn >= 6 and time.perf_counter() > end:
            return times
    raise AssertionError


def cuda_times(calls: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call from graphs of one call a set of inputs, replayed in turns."""
    graphs = {}
    for name, ways in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # which makes the inputs
        with torch.cuda.stream(side):
            for call in ways[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in ways:
                    call()
        except RuntimeError as error:  # a peer that waits for the device
            print(f"{name} cannot be captured: {error}", file=sys.stderr)
            continue
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(calls[name]))
    return times


def measure(case: Case, device: str, seconds: float) -> Result:
    check(case, device)
    calls = contenders(case, device)
    times = cpu_times(calls, seconds) if device == "cpu" else cuda_times(calls, 15)
    us = {name: statistics.median(t) for name, t in times.items()}
    low, _, high = statistics.quantiles(times["ours"], n=4)
    return Result(case, us, (high - low) / us["ours"], case.bytes / us["read"] / 1e3)


def eager_calls_us(device: str) -> list[float]:
    """The cost of eager calls on tiny inputs: all of it, the kernel of 8 tokens too."""
    z = [torch.randn(1, 8, device=device) for _ in WEIGHTS]
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(500):
            ops.blend_sample(z, WEIGHTS, seed=0, step=0)
        samples.append((time.perf_counter() - start) / 500 * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return samples


def hardware(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    from .ops import native

    isa = native._native.cpu_isa() if native._native else "none"
    return {"device": name, "threads": torch.get_num_threads(), "isa": isa}


def run_ops(
    quick: bool = False, output: Path | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measures all cases; writes them as JSON to `output` where given, case by case."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {
        "command": "crossfade bench ops" + (" --quick" if quick else ""),
        "hardware": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "results": [],
    }
    eager: list[float] = []  # spread over the run, as the machine's speed is not even
    for case in tqdm(cases(device, quick), desc="bench ops", file=sys.stderr):
        result = measure(case, device, seconds=1.0 if quick else 4.0)
        eager += eager_calls_us(device)
        report["eager_call_us"] = round(statistics.median(eager), 2)
        report["results"].append(
            {
                **asdict(result.case),
                "us": {name: round(t, 2) for name, t in result.us.items()},
                "spread": round(result.spread, 3),
                "read_gb_per_s": round(result.read_gb_per_s, 1),
            }
        )
        if output is not None:
            output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as the lines of a Markdown table."""
    names = list(dict.fromkeys(n for r in report["results"] for n in r["us"] if n != "read"))
    peers = [n for n in names if n != "ours"]
    yield (
        "| inputs | sampling | read, us | ours, us | ours / read | "
        + " | ".join(f"{p} / ours" for p in peers)
        + " |"
    )
    yield "|---" * (5 + len(peers)) + "|"
    for r in report["results"]:
        us = r["us"]
        ratios = [f"{us[p] / us['ours']:.1f}" if p in us else "-" for p in peers]
        yield (
            f"| {r['dtype']} {r['batch']} x {r['vocab']:,} | {r['setting']} | {us['read']:,.0f} | "
            f"{us['ours']:,.0f} | {us['ours'] / us['read']:.2f} | " + " | ".join(ratios) + " |"
        )
