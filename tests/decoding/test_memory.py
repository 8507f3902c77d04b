"""A call holds no memory after it ends, and goes on in smaller batches where memory runs out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.kv_cache import KVCache
from crossfade.decoding.memory import is_out_of_memory
from crossfade.decoding.rows import Slots
from crossfade.decoding.simple.replica import Replica
from crossfade.decoding.simple.runner import CachedTerm
from sweeps import product
from tiny_models import EOS, lora, make, make_tokenizer
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ENGINES = {"engine": None, "simple": cf.Engine(simple=True)}
DRAW: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": True,
    "seed": 5,
    "eos_token_id": [EOS, 20, 30],
    "progress": False,
}
PROMPTS = [[7 + i, 9, 30 - i] for i in range(6)]


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """The classes of objects of a call that somebody still holds, without a garbage collection."""
    made: list[tuple[str, weakref.ref[Any]]] = []
    for kind in (Group, KVCache, Slots, Replica, CachedTerm, DynamicCache):

        def init(self: Any, *args: Any, _own: Any = kind.__init__, **kwargs: Any) -> None:
            made.append((type(self).__name__, weakref.ref(self)))
            _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", init)

    def held() -> list[str]:
        assert made
        return [name for name, x in made if x() is not None]

    gc.collect()
    gc.disable()
    try:
        yield held
    finally:
        gc.enable()


class Fails(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 5:
            raise OSError("the grammar is lost")
        return scores


def blends(base: PreTrainedModel) -> dict[str, tuple[Any, dict[str, Any]]]:
    guide, tokenizer = make("gpt2", 1), make_tokenizer()
    adapted = lora(2, lora(1, make("llama"), "tuned"), "ref")
    tuned, ref = (cf.Model(adapted, adapter=a) for a in ("tuned", "ref"))
    ratio = cf.LogRatio(cf.Model(guide), cf.Model(base))
    chunks = {"search": cf.ChunkBeamSearch(width=2, samples=2, chunk_length=2, value=ratio)}
    reward = cf.Reward(lambda prompts, texts: [float(len(t)) for t in texts])
    best = {"search": cf.BestOfN(2, value=reward), "tokenizer": tokenizer}
    cut = (1.5 * cf.Model(base) - 0.5 * cf.Model(guide)).within(cf.Support(min_p=0.2))
    return {
        "samples": (base, {"num_return_sequences": 3}),
        "adapters": (tuned - 0.5 * ref, {}),
        "support": (cut, {}),
        "values": (base, chunks),
        "rewards": (base, best),
        "exception": (base, {"logits_processor": [Fails()]}),
    }


@pytest.mark.parametrize(
    ("engine", "name"),
    product(
        list(ENGINES),
        ["samples", "adapters", "support", "values", "rewards", "exception"],
        together=1,
    ),
)
def test_nothing_is_held_when_a_call_ends(
    name: str, engine: str, base: PreTrainedModel, alive: Callable[[], list[str]]
) -> None:
    blend, arguments = blends(base)[name]
    with pytest.raises(RuntimeError) if name == "exception" else nullcontext() as raised:
        cf.generate(blend, PROMPTS, engine=ENGINES[engine], **arguments, **DRAW)
    del raised
    assert not alive()


def test_a_cache_is_held_by_who_has_it(
    base: PreTrainedModel, alive: Callable[[], list[str]]
) -> None:
    out = cf.generate(base, PROMPTS, return_cache=True, **DRAW)
    assert alive() == ["KVCache"]
    more = cf.generate(base, PROMPTS, cache=out.cache, return_cache=True, **DRAW)
    assert alive() == ["KVCache"], "the same buffers"
    del out
    assert alive() == ["KVCache"]
    del more
    assert not alive()


class Budget:
    """Has memory for so many rows of caches, whichever calls and models they are of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
        self.rows, self.error, self.held, self.asked = rows, error, 0, []  # type: ignore[var-annotated]
        reserve, prefill = KVCache.__init__, CachedTerm.prefill

        def engine(cache: KVCache, rows: int, *args: Any) -> None:
            reserve(cache, rows, *args)
            self.take(cache, rows)

        def simple(term: CachedTerm, prompts: Any, limit: int, *more: Any) -> Any:
            copies = more[0] if more else 1
            self.take(term, len(prompts.ids) * copies)
            return prefill(term, prompts, limit, *more)

        monkeypatch.setattr(KVCache, "__init__", engine)
        monkeypatch.setattr(CachedTerm, "prefill", simple)

    def take(self, holder: Any, rows: int) -> None:
        self.asked.append(rows)
        if self.held + rows > self.rows:
            raise type(self.error)(*self.error.args)
        self.held += rows
        weakref.finalize(holder, self.give_back, rows)

    def give_back(self, rows: int) -> None:
        self.held -= rows


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
    "windows": RuntimeError("not enough memory: you tried to allocate 8 bytes"),
    "native": MemoryError("std::bad_alloc"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
def test_what_running_out_of_memory_looks_like(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("a processor raised")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    for other in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize(("engine", "samples", "rows"), product(list(ENGINES), [1, 3], [1, 4]))
def test_batches_are_halved_until_they_fit(
    engine: str, samples: int, rows: int, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try begins with all memory free: what the last one held is let go."""
    arguments = {**DRAW, "num_return_sequences": samples, "engine": ENGINES[engine]}
    whole = cf.generate(base, PROMPTS, **arguments)
    budget = Budget(monkeypatch, rows, ERRORS["native"])
    gc.collect()
    gc.disable()
    try:
        out = cf.generate(base, PROMPTS, **arguments)
    finally:
        gc.enable()
    assert torch.equal(out.sequences, whole.sequences)
    torch.testing.assert_close(out.logprobs, whole.logprobs)
    fits = max(r for r in budget.asked if r <= rows)
    assert out.stats.notes[-1] == f"memory ran out: {fits} rows at a time"
    assert budget.held == 0


@pytest.mark.parametrize(
    ("engine", "samples", "at", "kind"),
    product(list(ENGINES), [1, 3], [0, 2], ["cpu", "native"]),
)
def test_memory_that_runs_out_in_the_middle(
    engine: str,
    samples: int,
    at: int,
    kind: str,
    base: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever rows have ended stay as they are, and the others begin again."""
    arguments = {**DRAW, "num_return_sequences": samples, "engine": ENGINES[engine]}
    whole = cf.generate(base, PROMPTS, **arguments)
    count = iter(range(10**6))
    for owner in (Group, CachedTerm):
        own = owner.step  # type: ignore[attr-defined]

        def step(self: Any, *args: Any, _own: Any = own) -> Any:
            if next(count) == at:
                raise type(ERRORS[kind])(*ERRORS[kind].args)
            return _own(self, *args)

        monkeypatch.setattr(owner, "step", step)
    out = cf.generate(base, PROMPTS, **arguments)
    assert torch.equal(out.sequences, whole.sequences)
    assert len(out.stats.notes) == 1


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_is_halved_by_whole_requests(
    engine: str, rows: int, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = cf.Reward(lambda prompts, texts: [float(len(t)) for t in texts])
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=2, value=reward)
    arguments = {**DRAW, "search": search, "tokenizer": make_tokenizer()}
    arguments["engine"] = ENGINES[engine]
    whole = cf.generate(base, PROMPTS, **arguments)
    Budget(monkeypatch, rows, ERRORS["cpu"])
    out = cf.generate(base, PROMPTS, **arguments)
    assert torch.equal(out.sequences, whole.sequences)
    monkeypatch.undo()
    Budget(monkeypatch, 3, ERRORS["cpu"])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        cf.generate(base, PROMPTS, **arguments)


def test_what_cannot_be_halved_is_an_error(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Budget(monkeypatch, 0, ERRORS["native"])
    with pytest.raises(MemoryError, match="bad_alloc"):
        cf.generate(base, PROMPTS, **DRAW)
    with pytest.raises(MemoryError, match="bad_alloc"):
        cf.generate(base, PROMPTS, return_cache=True, **DRAW)


@pytest.mark.parametrize("kind", ERRORS)
def test_memory_that_ran_out_while_a_model_was_tried_is_no_reason_against_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, left = make(), [ERRORS[kind]]
    own = type(model.model.norm).forward

    def full_once(*args: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return own(*args, **options)

    monkeypatch.setattr(type(model.model.norm), "forward", full_once)
    for _ in range(2):
        notes = cf.generate(model, PROMPTS, **DRAW).stats.notes
        assert not any("simple path" in note for note in notes)
    assert not left
