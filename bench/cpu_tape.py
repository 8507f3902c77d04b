"""What a token costs on a CPU beyond the native kernels that read weights and caches.

A token's time is that between two looks of a streamer. Of the step's tape two parts are replayed in
turns: its linear layers and its attention, and the rest, which so finds the caches as in a step.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import crossfade as cf
import torch
from crossfade.decoding.engine.tape import program as programs
from crossfade.decoding.engine.tape import step as steps
from crossfade.decoding.engine.tape.instructions import Op
from decode_peers import ours, unending
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

KERNELS = {Op.LINEAR, Op.LINEAR_COLUMNS, Op.ATTENTION}
# The sizes of SmolLM2-135M, by the names that configs have for them.
SIZES: dict[str, int] = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
TINY: dict[str, int] = {
    "vocab_size": 509, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen 2": "qwen2", "Qwen 3": "qwen3",
    "Gemma 2": "gemma2", "Gemma 3": "gemma3_text", "Phi-3": "phi3", "OLMo 2": "olmo2",
    "GPT-2": "gpt2", "GPT-NeoX": "gpt_neox",
}  # fmt: skip


def family(kind: str, sizes: dict[str, int]) -> Any:
    """A model of a family, of these sizes and with random weights."""
    more: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        more["n_inner"] = sizes["intermediate_size"]
    config = AutoConfig.for_model(kind, **sizes, **more)
    torch.manual_seed(0)
    return unending(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


class Watch:
    """Notes each replay of a tape: how long it took and which program ran."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.inputs: list[Tensor] = []
        self.whole: Any = None
        self.kernels: Any = None
        self.rest: Any = None
        self.cache: Any = None


@contextlib.contextmanager
def watched(clock: Callable[[], float]) -> Iterator[Watch]:
    """Within this, steps that are recorded also get programs of their kernels and of the rest."""
    watch = Watch(clock)
    make, run, add = steps.program_of, programs.Program.run, programs._Writer._add

    def make_part(recording: Any, kernels: bool) -> Any:
        def add_some(writer: Any, place: int, step: Any) -> None:
            if (step.op in KERNELS) == kernels:
                add(writer, place, step)

        programs._Writer._add = add_some  # type: ignore[method-assign]
        try:
            part = make(recording)
        finally:
            programs._Writer._add = add  # type: ignore[method-assign]
        if kernels:
            part.parts = [p for p in part.parts if isinstance(p, tuple)]
        return part

    def make_all(recording: Any) -> Any:
        watch.kernels, watch.rest = (make_part(recording, kernels) for kernels in (True, False))
        watch.whole, watch.cache = make(recording), recording.cache
        return watch.whole

    def timed_run(program: Any, inputs: Sequence[Tensor]) -> None:
        start = clock()
        run(program, inputs)
        watch.seconds.append(clock() - start)
        watch.inputs = [x.clone() for x in inputs]

    steps.program_of = make_all
    programs.Program.run = timed_run  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        steps.program_of = make
        programs.Program.run = run  # type: ignore[method-assign]


def beyond(blend: Any, ids: Tensor, new: int, turns: int) -> dict[str, Any]:
    """Where the milliseconds of a token go, medians on one thread in processor time.

    Args:
        blend: what decodes after `ids` ``[B, n]``.
        new: tokens; `turns`: replays of each part.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock, ticks, tape = time.thread_time, [], []
    try:
        with watched(clock) as watch:

            def tick() -> None:
                ticks.append(clock())
                tape.append(sum(watch.seconds))

            ours(blend)(ids, new, True, tick)
            if watch.whole is None:
                return {"taped": False}
            pairs = list(zip(itertools.pairwise(ticks), itertools.pairwise(tape), strict=True))
            late = pairs[len(pairs) // 3 :]  # after the steps that modules run
            token = statistics.median(b - a for (a, b), _ in late)
            outside = statistics.median((b - a) - (d - c) for (a, b), (c, d) in late)
            kernels, rest = map(statistics.median, replays(watch, turns))
    finally:
        torch.set_num_threads(threads)
    return {
        "taped": True,
        "token_ms": round(1e3 * token, 3),
        "kernels_ms": round(1e3 * kernels, 3),
        "other_instructions_ms": round(1e3 * rest, 3),
        "outside_tape_ms": round(1e3 * outside, 3),
        "beyond_ms": round(1e3 * (rest + outside), 3),
        "torch_runs": sorted(set(watch.whole.called)),
    }


def replays(watch: Watch, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of replays of a tape's kernels and of all else in it, in turns."""
    inputs = watch.inputs
    found: tuple[list[float], list[float]] = ([], [])
    both = watch.kernels, watch.rest
    for program in both:
        program.bind(watch.cache)
    for _ in range(turns):
        for seconds, program in zip(found, both, strict=True):
            program.run(inputs)
            seconds.append(watch.seconds[-1])
    return found


def measure(
    blends: Iterable[tuple[str, Any]], new: int = 24, turns: int = 15
) -> Iterator[dict[str, Any]]:
    """A row for each blend, after a prompt of 59 tokens."""
    ids = torch.arange(100, 159)[None]
    for name, blend in blends:
        yield {"model": name, **beyond(blend, ids, new, turns)}


def families(quick: bool) -> Iterator[tuple[str, Any]]:
    """A model of each family, one after the other."""
    for name, kind in FAMILIES.items():
        yield name, cf.Model(family(kind, TINY if quick else SIZES))
