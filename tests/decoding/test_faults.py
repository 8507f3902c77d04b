"""What goes wrong in the middle: memory, interrupts, processors; nothing finished is lost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.kv_cache import KVCache
from crossfade.decoding.engine.runner import EngineRunner
from crossfade.decoding.rows import Slots
from crossfade.decoding.simple.term_model import TermModel
from crossfade.decoding.watch import Watch
from tiny_models import EOS, make
from transformers import LogitsProcessor, PreTrainedModel

DRAW: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": True,
    "seed": 5,
    "eos_token_id": [EOS, 20, 30, 40, 50],
    "progress": False,
}
PROMPTS = [[7 + i, 9, 30 - i] for i in range(10)]


def after(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
    """Let the engine's step fail when it is called for the `calls`-th time."""
    step, count = Group.step, iter(range(10**6))

    def failing(self: Group, *args: Any) -> Any:
        if next(count) == calls:
            raise error
        return step(self, *args)

    monkeypatch.setattr(Group, "step", failing)


def test_an_interrupt_keeps_what_is_finished(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cf.generate(base, PROMPTS, **DRAW)
    after(monkeypatch, 14, KeyboardInterrupt())
    with pytest.warns(RuntimeWarning, match=r"interrupted when [1-9] of 10 rows had ended"):
        out = cf.generate(base, PROMPTS, max_batch=3, **DRAW)
    assert out.finished.any()
    assert not out.finished.all()
    for ours, theirs, done in zip(out.responses, whole.responses, out.finished, strict=True):
        assert ours == theirs if done else ours == theirs[: len(ours)]
    assert out.responses[9] == []
    assert not out.failed.any()
    assert out.stats.interrupted
    assert not whole.stats.interrupted
    assert whole.ended.all()
    assert out.finished.sum() <= out.ended.sum() < 10
    assert out.logprobs[9].abs().sum() == 0


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Slots, "seat"),
        (Slots, "start"),
        (Slots, "take"),
        (Watch, "seat"),
        (Watch, "leave"),
        (EngineRunner, "join"),
        (EngineRunner, "read"),
        (EngineRunner, "leave"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_an_interrupt_while_rows_come_and_go(
    kind: type, name: str, first: bool, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come between any two lines: no row is lost, and none gets another one's tokens."""
    whole = cf.generate(base, PROMPTS, **DRAW)
    call, count = getattr(kind, name), iter(range(10**6))

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        now = next(count) == 3
        if now and first:
            raise KeyboardInterrupt
        found = call(self, *args, **options)
        if now:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(kind, name, interrupted)
    with pytest.warns(RuntimeWarning, match="interrupted when"):
        out = cf.generate(base, PROMPTS, max_batch=3, **DRAW)
    assert len(out.sequences) == len(PROMPTS)
    assert out.ended.any()
    for ours, theirs, done in zip(out.responses, whole.responses, out.ended, strict=True):
        assert ours == theirs if done else ours == theirs[: len(ours)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["cuda", "cpu"],
)
@pytest.mark.parametrize("calls", [0, 5])
def test_out_of_memory_takes_a_smaller_batch(
    error: Exception, calls: int, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cf.generate(base, PROMPTS, **DRAW)
    after(monkeypatch, calls, error)
    out = cf.generate(base, PROMPTS, max_batch=8, **DRAW)
    assert torch.equal(out.sequences, whole.sequences)
    torch.testing.assert_close(out.logprobs, whole.logprobs)
    assert out.stats.notes == ("memory ran out: 4 rows at a time",)


def test_out_of_memory_for_one_row_is_an_error(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        cf.generate(base, PROMPTS, max_batch=1, **DRAW)


class FailsAt(LogitsProcessor):
    """Raises when a row's last token is `token`."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if (input_ids[:, -1] == self.token).any():
            raise OSError("the grammar is lost")
        return scores


def test_a_processor_that_raises_names_the_request(base: PreTrainedModel) -> None:
    message = r"logits_processor FailsAt raised OSError at token 0 of request 6: the grammar is"
    with pytest.raises(RuntimeError, match=message):
        cf.generate(base, PROMPTS, logits_processor=[FailsAt(24)], **DRAW)
    message = "at token 0 of request 6, sample 0: the grammar is lost"
    with pytest.raises(RuntimeError, match=message):
        cf.generate(base, PROMPTS, logits_processor=[FailsAt(24)], num_return_sequences=2, **DRAW)


def test_a_bad_row_among_rows_that_come_and_go() -> None:
    bad = make(seed=1)
    with torch.no_grad():
        bad.model.embed_tokens.weight[60] = float("nan")
    prompts = [[60] if i == 6 else [3] for i in range(10)]
    blend = cf.Model(make()) + 0.1 * cf.Model(bad, prompt=prompts, name="guide")
    arguments = {**DRAW, "eos_token_id": [EOS, 20, 60]}
    with pytest.warns(RuntimeWarning, match="request 6 was ended at its token 0: guide gave"):
        whole = cf.generate(blend, PROMPTS, engine=cf.Engine(simple=True), **arguments)
    with pytest.warns(RuntimeWarning, match="request 6 was ended at its token 0: guide gave"):
        out = cf.generate(blend, PROMPTS, max_batch=3, engine=cf.Engine(sync_every=2), **arguments)
    assert torch.equal(out.sequences, whole.sequences)
    assert out.failed.tolist() == whole.failed.tolist() == [i == 6 for i in range(10)]


def test_models_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an error in the middle of a forward leaves no module with another forward."""
    model = make()

    def state() -> list[Any]:
        return [
            model.config._attn_implementation,
            *("forward" in m.__dict__ for m in model.modules()),
        ]

    before = state()
    cf.generate(model, PROMPTS, **DRAW)
    assert state() == before
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cf.generate(model, PROMPTS, **DRAW)
    handle.remove()
    assert state() == before
    seen: list[list[Any]] = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(state())
            return scores

    cf.generate(model, PROMPTS, logits_processor=[Looks()], **DRAW)
    assert seen, "a processor may run the model itself"
    assert all(s == before for s in seen)


def test_the_engine_holds_to_its_statement(base: PreTrainedModel) -> None:
    """`cache_bytes` is what the caches' buffers take, and nothing else grows with rows' lengths."""
    config = base.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    arguments = {**DRAW, "max_new_tokens": 50, "eos_token_id": None}
    few, many = (
        cf.generate(base, [[5] * 20] * rows, max_batch=rows, **arguments) for rows in (2, 8)
    )
    slots = -(-(20 + 50) // 64) * 64
    assert few.stats.cache_bytes == 2 * slots * row
    assert many.stats.cache_bytes == 8 * slots * row
    assert many.stats.peak_bytes >= many.stats.cache_bytes
    waiting = cf.generate(base, [[5] * 20] * 8, max_batch=2, **arguments)
    assert waiting.stats.cache_bytes == few.stats.cache_bytes, "rows that wait take nothing"


def test_caches_grow_in_steps(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossfade.decoding.engine.group.AHEAD", 4)
    monkeypatch.setattr("crossfade.decoding.engine.kv_cache.STEP", 4)
    moved: list[int] = []
    reserve = KVCache.reserve

    def counted(self: KVCache, capacity: int, most: int) -> bool:
        grown = reserve(self, capacity, most)
        moved.extend([capacity] * grown)
        return grown

    monkeypatch.setattr(KVCache, "reserve", counted)
    arguments = {**DRAW, "max_new_tokens": 100, "eos_token_id": None}
    ours = cf.generate(base, PROMPTS, **arguments)
    theirs = cf.generate(base, PROMPTS, engine=cf.Engine(simple=True), **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert 2 <= len(moved) <= 5


def allocated(run: Callable[[], cf.Output]) -> tuple[int, cf.Output]:
    """The most bytes that torch held at a time during a call, and what it gave."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        out = run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, out


def test_caches_that_move_for_a_prompt_are_told_at_the_next_step(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a prompt may move buffers too; a captured step would go on with the old ones."""
    group = Group([TermModel(base, "base")], [0], slots=2, longest=20, limit=280)

    def read(rows: list[int], prompts: list[list[int]]) -> None:
        group.join(rows, prompts)
        while group.unread:
            group.read()
        group.begin(rows, prompts)

    monkeypatch.setattr("crossfade.decoding.engine.kv_cache.STEP", 4)
    read([0, 1], [[5, 6, 7], [8, 9]])
    assert not group.reserve()
    read([1], [[8, *range(5, 60), *range(5, 60)] * 3])
    assert group.reserve()
    assert not group.reserve()


def test_the_engine_states_its_peak(base: PreTrainedModel) -> None:
    """All that torch allocates beyond `peak_bytes` is a step's activations, once more while it is
    recorded, and the results."""
    cf.generate(base, PROMPTS, **DRAW)  # What is found out about the model stays.
    beyond = []
    for new in (50, 100, 400):
        arguments = {**DRAW, "max_new_tokens": new, "eos_token_id": None}
        most, out = allocated(lambda a=arguments: cf.generate(base, PROMPTS, **a))
        assert most >= out.stats.cache_bytes
        results = 10 * new * (8 + 8 + 4 + 4)  # sequences, written tokens, two kinds of log-probs
        beyond.append(most - out.stats.peak_bytes - results)
    assert max(beyond) - min(beyond) < 30_000
    assert max(beyond) < 60_000
