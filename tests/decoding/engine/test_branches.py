"""What responses and prompts begin with alike is read once, and the figures are the same."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.blends.blend import as_blend
from crossfade.decoding import scoring
from crossfade.decoding.call import Call
from crossfade.decoding.engine import branches, prefill
from crossfade.decoding.engine.asked import Asked
from crossfade.decoding.engine.batching import MAX_TOKENS
from crossfade.decoding.engine.branches import Branches
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.prefill import Prefill
from tiny_models import VOCAB, lora, make

# PEFT 0.21 uses a name that Transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

EXAMPLES = [9, 8, 7, 30, 31, 32, 6, 5, 44, 20, 21, 22]  # What all prompts begin with.
PROMPTS = [[*EXAMPLES, *own] for own in ([40], [41, 10], [40, 11, 12, 13], [41, 10, 14], [5, 6])]
RESPONSES = [[17], [18, 19, 3, 50], [24, 25]]
ASKED = [(p, r) for r in RESPONSES for p in PROMPTS]  # The responses of a prompt stand apart.


def blend_of(kind: str) -> Any:
    if kind == "adapters":
        model = lora(4, lora(3, make("llama", 0), "tuned"), "other")
        base, tuned, other = (cf.Model(model, adapter=a) for a in (None, "tuned", "other"))
        return base + 0.8 * tuned - 0.3 * other
    if kind == "own prompts":  # Only one term's prompts begin alike.
        own = [[33 + i % len(PROMPTS), 6] for i in range(len(ASKED))]
        return cf.Model(make("llama", 0)) + 0.5 * cf.Model(make("gpt2", 1), prompt=own)
    weights = torch.linspace(-0.5, 1.0, len(ASKED))
    blend = make_model("llama", 0) + weights * (make_model("qwen3", 1) - make_model("gemma3", 2))
    return blend + 0.3 * cf.ValueHead(make("qwen3", 9))


def make_model(shape: str, seed: int) -> cf.Model:
    return cf.Model(make(shape, seed))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward that the engine reads."""
    read = []
    own = Group._append

    def append(self: Group, rows: Any, starts: Any, ids: Any) -> torch.Tensor:
        read.append(sum(map(len, ids)))
        return own(self, rows, starts, ids)

    monkeypatch.setattr(Group, "_append", append)
    return read


def score(blend: Any, saved: float, monkeypatch: pytest.MonkeyPatch, **options: Any) -> cf.Scores:
    monkeypatch.setattr(scoring, "WORTH_SHARING", saved)
    prompts, responses = zip(*ASKED, strict=True)
    return cf.score(blend, list(prompts), list(responses), **options)


@pytest.mark.parametrize("kind", ["models and values", "adapters", "own prompts"])
@pytest.mark.parametrize(("rows", "tokens"), [(256, 1024), (3, 8), (1, 5)])
def test_the_figures_are_those_of_texts_that_are_read_whole(
    kind: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    """Also where few prompts fit in the caches, and where a forward takes few tokens."""
    monkeypatch.setattr(branches, "ROWS", rows)
    monkeypatch.setitem(branches.WORTH, "cpu", 2)
    monkeypatch.setitem(MAX_TOKENS, "cpu", tokens)
    monkeypatch.setattr(prefill, "MAX_LOGITS", 3 * VOCAB)
    blend = blend_of(kind)
    options: dict[str, Any] = {"return_term_logprobs": True, "kl_to": blend.terms[1]}
    apart = score(blend, 2.0, monkeypatch, **options)
    forwards.clear()
    found = score(blend, 0.0, monkeypatch, **options)
    assert forwards
    for name in ("logprobs", "term_logprobs", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(apart, name), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.ranks, apart.ranks)
    assert torch.equal(found.lengths, apart.lengths)


def test_what_is_alike_is_read_once(monkeypatch: pytest.MonkeyPatch, forwards: list[int]) -> None:
    """The examples once in all, the rest of a prompt once, each response by itself."""
    cf.score(make("llama", 0), PROMPTS[0], RESPONSES[1])  # The engine compares itself before.
    model = make("llama", 0)
    monkeypatch.setitem(branches.WORTH, "cpu", 1)
    score(model, 0.0, monkeypatch)
    forwards.clear()
    found = score(model, 0.0, monkeypatch)
    begun = {tuple(p[:n]) for p in PROMPTS for n in range(1, len(p))}
    answers = sum(len(r) for _, r in ASKED)
    assert sum(forwards) == len(begun) + answers
    assert len(forwards) <= 2 + len(RESPONSES)
    (stats,) = found.stats.models
    assert (stats.names, stats.forwards, stats.tokens) == (
        ("model0",),
        len(forwards),
        sum(forwards),
    )
    assert found.stats.tokens == answers


def test_responses_that_differ_in_their_last_token_share_a_forward(forwards: list[int]) -> None:
    """That token is not read. Choices of one token cost no more than the prompt."""
    model = make("llama", 0)
    responses = [[17], [18, 19], [20], [18, 21], [22]]
    cf.score(model, [EXAMPLES] * 5, responses)
    forwards.clear()
    found = cf.score(model, [EXAMPLES] * 5, responses)
    assert forwards == [len(EXAMPLES) + 1, 1]
    each = [cf.score(model, EXAMPLES, r).logprobs[0] for r in responses]
    for row, own in zip(found.logprobs, each, strict=True):
        torch.testing.assert_close(row[: len(own)], own)


@pytest.mark.parametrize(
    "responses", [[[i] for i in range(40)], [[17, 18, 19, 20], [5], *RESPONSES]]
)
def test_requests_that_share_logits_get_them_a_few_at_a_time(responses: list[list[int]]) -> None:
    """Also beside a longer response, as which they are padded."""
    asked = [*responses, *[[i] for i in range(20)]]
    models = Call(as_blend(make("llama", 0)), None).models
    prompts = [(EXAMPLES,) if i < len(responses) else (PROMPTS[0],) for i in range(len(asked))]
    most, places = 8 * VOCAB, []
    for requests, (logits,) in Branches().read(models, Asked(prompts, asked), most):
        places += requests
        assert logits.numel() <= most
        assert len(logits) == len(requests)
    assert sorted(places) == list(range(len(asked)))


def test_it_is_done_only_where_it_saves_enough(forwards: list[int]) -> None:
    model = make("llama", 0)
    cf.score(model, [EXAMPLES, [5, *EXAMPLES[1:]]], [[17], [18]])
    assert not forwards
    cf.score(model, [EXAMPLES, EXAMPLES], [[17], [18]])
    assert forwards


def test_a_model_that_the_engine_cannot_run_reads_each_text_whole() -> None:
    model: Any = make("llama", 0)
    model._supports_attention_backend = False
    found = cf.score(model, [EXAMPLES, EXAMPLES], [[17], [18, 19]])
    (note,) = found.stats.notes
    assert note.startswith("nothing is shared: ")
    each = [cf.score(model, EXAMPLES, r).logprobs[0] for r in ([17], [18, 19])]
    torch.testing.assert_close(found.logprobs[0, :1], each[0])
    torch.testing.assert_close(found.logprobs[1], each[1])


def test_where_memory_runs_out_what_is_left_is_read_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama", 0)
    expected = score(model, 2.0, monkeypatch)
    own, count = Group.read_at, iter(range(9))

    def read_at(self: Group, *args: Any, **options: Any) -> Any:
        if next(count) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(self, *args, **options)

    monkeypatch.setattr(Group, "read_at", read_at)
    monkeypatch.setattr(branches, "ROWS", 1)  # one prompt at a time
    found = score(model, 0.0, monkeypatch)
    assert next(count) == 3
    assert found.stats.notes == ("memory ran out: what was left was read text by text",)
    assert sum(m.forwards for m in found.stats.models) > 2
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("saved", [0.0, 2.0])
def test_max_batch_bounds_the_rows_of_a_forward(
    saved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    own, group = Prefill.batch_logits, Group._append

    def batch_logits(self: Prefill, texts: Any, *args: Any, **options: Any) -> torch.Tensor:
        rows.append(len(texts))
        return own(self, texts, *args, **options)

    def append(self: Group, at: Any, *args: Any) -> torch.Tensor:
        rows.append(len(at))
        return group(self, at, *args)

    model = make("llama", 0)
    score(model, saved, monkeypatch)
    monkeypatch.setattr(Prefill, "batch_logits", batch_logits)
    monkeypatch.setattr(Group, "_append", append)
    score(model, saved, monkeypatch, max_batch=2)
    assert max(rows) == 2
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        score(model, saved, monkeypatch, max_batch=0)
