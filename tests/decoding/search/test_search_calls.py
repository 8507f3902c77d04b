"""Searches beside everything else that a call of `generate` may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import crossfade as cf
import pytest
import torch
from search_cases import DRAW, PROMPTS, TEXTS
from tiny_models import make, make_letters
from transformers import PreTrainedTokenizerFast

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nothing was written to is NaN here; otherwise it may be a number by chance."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_a_support_with_models_that_rest() -> None:
    """A row that owes tokens holds fewer than it has in common with its new parent."""
    base, amateur, tuned, ref = (cf.Model(make("llama", seed)) for seed in range(4))
    blend = cf.presets.contrastive(base, amateur, alpha=0.2)
    search = cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref))
    outs = [
        cf.generate(blend, PROMPTS, search=search, engine=engine, max_batch=12, **DRAW)
        for engine in (cf.Engine(), cf.Engine(restrict_guides=False, skip_guides=False))
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_conversations_go_on_after_a_search(tokenizer: PreTrainedTokenizerFast) -> None:
    base, tuned, ref = (make("qwen3", seed) for seed in range(3))
    search = cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref))
    first = cf.generate(base, PROMPTS, search=search, return_cache=True, **DRAW)
    assert first.cache.rows == 4
    longer = [[*p, *r, 9] for p, r in zip(PROMPTS, first.responses, strict=True)]
    on = cf.generate(base, longer, search=search, cache=first.cache, **DRAW)
    anew = cf.generate(base, longer, search=search, **DRAW)
    assert torch.equal(on.sequences, anew.sequences)
    assert on.stats.models[0].tokens < anew.stats.models[0].tokens


def test_stop_strings_end_rows() -> None:
    base = cf.Model(make("llama"), tokenizer=make_letters())
    value = cf.Reward(lambda prompts, texts: [float(len(set(t))) for t in texts])
    settings = {**DRAW, "eos_token_id": None, "stop_strings": ["a", "nd"]}
    search = cf.ChunkBeamSearch(2, 2, 4, value)
    out = cf.generate(base, ["qbc", "th", "zxy"], search=search, **settings)
    ended = ["a" in t or "nd" in t for t in out.text]
    assert ended == out.finished.tolist()
    assert any(ended)


def test_time_that_is_up_gives_the_best_so_far(tokenizer: PreTrainedTokenizerFast) -> None:
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    value = cf.Reward(lambda prompts, texts: [float(len(t)) for t in texts])
    search = cf.ChunkBeamSearch(2, 3, 40, value)
    out = cf.generate(
        base, TEXTS, search=search, max_time=0.0, num_return_sequences=2, **{**DRAW, "seed": 9}
    )
    assert out.values.flatten().tolist() == [float(len(t)) for t in out.text]
    assert (out.values[:, 0] >= out.values[:, 1]).all()
    assert len(set(out.text)) > 3
    assert not out.ended.any()


@pytest.mark.filterwarnings("ignore:interrupted when:RuntimeWarning")
def test_an_interrupt_keeps_what_has_ended(tokenizer: PreTrainedTokenizerFast) -> None:
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    calls = 0

    def value(prompts: list[Any], texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return [1.0] * len(texts)

    search = cf.BestOfN(4, cf.Reward(value))
    out = cf.generate(base, TEXTS, search=search, max_batch=4, **DRAW)
    assert out.ended.tolist() == [True, True, False]
    assert out.values[:2].tolist() == [1.0, 1.0]
    assert out.values[2].isnan()
    assert out.stats.interrupted


def test_recipes_and_the_hook() -> None:
    base, tuned, ref, q = (make("llama", seed) for seed in range(4))
    recipe = cf.presets.ivg(base, tuned, ref, cf.ValueHead(q), beta=0.5, samples=2, width=2)
    assert str(recipe.blend) == "base + 0.5*tuned - 0.5*ref"
    one = cf.generate(recipe, PROMPTS, **DRAW)
    other = cf.generate(recipe.blend, PROMPTS, search=recipe.search, **DRAW)
    assert torch.equal(one.sequences, other.sequences)
    with pytest.raises(ValueError, match="search is given twice"):
        cf.generate(recipe, PROMPTS, search=recipe.search, **DRAW)
    ids = torch.tensor([PROMPTS[0]])
    hooked = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=cf.decode,
        blend=recipe,
        do_sample=True,
        top_k=0,
        **DRAW,
    )
    assert torch.equal(hooked, cf.generate(recipe, ids, **DRAW).sequences)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"do_sample": False}, ValueError, "do_sample is False"),
    ({"num_return_sequences": 3}, ValueError, "num_return_sequences is 3; it must be at most 2"),
    ({"search": 4}, TypeError, "search is a int"),
    ({"num_beams": 2}, NotImplementedError, "num_beams"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2][:20] for b in BAD])
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    base, tuned, ref = (make("llama", seed) for seed in range(3))
    settings = {"search": cf.ChunkBeamSearch(2, 2, 4, cf.LogRatio(tuned, ref)), **DRAW, **arguments}
    with pytest.raises(error, match=message):
        cf.generate(base, PROMPTS, **settings)


def test_what_a_value_needs_is_asked_for_first(tokenizer: PreTrainedTokenizerFast) -> None:
    base = make("llama")
    reward = cf.Reward(lambda prompts, texts: [0.0] * len(texts), name="zero")
    with pytest.raises(ValueError, match="tokenizer is None; the value reads texts"):
        cf.generate(base, PROMPTS, search=cf.BestOfN(2, reward), **DRAW)
    bad: list[tuple[Callable[..., Any], type[Exception], str]] = [
        (lambda p, t: [0.0], ValueError, "short returned 1 scores; it must return 2"),
        (lambda p, t: None, TypeError, "short returned None"),
        (lambda p, t: ["x", "y"], TypeError, "short returned"),
    ]
    for fn, error, message in bad:
        search = cf.BestOfN(2, cf.Reward(fn, name="short"))
        with pytest.raises(error, match=message):
            cf.generate(cf.Model(base, tokenizer=tokenizer), ["the"], search=search, **DRAW)
    weights = cf.BestOfN(2, torch.ones(3) * cf.LogRatio(base, make("llama", 1)))
    with pytest.raises(ValueError, match="the weight of log_ratio is a tensor"):
        cf.generate(base, PROMPTS, search=weights, **DRAW)
