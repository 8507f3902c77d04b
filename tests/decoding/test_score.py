"""`cf.score` reads what `cf.generate` writes, and gives the same log-probs."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding import figures, scoring
from crossfade.decoding.engine.prefill import Prefill
from tiny_models import SHAPES, VOCAB, make
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Batch = dict[str, torch.Tensor]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_score_is_what_generate_reports(
    power: float, trio: list[PreTrainedModel], batch: Batch
) -> None:
    a, b, c = map(cf.Model, trio)
    each = torch.tensor([0.1, 0.4, 0.6, 0.9])
    blend = a + each * (b - c) if power == 0 else cf.power_mean([a, b], [1 - each, each], r=power)
    blend = blend + 0.3 * cf.ValueHead(make("qwen3", 9))
    out = cf.generate(
        blend, batch, do_sample=True, seed=1, max_new_tokens=10, return_term_logprobs=True
    )
    scores = cf.score(blend, batch, out.responses, return_term_logprobs=True)
    steps = scores.logprobs.shape[1]
    torch.testing.assert_close(scores.logprobs, out.logprobs[:, :steps], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scores.term_logprobs, out.term_logprobs[:, :steps], atol=1e-5, rtol=0
    )
    assert torch.equal(scores.lengths, out.lengths)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_term_is_a_forward(shape: str) -> None:
    model = make(shape)
    prompt, response = [9, 8, 7, 30, 31, 32], [5, 6, 11, 12, 13]
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = log_p.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    # Beside a longer text, this one is padded.
    scores = cf.score(model, [prompt, [9] * 9], [response, [5] * 8])
    torch.testing.assert_close(scores.logprobs[0, :5], expected)
    assert not scores.logprobs[0, 5:].any()
    assert scores.lengths.tolist() == [5, 8]
    torch.testing.assert_close(scores.totals[0], expected.sum())
    torch.testing.assert_close(scores.perplexity[0], (-expected.mean()).exp())
    assert scores.term_logprobs is None


def test_texts_and_system_prompts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    term = cf.Model(base, tokenizer=tokenizer, system="very bright")
    blend = cf.Model(base, tokenizer=tokenizer) + 0.5 * term
    out = cf.generate(blend, "the film", max_new_tokens=5, eos_token_id=None)
    scores = cf.score(blend, "the film", tokenizer.decode(out.responses[0]))
    torch.testing.assert_close(scores.logprobs, out.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("responses", "error", "match"),
    [
        (3, TypeError, "responses is a int"),
        ([[5]], ValueError, "responses has 1 entries; it must have 2"),
        (["film", "plot"], ValueError, "tokenizer is None"),
        ([[5], []], TypeError, r"responses\[1\]"),
        ([[5], [61]], ValueError, r"responses\[1\] has id 61"),
        ([[5], [-1]], ValueError, r"responses\[1\] has id -1"),
    ],
)
def test_bad_responses(
    responses: Any, error: type[Exception], match: str, base: PreTrainedModel
) -> None:
    with pytest.raises(error, match=match):
        cf.score(base, [[5, 6], [7]], responses)
    for prompts, problem in (([], " is empty"), (3, " is a int"), ([[5], 3], r"\[1\] is 3")):
        with pytest.raises((TypeError, ValueError), match=f"^prompts{problem}"):
            cf.score(base, prompts, [[7]])
    with pytest.raises(TypeError, match="return_term_logprobs is 2"):
        cf.score(base, [5], [6], return_term_logprobs=2)


class NanAfter(torch.nn.Module):
    """A value head that has no values after token 40."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        output.logits[input_ids == 40] = float("nan")
        return output


def test_a_bad_step_is_nan(base: PreTrainedModel, trio: list[PreTrainedModel]) -> None:
    blend = cf.Model(base) + cf.ValueHead(NanAfter(trio[1]))
    scores = cf.score(blend, [[5, 6], [7, 8]], [[9, 40, 3], [9, 10, 3]])
    assert scores.logprobs[0].isnan().tolist() == [False, False, True]
    assert scores.logprobs[1].isfinite().all()
    assert (scores.ranks[0] == -1).tolist() == [False, False, True]
    assert (scores.ranks[1] >= 0).all()
    assert not scores.greedy[0]


def test_responses_of_one_token(base: PreTrainedModel) -> None:
    """Harnesses score choices of one token so: no token of a response is read then."""
    scores = cf.score(base, [[5, 6], [7]], [[8], [9]])
    longer = cf.score(base, [[5, 6], [7]], [[8, 3], [9]])
    torch.testing.assert_close(scores.logprobs, longer.logprobs[:, :1])


def test_ranks_are_places_in_the_order_of_the_blend(trio: list[PreTrainedModel]) -> None:
    a, b, _ = map(cf.Model, trio)
    blend = a + 0.5 * b
    out = cf.generate(blend, [[5, 6], [7]], max_new_tokens=6, eos_token_id=None)
    scores = cf.score(blend, [[5, 6], [7]], out.responses)
    assert not scores.ranks.any()
    assert scores.greedy.tolist() == [True, True]
    # Of all tokens in one place, each has a rank of its own, and better tokens have lower ones.
    scores = cf.score(blend, [[5, 6]] * VOCAB, [[token] for token in range(VOCAB)])
    order = scores.ranks[:, 0].argsort()
    assert scores.ranks[:, 0].sort().values.tolist() == list(range(VOCAB))
    assert (scores.logprobs[order, 0].diff() <= 0).all()
    assert scores.greedy.sum() == 1


def test_of_equal_tokens_the_lower_id_comes_first_as_in_greedy_decoding() -> None:
    model = make()
    head = model.lm_head.weight.data
    head[9] = head[8]
    head[10:] = head[5]
    found = set()
    for prompt in range(5, VOCAB):
        (written,) = cf.generate(model, [prompt], max_new_tokens=1, eos_token_id=None).responses
        scores = cf.score(model, [[prompt]] * 4, [[5], [8], [9], [10]])
        five, eight, nine, ten = scores.ranks[:, 0].tolist()
        assert nine == eight + 1
        assert ten == five + 1
        assert (written == [8]) == (eight == 0)
        assert (written == [5]) == (five == 0)
        found |= {written[0]}
    assert {5, 8} <= found


TEXTS = [[7, 9, 30, 12, 8], [40, 6], [11, 12, 13, 14, 15, 16, 17, 18], [33, 6, 20, 21], [5, 9, 7]]


@pytest.mark.parametrize("numbers", [1, 40 * VOCAB, 1 << 30])
def test_long_lists_are_scored_in_batches(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is held at a time, the figures are the same, in the order of the requests."""
    a, b = make("llama", 0), make("qwen3", 1)
    weights = torch.linspace(-0.5, 1.0, 10)
    blend = cf.Model(a) + weights * (cf.Model(b) - cf.Model(a))
    prompts = [t[:1] for t in TEXTS] + [t[:-1] for t in TEXTS]
    responses = [[*t[::-1], 3, 50] for t in [*TEXTS[1:], TEXTS[0]]] + [[4]] * 5
    options: dict[str, Any] = {"return_term_logprobs": True, "kl_to": b}
    each = [
        cf.score(cf.Model(a) + float(w) * (cf.Model(b) - cf.Model(a)), [p], [r], **options)
        for w, p, r in zip(weights, prompts, responses, strict=True)
    ]
    monkeypatch.setattr(scoring, "MAX_LOGITS", numbers)
    monkeypatch.setitem(figures.MAX_MIXED, "cpu", 3 * VOCAB)
    held = []
    own = Prefill.batch_logits

    def batch_logits(self: Prefill, *args: Any, **options: Any) -> torch.Tensor:
        held.append(own(self, *args, **options))
        return held[-1]

    monkeypatch.setattr(Prefill, "batch_logits", batch_logits)
    found = cf.score(blend, prompts, responses, **options)
    for i, (one, response) in enumerate(zip(each, responses, strict=True)):
        n = len(response)
        for name in ("logprobs", "term_logprobs", "kl"):
            ours, theirs = getattr(found, name)[i], getattr(one, name)[0]
            torch.testing.assert_close(ours[:n], theirs, atol=1e-5, rtol=1e-5)
            assert not ours[n:].any()
    assert found.lengths.tolist() == [len(r) for r in responses]
    pairs = zip(held[::2], held[1::2], strict=True)  # Each batch has the logits of both models.
    assert all(len(x) == 1 or x.numel() + y.numel() <= numbers for x, y in pairs)
    assert len(held) == 2 * {1: 10, 40 * VOCAB: 3, 1 << 30: 1}[numbers]
