"""Caches say what they hold: whatever was done with one, a call that goes on with it is right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import crossfade as cf
import hypothesis.strategies as st
import pytest
import torch
from crossfade.decoding.engine.options import Engine
from crossfade.decoding.search.readers import Reader, log_prob
from crossfade.decoding.simple.term_model import TermModel
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule
from tiny_models import EOS, lora, make
from transformers import LogitsProcessor, PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

DRAW: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "seed": 5, "eos_token_id": EOS}
PROMPTS = [[7, 9, 30, 12, 40], [8, 9, 10, 11, 12, 13, 14], [5, 40]]


def same(ours: cf.Output, theirs: cf.Output) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-5, rtol=1e-4)


def longer(prompts: list[list[int]], out: cf.Output, *tokens: int) -> list[list[int]]:
    return [[*p, *r, *tokens] for p, r in zip(prompts, out.responses, strict=True)]


def goes_on(blend: Any, prompts: list[list[int]], cache: Any, **more: Any) -> cf.Output:
    """Make a call with a cache, and check that it gives what it gives without."""
    out = cf.generate(blend, prompts, cache=cache, return_cache=True, **{**DRAW, **more})
    same(out, cf.generate(blend, prompts, **{**DRAW, **more}))
    return out


class Conversations(RuleBasedStateMachine):
    """Calls over two rows, each with any cache that an earlier one gave or was given."""

    caches = Bundle("caches")
    tails = st.lists(st.integers(5, 60), min_size=1, max_size=4)

    @initialize(target=caches, shape=st.sampled_from(["llama", "gemma3"]))
    def begin(self, shape: str) -> Any:
        model = make(shape)
        self.model = lora(2, lora(1, model, "tuned", modules=["q_proj"]), "ref", modules=["q_proj"])
        self.blend = cf.Model(self.model) - 0.3 * cf.Model(self.model, adapter=None, prompt=[9, 8])
        prompts = [[7, 9, 30, 12], [8, 9]]
        return prompts, cf.generate(self.blend, prompts, return_cache=True, **DRAW).cache

    @rule(target=caches, kept=caches, tail=tails, seed=st.integers(0, 3))
    def another_turn(self, kept: Any, tail: list[int], seed: int) -> Any:
        prompts = [[*p, *tail] for p in kept[0]]
        return prompts, goes_on(self.blend, prompts, kept[1], seed=seed).cache

    @rule(target=caches, kept=caches, tail=tails, at=st.integers(0, 3))
    def another_text(self, kept: Any, tail: list[int], at: int) -> Any:
        """Make a text shorter, or another from some token on."""
        prompts = [[*p[:at], *tail] for p in kept[0]]
        return prompts, goes_on(self.blend, prompts, kept[1]).cache

    @rule(target=caches, kept=caches, tail=tails)
    def samples_of_one_prompt(self, kept: Any, tail: list[int]) -> Any:
        """Both rows are samples of one request: the second becomes a copy of the first."""
        prompts = [[*kept[0][0], *tail]]
        out = goes_on(self.blend, prompts, kept[1], num_return_sequences=2)
        return [prompts[0], prompts[0]], out.cache

    @rule(kept=caches)
    def samples_of_each_prompt(self, kept: Any) -> None:
        goes_on(self.blend, kept[0], kept[1], num_return_sequences=2)

    @rule(kept=caches)
    def a_search(self, kept: Any) -> None:
        """Rows of a search fork, and one row of each group is kept."""
        ratio = cf.LogRatio(
            cf.Model(self.model, adapter="tuned"), cf.Model(self.model, adapter="ref")
        )
        search = cf.ChunkBeamSearch(width=1, samples=2, chunk_length=2, value=ratio)
        prompts = kept[0][:1]
        out = goes_on(self.blend, prompts, kept[1], search=search)
        goes_on(self.blend, longer(prompts, out, 33), out.cache)

    @rule()
    def a_step_of_training(self) -> None:
        with torch.no_grad():
            next(p for n, p in self.model.named_parameters() if "tuned" in n).add_(0.1)

    @rule(adapter=st.sampled_from(["tuned", "ref"]))
    def set_adapter(self, adapter: str) -> None:
        self.model.set_adapter(adapter)


Conversations.TestCase.settings = settings(
    max_examples=8, stateful_step_count=8, deadline=None, derandomize=True
)


def test_conversations() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Conversations, settings=Conversations.TestCase.settings)


def test_a_cache_that_samples_wrote_into(base: PreTrainedModel) -> None:
    """Samples of one request fork its row into the slots of the other."""
    first = cf.generate(base, PROMPTS[:2], return_cache=True, **DRAW)
    prompts = longer(PROMPTS[:2], first, 25)
    goes_on(base, prompts[:1], first.cache, num_return_sequences=2)
    goes_on(base, prompts, first.cache)


def test_a_call_that_is_cut_leaves_its_cache_right(base: PreTrainedModel) -> None:
    first = cf.generate(base, PROMPTS, return_cache=True, **DRAW)
    prompts = longer(PROMPTS, first, 25)

    class Stops(LogitsProcessor):
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == max(map(len, others)) + 2:
                raise self.error
            return scores

    others = [[*p[:3], 33, 34] for p in PROMPTS]
    arguments = {**DRAW, "cache": first.cache}
    with pytest.raises(RuntimeError, match="Stops raised OSError"):
        cf.generate(base, others, logits_processor=[Stops(OSError)], **arguments)
    with pytest.warns(RuntimeWarning, match="interrupted when"):
        cf.generate(base, others, logits_processor=[Stops(KeyboardInterrupt)], **arguments)
    goes_on(base, prompts, first.cache)
    goes_on(base, others, first.cache)


def scaled(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.scaling["tuned"] = 3.0


def around_versions(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(1.01)


def loaded(model: Any) -> None:
    model.load_state_dict({n: p * 1.01 for n, p in model.state_dict().items()}, assign=True)


def merged(model: Any) -> None:
    model.merge_adapter(["tuned"])


def optimized(model: Any) -> None:
    model.get_base_model().model.norm.weight.grad = None
    tuned = [p for n, p in model.named_parameters() if "tuned" in n]
    for p in tuned:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(tuned, lr=1e-3).step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda model: model.set_adapter("ref"),
    "a scaling": scaled,
    "a merge": merged,
    "an optimizer's step": optimized,
    "writes around versions": around_versions,
    "other parameters": loaded,
    "another dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_model_that_changed_reads_anew(name: str) -> None:
    model = lora(2, lora(1, make("llama"), "tuned"), "ref")
    model.set_adapter("tuned")
    blend = cf.Model(model) + 0.2 * cf.Model(make("gpt2"), name="guide")
    first = cf.generate(blend, PROMPTS, return_cache=True, **DRAW)
    prompts = longer(PROMPTS, first, 25)
    kept = cf.generate(blend, prompts, cache=first.cache, **DRAW)
    assert not kept.stats.notes, "what stays as it is, is not read again"
    assert kept.stats.models[0].tokens < sum(map(len, prompts))
    CHANGES[name](model)
    out = goes_on(blend, prompts, first.cache)
    (note,) = (n for n in out.stats.notes if "has changed" in n)
    assert note.endswith("has changed since the cache was filled: it reads anew")
    model_read, guide_read = (m.tokens for m in out.stats.models)
    assert guide_read < sum(map(len, prompts)) <= model_read, "the guide has not changed"
    again = cf.generate(blend, longer(prompts, out, 26), cache=out.cache, **DRAW)
    assert not any("has changed" in n for n in again.stats.notes)


def test_adapters_that_are_named_do_not_depend_on_the_active_one() -> None:
    model = lora(2, lora(1, make("llama"), "tuned"), "ref")
    blend = cf.Model(model, adapter="tuned") - 0.5 * cf.Model(model, adapter=None)
    first = cf.generate(blend, PROMPTS, return_cache=True, **DRAW)
    model.set_adapter("ref")
    assert not goes_on(blend, longer(PROMPTS, first, 25), first.cache).stats.notes


def test_two_calls_take_turns_with_a_cache(base: PreTrainedModel) -> None:
    """A call that would write where another writes is refused at once; one that copies is not."""
    first = cf.generate(base, PROMPTS, return_cache=True, **DRAW)
    prompts = longer(PROMPTS, first, 25)
    found: list[Any] = []

    class Calls(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not found:
                for more in ({}, {"num_return_sequences": 2}):
                    with pytest.raises(ValueError, match="cache is in use by a call under way"):
                        cf.generate(base, prompts, cache=first.cache, **more, **DRAW)
                    found.append(more)
            return scores

    out = cf.generate(base, prompts, cache=first.cache, logits_processor=[Calls()], **DRAW)
    same(out, cf.generate(base, prompts, **DRAW))
    assert len(found) == 2
    goes_on(base, prompts, first.cache)

    alone = cf.generate(base, prompts, num_return_sequences=2, **DRAW)
    outs: list[cf.Output] = []

    def samples() -> None:
        arguments = {**DRAW, "num_return_sequences": 2, "progress": False}
        outs.append(cf.generate(base, prompts, cache=first.cache, **arguments))

    threads = [threading.Thread(target=samples) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert len(outs) == 3
    for o in outs:
        same(o, alone)


def test_a_text_that_changes_inside_its_prompt_is_read_again_from_there(
    base: PreTrainedModel,
) -> None:
    """A reward model's text does so if a response changes how the end of the prompt is encoded."""
    reader = Reader(log_prob(61), [TermModel(base, "base")], [5], 1, 20, Engine())

    def score(text: list[int]) -> float:
        ((found,),) = reader.read([0], [[text]], [[5]])
        return sum(found)

    reader.join([0], [[[7, 9, 30, 12, 40]]], [20])
    score([7, 9, 31, 12, 40, 8, 9])  # The third token is another one.
    reader.join([0], [[[7, 9, 30, 12, 40]]], [20])  # Another row takes the slot.
    expected = cf.score(base, [[7, 9, 30, 12, 40]], [[8, 9]]).totals
    assert score([7, 9, 30, 12, 40, 8, 9]) == pytest.approx(float(expected), abs=1e-4)
