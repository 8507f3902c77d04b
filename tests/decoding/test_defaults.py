"""Whatever a caller has set as torch's defaults, decoding gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import crossfade as cf
import pytest
import torch
from crossfade import Engine
from tiny_models import make, make_tokenizer
from transformers import PreTrainedModel

PROMPTS = ["the film was", "a"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def decoded(trio: list[PreTrainedModel], simple: bool) -> list[torch.Tensor]:
    """What each way of decoding gives, one after the other."""
    base, tuned, ref = trio
    one = cf.Model(base, tokenizer=make_tokenizer())
    blend = one + torch.tensor([0.3, 0.5], dtype=torch.float32, device="cpu") * (
        cf.Model(tuned) - cf.Model(ref)
    )
    engine = Engine(simple=simple)
    drawn = cf.generate(
        blend,
        PROMPTS,
        max_new_tokens=4,
        do_sample=True,
        seed=1,
        temperature=0.7,
        top_p=0.9,
        num_return_sequences=2,
        return_term_logprobs=True,
        return_kl_to_base=True,
        engine=engine,
    )
    processed = cf.generate(blend, PROMPTS, max_new_tokens=4, repetition_penalty=1.3, engine=engine)
    value = cf.LogRatio(tuned, ref) + cf.Reward(lambda prompts, texts: [len(t) for t in texts])
    searched = cf.generate(
        one,
        PROMPTS,
        max_new_tokens=4,
        search=cf.ChunkBeamSearch(width=2, samples=2, chunk_length=2, value=value),
        seed=[3, 4],
        engine=engine,
    )
    scores = cf.score(blend, PROMPTS, ["film", "cast a"], return_term_logprobs=True)
    hooked = base.generate(
        torch.tensor([[11, 10], [9, 8]], device="cpu"),
        custom_generate=cf.decode,
        blend=blend,
        max_new_tokens=4,
        do_sample=True,
        seed=1,
    )
    found = [
        *(drawn.sequences, drawn.logprobs, drawn.term_logprobs, drawn.kl_to_base),
        *(processed.sequences, searched.sequences, searched.values),
        *(scores.logprobs, scores.term_logprobs, hooked),
    ]
    return [x for x in found if x is not None]


@pytest.fixture(scope="module", params=[False, True], ids=["engine", "simple"])
def usual(
    request: pytest.FixtureRequest, trio: list[PreTrainedModel]
) -> tuple[bool, list[torch.Tensor]]:
    """Whether the path is the simple one, and what it gives under torch's own defaults."""
    return request.param, decoded(trio, request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_default_dtype(
    dtype: torch.dtype, usual: tuple[bool, list[torch.Tensor]], trio: list[PreTrainedModel]
) -> None:
    simple, expected = usual
    with default_dtype(dtype):
        found = decoded(trio, simple)
    assert len(found) == 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_another_default_device(
    usual: tuple[bool, list[torch.Tensor]], trio: list[PreTrainedModel]
) -> None:
    """The device meta stands for any other one: what is made there by mistake has no data."""
    simple, expected = usual
    with torch.device("meta"):
        found = decoded(trio, simple)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("simple", [False, True], ids=["engine", "simple"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_float64(shape: str, simple: bool, batch: dict[str, torch.Tensor]) -> None:
    model = make(shape).double()
    theirs = model.generate(**batch, max_new_tokens=6)
    engine = Engine(simple=simple)
    out = cf.generate(model, batch, max_new_tokens=6, return_term_logprobs=True, engine=engine)
    assert torch.equal(out.sequences, theirs)
    assert out.logprobs.dtype == torch.float32
    mixed = cf.Model(make("qwen3", 2)) + 0.5 * cf.Model(model)
    expected = cf.Model(make("qwen3", 2)) + 0.5 * cf.Model(make(shape))
    found, other = (
        cf.generate(b, batch, max_new_tokens=6, engine=engine) for b in (mixed, expected)
    )
    assert torch.equal(found.sequences, other.sequences)
    torch.testing.assert_close(found.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)
    one, both = cf.score(model, batch, out.responses), cf.score(make(shape), batch, out.responses)
    torch.testing.assert_close(one.logprobs, both.logprobs, rtol=1e-4, atol=1e-4)
