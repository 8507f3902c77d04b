"""Chunks that end where the next token is uncertain, against a loop over whole texts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.mixer import Mixer
from search_cases import DRAW, PROMPTS, SIMPLE, by_hand, entropy, log_ratio
from sweeps import product
from tiny_models import SHAPES, make
from transformers import (
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)

NATS = {"few": 2.6, "some": 2.2, "every token": 0.0}


@pytest.mark.parametrize(("shape", "nats"), product(list(SHAPES), list(NATS), together=1))
def test_the_rows_of_the_algorithm(shape: str, nats: str) -> None:
    base, tuned, ref = (make(shape, seed) for seed in range(3))
    settings: dict[str, Any] = {"width": 2, "samples": 3, "chunk_length": 6}
    search = cf.ChunkBeamSearch(
        **settings, value=cf.LogRatio(tuned, ref), chunk_end=cf.entropy_above(NATS[nats])
    )
    out = cf.generate(base, PROMPTS, search=search, max_batch=12, num_return_sequences=2, **DRAW)
    assert not out.stats.notes
    score, found = log_ratio(tuned, ref), []
    for i, prompt in enumerate(PROMPTS):
        truth = by_hand(base, prompt, i, score, **settings, most_entropy=NATS[nats])
        assert out.responses[2 * i : 2 * i + 2] == [row for _, row in truth]
        for j, (value, row) in enumerate(truth):
            assert out.values[i, j].item() == pytest.approx(value, abs=1e-4)
            logits = base(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].detach()
            wanted = torch.tensor([entropy(z[None]) for z in logits])
            ours = out.entropies[2 * i + j]
            torch.testing.assert_close(ours[: len(row)], wanted, atol=1e-4, rtol=1e-4)
            assert (ours[len(row) :] == 0).all()
            found += wanted[1:].tolist()
    assert any(h <= NATS["few"] for h in found)
    assert any(h > NATS["few"] for h in found)


def test_entropies_of_a_blend_with_a_support_and_models_that_rest() -> None:
    """A model that rests owes the token that is taken back, or has read it."""
    base, amateur, tuned, ref = (cf.Model(make("llama", seed)) for seed in range(4))
    blend = cf.presets.contrastive(base, amateur, alpha=0.2)
    ends = cf.entropy_above(0.9)
    search = cf.ChunkBeamSearch(2, 3, 6, cf.LogRatio(tuned, ref), chunk_end=ends)
    outs = [
        cf.generate(blend, PROMPTS, search=search, engine=engine, max_batch=12, **DRAW)
        for engine in (cf.Engine(), cf.Engine(restrict_guides=False, skip_guides=False))
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    torch.testing.assert_close(outs[0].entropies, outs[1].entropies, atol=1e-4, rtol=1e-4)
    for prompt, row, ours in zip(PROMPTS, outs[0].responses, outs[0].entropies, strict=True):
        ids = torch.tensor([prompt + row])
        each = [m.model(ids).logits[0, len(prompt) - 1 : -1].detach() for m in (base, amateur)]
        log_p = Mixer(blend, ((1.5, -0.5), (), (), ()), each[0].shape[1]).log_probs(each)
        wanted = torch.special.entr(log_p.double().exp()).sum(dim=1).float()
        torch.testing.assert_close(ours[: len(row)], wanted, atol=1e-4, rtol=1e-4)
    low = outs[0].entropies[outs[0].entropies > 0]
    assert (low > 0.9).any()
    assert (low < 0.9).any()


def test_the_ends_of_plain_chunks() -> None:
    """An entropy above 0 is that of every token, and none is above infinity's neighbour."""
    base, tuned, ref = (make("llama", seed) for seed in range(3))
    value = cf.LogRatio(tuned, ref)
    for nats, length in ((0.0, 1), (1e9, 4)):
        plain = cf.ChunkBeamSearch(2, 3, length, value)
        ends = cf.ChunkBeamSearch(2, 3, 4, value, chunk_end=cf.entropy_above(nats))
        one, other = (cf.generate(base, PROMPTS, search=s, **DRAW) for s in (plain, ends))
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(one.logprobs, other.logprobs)
        assert one.entropies is None


def test_a_token_that_is_taken_back_is_read_again() -> None:
    base, tuned, ref = (make("llama", seed) for seed in range(3))
    prompt = [[5, 6, 7, 8, 9, 10]]
    value, ends = cf.LogRatio(tuned, ref), cf.entropy_above(0.0)
    search = cf.ChunkBeamSearch(2, 3, 4, value, chunk_end=ends)
    out = cf.generate(base, prompt, search=search, max_new_tokens=12, eos_token_id=None, seed=1)
    drawn, again = 6 * 12, 6 * 11  # Each chunk but the last ends one token after it began.
    assert [s.tokens for s in out.stats.models] == [5 + drawn + again, 5 + drawn, 5 + drawn]


@pytest.mark.parametrize("ends", [cf.entropy_above(2.0), cf.sentence_end])
def test_beside_processors(ends: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows that wait for each other have the processors' scores of their own texts."""
    base, value = make("llama"), cf.LogRatio(make("llama", 1), make("llama", 2))
    model = cf.Model(base, tokenizer=tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("the film was", "plot very dull")]
    search = cf.ChunkBeamSearch(2, 2, 3, value, chunk_end=ends)
    hf: dict[str, Any] = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    out = cf.generate(model, prompts, search=search, num_return_sequences=2, **hf, **DRAW)
    plain = cf.generate(model, prompts, search=search, num_return_sequences=2, **DRAW)
    assert out.responses != plain.responses
    seen = False
    for i, row in enumerate(out.responses):
        prompt = prompts[i // 2]
        each = [*prompt, *row]
        assert all(each.count(t) < 4 for t in set(row)), "nothing repeats with such a penalty"
        pairs = list(itertools.pairwise(each))
        assert len(pairs) == len(set(pairs))
        seen |= len(row) > 6
        with torch.no_grad():
            logits = base(torch.tensor([each])).logits[0, len(prompt) - 1 : -1].double()
        for t, (z, token) in enumerate(zip(logits, row, strict=True)):
            past = torch.tensor([[*prompt, *row[:t]]])
            left = NoRepeatNGramLogitsProcessor(2)(
                past, RepetitionPenaltyLogitsProcessor(3.0)(past, z[None].clone())
            )
            want = (left[0] / 1.2).log_softmax(-1)[token].item()
            assert out.sampled_logprobs[i, t].item() == pytest.approx(want, abs=1e-3)
    assert seen


def test_refusals() -> None:
    base, value = make("llama"), cf.LogRatio(make("llama", 1), make("llama", 2))
    search = cf.ChunkBeamSearch(2, 2, 9, value, chunk_end=cf.entropy_above(2.0))
    own = [lambda ids, scores: scores]
    for options, why in (
        ({"engine": SIMPLE}, "the simple path keeps"),
        ({"logits_processor": own}, "function reads all rows at one step"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "stopping criteria read"),
    ):
        with pytest.raises(NotImplementedError, match=f"chunk_end lets rows wait .* but {why}"):
            cf.generate(base, PROMPTS, search=search, **options, **DRAW)
    bad: list[tuple[Any, type[Exception], str]] = [
        (-1, ValueError, "nats is -1.0; it must be at least 0"),
        (math.inf, ValueError, "nats is inf; it must be finite"),
        ("2", TypeError, "nats is '2'; it must be a number"),
    ]
    for nats, error, message in bad:
        with pytest.raises(error, match=message):
            cf.entropy_above(nats)
    for ends, message in (
        (2.0, "chunk_end is a float"),
        (cf.entropy_above, "it must have a num"),
        (type(cf.entropy_above(2.0)), "chunk_end is the class EntropyAbove"),
        (lambda: True, r"chunk_end is called as chunk_end\(text\), and cannot be"),
    ):
        with pytest.raises(TypeError, match=message):
            cf.ChunkBeamSearch(2, 2, 9, value, chunk_end=ends)
