"""Whatever guesses, the tokens are those of decoding without a draft, and so are their figures."""

from __future__ import annotations

import functools
from typing import Any

import crossfade as cf
import pytest
from drafted import GREEDY, PROMPTS, SAMPLED, blend, both, changed, model, noise
from sweeps import every, product
from tiny_models import SHAPES, lora, make

# PEFT 0.21 uses a name that Transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LIMITS = [14, 3, 20, 1, 24]
OWN: dict[str, Any] = {
    "temperature": [0.7, 1.0, 1.4, 0.0, 1.0],
    "top_k": [0, 5, 20, 0, 3],
    "top_p": [0.9, 1.0, 0.8, 1.0, 1.0],
    "seed": [3, 2**63 + 5, 9, 9, 0],
}
OTHER = {"llama": "gpt2", "gpt2": "qwen3", "qwen3": "gemma3", "gemma3": "llama"}
KINDS = ["prompt", "right", "wrong", "mixed", "a term", "a model", "a blend", "the target"]
LENGTHS = [1, 3, "auto"]


def draft_of(kind: str, target: Any, responses: list[list[int]], length: Any) -> cf.Draft:
    rows = len(responses)
    if kind == "prompt":
        return cf.Draft("prompt", length=length)
    texts: dict[str, Any] = {
        "right": responses,
        "wrong": noise(rows, 50),
        # One goes on past the limit, one has a token changed, the others are nothing.
        "mixed": [changed(responses[0], 4), None, responses[2] + noise(1, 50)[0], [], [60]],
    }
    if kind in texts:
        return cf.Draft(texts=texts[kind], length=length)
    models: dict[str, Any] = {
        "a term": target.terms[1],
        "a model": model("qwen3", 8),
        "a blend": 0.6 * target.terms[0] + 0.6 * cf.Model(model("llama", 9)),
        "the target": target,
    }
    return cf.Draft(models[kind], length=length)


@pytest.mark.parametrize(
    ("shape", "kind", "length", "sampled"),
    product([*SHAPES], KINDS, LENGTHS, [True, False], together=1),
)
def test_the_same_tokens(shape: str, kind: str, length: Any, sampled: bool) -> None:
    """Five requests in three places, so that rows join late and are at steps of their own."""
    target = blend(shape, OTHER[shape])
    how = {**SAMPLED, **OWN} if sampled else GREEDY
    how = {**how, "max_new_tokens": LIMITS, "max_batch": 3}
    plain = cf.generate(target, PROMPTS, **how)
    draft = draft_of(kind, target, plain.responses, length)
    found = both(target, PROMPTS, draft, plain, **how)
    assert [len(r) for r in found.drafted.responses] == LIMITS
    if length != "auto" and kind in ("right", "the target"):
        stats = found.drafted.stats
        assert stats.right == stats.guessed > 0
        assert found.drafted.tokens_by_draft.tolist()[3] == 0


@pytest.mark.parametrize(
    ("kind", "shape"), product(["mixed", "a model"], [*SHAPES][:2], together=1)
)
def test_the_longest_drafts(kind: str, shape: str) -> None:
    target = blend(shape, OTHER[shape])
    how = {**SAMPLED, "max_new_tokens": [20, 2, 9, 1, 12], "max_batch": 3}
    plain = cf.generate(target, PROMPTS, **how)
    both(target, PROMPTS, draft_of(kind, target, plain.responses, 64), plain, **how)


@functools.cache
def adapted(shape: str) -> Any:
    if shape == "gpt2":
        how: dict[str, Any] = {"modules": ("c_attn", "c_fc"), "fan_in_fan_out": True}
    else:
        how = {}
    return lora(4, lora(3, make(shape, 0), "tuned", **how), "other", **how)


@pytest.mark.parametrize(
    ("shape", "length", "which"),
    product([*SHAPES], [2, "auto"], [None, "tuned", "other"], together=1),
)
def test_adapters_guess(shape: str, length: Any, which: str | None) -> None:
    """One of a term's backbone: the base, which is a term, one that is, and one that is none."""
    base, tuned = (cf.Model(adapted(shape), adapter=name) for name in (None, "tuned"))
    target = base + 0.8 * (tuned - base)
    draft = cf.Draft(cf.Model(adapted(shape), adapter=which), length=length)
    how = {**SAMPLED, "max_batch": 3, "max_new_tokens": LIMITS, "return_term_logprobs": True}
    both(target, PROMPTS, draft, **how)


@pytest.mark.parametrize("which", ["tuned", "other"])
def test_an_adapter_alone_is_guessed_by_its_like(which: str) -> None:
    tuned = cf.Model(adapted("llama"), adapter="tuned")
    draft = cf.Draft(cf.Model(adapted("llama"), adapter=which), length=3)
    found = both(tuned, PROMPTS, draft, **SAMPLED, max_new_tokens=20)
    stats = found.drafted.stats
    assert (stats.right == stats.guessed) == (which == "tuned")


def test_windows_shorter_than_prompts() -> None:
    """Guesses that are wrong leave nothing behind in a window of 4 tokens."""
    target = cf.Model(model("gemma3", 0)) - 0.3 * cf.Model(model("gemma3", 1))
    prompts = noise(3, 30, seed=1)
    plain = cf.generate(target, prompts, **SAMPLED, max_new_tokens=30)
    texts = [[*r[:9], *x] for r, x in zip(plain.responses, noise(3, 40), strict=True)]
    for draft in (cf.Draft(texts=texts, length=7), cf.Draft(model("gemma3", 1), length=7)):
        both(target, prompts, draft, plain, **SAMPLED, max_new_tokens=30)


@pytest.mark.parametrize(
    ("options", "kind"),
    product(
        [{"kernels": False}, {"share_weights": False}, {"tape": False}],
        ["mixed", "a term", "a model"],
        together=1,
    ),
)
def test_however_the_engine_runs(options: dict[str, Any], kind: str) -> None:
    target = blend()
    how = {**SAMPLED, "engine": cf.Engine(**options), "max_new_tokens": 12}
    plain = cf.generate(target, PROMPTS, **how)
    both(target, PROMPTS, draft_of(kind, target, plain.responses, 3), plain, **how)


def test_texts_are_read_as_texts(tokenizer: Any) -> None:
    target = cf.Model(model(), tokenizer=tokenizer)
    prompts = ["the film was", "a great plot w3 w4"]
    plain = cf.generate(target, prompts, **SAMPLED, max_new_tokens=12)
    texts = tokenizer.batch_decode(plain.responses)
    drafted = cf.generate(
        target, prompts, draft=cf.Draft(texts=texts, length=4), **SAMPLED, max_new_tokens=12
    )
    assert drafted.responses == plain.responses
    assert drafted.stats.acceptance == 1.0


@pytest.mark.parametrize("kind", every(2, ["prompt", "a term", "a model"]))
def test_several_rows_of_a_request(kind: str) -> None:
    target = blend()
    draft = draft_of(kind, target, PROMPTS, 3)
    how = {**SAMPLED, "num_return_sequences": 3, "max_batch": 4, "max_new_tokens": [9, 17, 2, 1, 5]}
    both(target, PROMPTS, draft, **how)


def test_a_text_serves_all_rows_of_its_request() -> None:
    how = {**GREEDY, "max_new_tokens": 15}
    plain = cf.generate(blend(), PROMPTS[:2], **how).responses
    draft = cf.Draft(texts=[plain[0], None], length=5)
    found = both(
        blend(),
        PROMPTS[:2],
        draft,
        **{**how, "do_sample": True},
        top_k=1,
        num_return_sequences=2,
        seed=1,
    )
    assert found.drafted.tokens_by_draft.tolist()[2:] == [0, 0]
    assert min(found.drafted.tokens_by_draft.tolist()[:2]) > 8


def test_a_draft_with_prompts_of_its_own(tokenizer: Any) -> None:
    """It reads the request as its own prompt says, and guesses what follows that."""
    target = cf.Model(model(), tokenizer=tokenizer)
    own = cf.Model(model(), tokenizer=tokenizer, prompt=["w9 w8", "w3 the film w30"])
    prompts = ["the film was", "a great plot w3 w4"]
    both(target, prompts, cf.Draft(own, length=3), **SAMPLED, max_new_tokens=12)
