"""Chunk-level beam search against a loop over whole texts, and what a search finds."""

from __future__ import annotations

import itertools
import math
import operator
import string
from typing import Any

import crossfade as cf
import pytest
import torch
from scipy.stats import chisquare
from search_cases import DRAW, PROMPTS, SIMPLE, TEXTS, by_hand, few_words, log_ratio
from sweeps import product
from tiny_models import EOS, SHAPES, VOCAB, lora, make, make_letters, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


SETTINGS = {
    "chunks": {"width": 2, "samples": 3, "chunk_length": 4},
    "blockwise": {"width": 1, "samples": 4, "chunk_length": 5},
    "one sample": {"width": 4, "samples": 1, "chunk_length": 3},
    "tokens": {"width": 2, "samples": 2, "chunk_length": 1},
    "whole": {"width": 3, "samples": 2, "chunk_length": None},
    "past the end": {"width": 2, "samples": 2, "chunk_length": 50},
    "duplicates": {"width": 2, "samples": 3, "chunk_length": 2, "duplicate_finished": True},
}


@pytest.mark.parametrize(("shape", "case"), product(list(SHAPES), list(SETTINGS), together=1))
def test_the_rows_of_the_algorithm(shape: str, case: str) -> None:
    """Four prompts are searched, two at a time: the others join when one of these is over."""
    settings: dict[str, Any] = SETTINGS[case]
    base, tuned, ref = (make(shape, seed) for seed in range(3))
    search = cf.ChunkBeamSearch(**settings, value=cf.LogRatio(tuned, ref))
    out = cf.generate(
        base,
        PROMPTS,
        search=search,
        max_batch=2 * search.rows,
        num_return_sequences=search.width,
        **DRAW,
    )
    assert not out.stats.notes
    values = out.values.view(len(PROMPTS), search.width)
    for i, prompt in enumerate(PROMPTS):
        truth = by_hand(base, prompt, i, log_ratio(tuned, ref), **settings)
        ours = out.responses[i * search.width : (i + 1) * search.width]
        assert ours == [row for _, row in truth]
        wanted = torch.tensor([value for value, _ in truth])
        torch.testing.assert_close(values[i], wanted, atol=1e-4, rtol=1e-4)
    assert any(len(r) < 13 for r in out.responses), "some rows should end by EOS"


def test_the_simple_path_agrees() -> None:
    base, tuned, ref = (make("gemma3", seed) for seed in range(3))
    value = cf.LogRatio(tuned, ref)
    for blend in (cf.Model(base), cf.Model(base) + 0.4 * (cf.Model(tuned) - cf.Model(ref))):
        outs = [
            cf.generate(
                blend,
                PROMPTS,
                search=cf.ChunkBeamSearch(2, 3, 4, value),
                engine=engine,
                repetition_penalty=1.2,
                **DRAW,
            )
            for engine in (SIMPLE, cf.Engine(), cf.Engine(kernels=False, share_weights=False))
        ]
        for out in outs[1:]:
            assert torch.equal(out.sequences, outs[0].sequences)
            torch.testing.assert_close(out.values, outs[0].values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out.logprobs, outs[0].logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_of_the_blend_score_for_nothing(shape: str) -> None:
    base, tuned, ref = (cf.Model(make(shape, seed)) for seed in range(3))
    blend = base + 0.5 * (tuned - ref)
    search = cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref, beta=0.5))
    out = cf.generate(blend, PROMPTS, search=search, **DRAW)
    assert len(out.stats.models) == 3, "the value reads nothing of its own"
    assert out.term_logprobs is None
    torch.testing.assert_close(out.values, ratio(tuned, ref, out) / 2, atol=1e-4, rtol=1e-4)
    with_terms = cf.generate(blend, PROMPTS, search=search, return_term_logprobs=True, **DRAW)
    each = with_terms.term_logprobs.sum(dim=1)
    torch.testing.assert_close((each[:, 1] - each[:, 2]) / 2, out.values, atol=1e-4, rtol=1e-4)
    # One of the two is a term, and only the other one reads.
    half = cf.generate(base + 0.5 * tuned, PROMPTS, search=search, **DRAW)
    assert len(half.stats.models) == 3
    torch.testing.assert_close(half.values, ratio(tuned, ref, half) / 2, atol=1e-4, rtol=1e-4)


def ratio(tuned: Any, ref: Any, out: cf.Output) -> torch.Tensor:
    one, other = (cf.score(m, PROMPTS, out.responses).totals for m in (tuned, ref))
    return one - other


def test_adapters_and_prompts_of_one_model_are_read_together() -> None:
    model: Any = make("qwen3")
    for seed, name in enumerate(("tuned", "ref")):
        model = lora(seed, model, name, rank=4)
    model.eval()
    base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
    prompted = cf.Model(model, adapter="tuned", prompt=[9, 9, 12])
    value = cf.LogRatio(tuned, ref) - 0.5 * cf.LogRatio(prompted, ref)
    out = cf.generate(base, PROMPTS, search=cf.ChunkBeamSearch(2, 2, 3, value), **DRAW)
    assert [s.names for s in out.stats.models[1:]] == [
        ("log_ratio.tuned", "log_ratio.ref", "log_ratio_2.tuned")
    ]
    own = cf.score(prompted, PROMPTS, out.responses).totals
    shared = cf.score(ref, PROMPTS, out.responses).totals
    wanted = ratio(tuned, ref, out) - 0.5 * (own - shared)
    torch.testing.assert_close(out.values, wanted, atol=1e-4, rtol=1e-4)
    assert out.value_parts.shape == (4, 2)


def test_every_token_is_read_once() -> None:
    base, tuned, ref = (make("llama", seed) for seed in range(3))
    prompt = [[5, 6, 7, 8, 9, 10]]
    search = cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref))
    out = cf.generate(base, prompt, search=search, max_new_tokens=12, eos_token_id=None, seed=1)
    drawn = 6 * 12
    assert [s.tokens for s in out.stats.models] == [5 + drawn] * 3
    assert [s.forwards for s in out.stats.models] == [1 + 12, 1 + 3, 1 + 3]
    assert out.stats.tokens == 12


# ---- what a search finds


@pytest.mark.parametrize(
    "search",
    [
        {"width": 400, "samples": 1, "chunk_length": None},
        {"width": 30, "samples": 20, "chunk_length": 1},
    ],
    ids=["best of n", "beams"],
)
def test_finds_the_best_of_all(search: dict[str, Any]) -> None:
    base, tuned, ref = (few_words(seed) for seed in range(3))
    rows = [list(r) for r in itertools.product(range(5), repeat=3)]
    one, other = (
        cf.score(m, [[3, 1]] * len(rows), rows).totals for m in (cf.Model(tuned), cf.Model(ref))
    )
    best = (one - other).argmax()
    settings = cf.ChunkBeamSearch(**search, value=cf.LogRatio(tuned, ref))
    out = cf.generate(base, [[3, 1]], search=settings, max_new_tokens=3, eos_token_id=None, seed=0)
    assert out.responses[0] == rows[int(best)]
    torch.testing.assert_close(out.values[0], (one - other)[best], atol=1e-4, rtol=1e-4)


def test_best_of_n_has_its_closed_form() -> None:
    """P(best = v) = F(v)^n - F(v-)^n, where F is the distribution of the value of one sample."""
    base, n, requests = few_words(7, words=6), 4, 3000
    tokenizer = make_tokenizer()
    value = cf.Reward(lambda prompts, texts: [float(len(t)) for t in texts])
    lengths = [len(tokenizer.decode([v], skip_special_tokens=True)) for v in range(6)]
    out = cf.generate(
        cf.Model(base, tokenizer=tokenizer),
        [[3]] * requests,
        search=cf.BestOfN(n, value),
        max_new_tokens=1,
        eos_token_id=None,
        seed=11,
        max_batch=n * requests,
    )
    p = base(torch.tensor([[3]])).logits[0, -1].detach().double().softmax(-1)
    drawn = torch.tensor([lengths[r[0]] for r in out.responses])
    counts, expected = [], []
    for length in sorted(set(lengths)):
        at_most, below = (
            float(p[[f(m, length) for m in lengths]].sum()) for f in (operator.le, operator.lt)
        )
        expected.append(at_most**n - below**n)
        counts.append(int((drawn == length).sum()))
    assert min(expected) * requests > 5
    assert chisquare(counts, [requests * e for e in expected]).pvalue > 1e-3


# ---- rows


def test_all_rows_end_in_the_first_chunk() -> None:
    base = make("llama")
    every = list(range(VOCAB))
    value = cf.LogRatio(make("llama", 1), make("llama", 2))
    settings = {**DRAW, "eos_token_id": every}
    out = cf.generate(base, PROMPTS, search=cf.ChunkBeamSearch(2, 2, 5, value), **settings)
    assert out.lengths.tolist() == [1] * 4
    assert out.finished.all()
    assert out.ended.all()


def test_the_worst_values_lose() -> None:
    tokenizer = make_tokenizer()
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    for odd in (float("nan"), -math.inf):

        def value(prompts: list[Any], texts: list[str], odd: float = odd) -> list[float]:
            return [odd if len(t) % 2 else -1.0 for t in texts]

        out = cf.generate(base, TEXTS, search=cf.ChunkBeamSearch(3, 4, 2, cf.Reward(value)), **DRAW)
        assert out.values.tolist() == [-1.0] * 3
        assert all(len(t) % 2 == 0 for t in out.text)
    nothing = cf.Reward(lambda prompts, texts: [float("nan")] * len(texts))
    out = cf.generate(base, TEXTS, search=cf.ChunkBeamSearch(2, 2, 2, nothing), **DRAW)
    assert out.values.isnan().all()
    assert out.ended.all()
    assert (out.lengths > 0).all()


def test_chunks_that_a_function_ends() -> None:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)  # Every token is a word.
    seen: list[str] = []

    def second_word(chunk: str) -> bool:
        seen.append(chunk)
        return len(chunk.split()) == 2

    base = cf.Model(make("llama"), tokenizer=tokenizer)
    value = cf.LogRatio(make("llama", 1), make("llama", 2))
    two = cf.ChunkBeamSearch(2, 3, 2, value)
    ends = cf.ChunkBeamSearch(2, 3, 9, value, chunk_end=second_word)
    one, other = (cf.generate(base, ["w9 w7", "w5"], search=s, **DRAW) for s in (two, ends))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.values, other.values)
    # Each row has chunks of its own lengths, so that rows of a prompt wait for each other.
    odd = cf.ChunkBeamSearch(2, 3, None, value, chunk_end=lambda chunk: chunk.endswith(("3", "5")))
    out = cf.generate(base, ["w9 w7", "w5"], search=odd, **{**DRAW, "max_new_tokens": 40})
    tuned, ref = (cf.Model(make("llama", s)) for s in (1, 2))
    ids = [[9, 7], [5]]
    wanted = [cf.score(m, ids, out.responses).totals for m in (tuned, ref)]
    torch.testing.assert_close(out.values, wanted[0] - wanted[1], atol=1e-4, rtol=1e-4)
    assert max(len(c.split()) for c in seen) <= 2
    assert cf.sentence_end("It was. ")
    assert cf.sentence_end('"No!"')
    assert not cf.sentence_end("It was")


def test_other_vocabularies_read_texts() -> None:
    """A value reads letters where the base writes pairs of them, and reads no letter twice."""
    pairs = make_letters()
    core = Tokenizer(
        models.BPE({"<eos>": 1} | {c: i for i, c in enumerate(string.ascii_lowercase, 3)}, [])
    )
    core.decoder = decoders.Fuse()
    letters = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    base = cf.Model(make("llama"), tokenizer=pairs)
    prompts = ["theplot", "afilm", "x"]
    tuned, ref = (cf.Model(make("gpt2", s), tokenizer=letters) for s in (1, 2))
    for value in (cf.LogRatio(tuned, ref), cf.LogRatio(tuned, ref, normalize=True)):
        search = cf.ChunkBeamSearch(2, 2, 3, value)
        out = cf.generate(base, prompts, search=search, **DRAW)
        simple = cf.generate(base, prompts, search=search, engine=SIMPLE, **DRAW)
        assert torch.equal(out.sequences, simple.sequences)
        torch.testing.assert_close(out.values, simple.values, atol=1e-4, rtol=1e-4)
        read = [letters(t, add_special_tokens=False)["input_ids"] for t in out.text]
        ended = [[*ids, EOS] if e else ids for ids, e in zip(read, out.finished, strict=True)]
        scores = [cf.score(m, prompts, ended) for m in (tuned, ref)]
        wanted = scores[0].totals - scores[1].totals
        wanted = wanted / scores[0].lengths if value.normalize else wanted
        torch.testing.assert_close(out.values, wanted, atol=1e-4, rtol=1e-4)
        assert out.stats.models[1].tokens < 0.6 * simple.stats.models[1].tokens


def test_weights_a_request() -> None:
    base, tuned, ref, q = (make("llama", seed) for seed in range(4))
    a, b = cf.LogRatio(tuned, ref), cf.ValueHead(q)
    w = torch.tensor([1.0, 0.0, 0.5, -1.0])
    search = cf.ChunkBeamSearch(2, 2, 4, w * a + (1 - w) * b)
    out = cf.generate(base, PROMPTS, search=search, **DRAW)
    wanted = w * out.value_parts[:, 0] + (1 - w) * out.value_parts[:, 1]
    torch.testing.assert_close(out.values, wanted)
    for i, value in enumerate((a, b)):  # The weights are 1 and 0, or 0 and 1.
        settings = {**DRAW, "seed": [5, 5, 5, 5]}
        mixed = cf.generate(base, PROMPTS, search=search, **settings)
        alone = cf.generate(
            base, [PROMPTS[i]], search=cf.ChunkBeamSearch(2, 2, 4, value), **{**DRAW, "seed": [5]}
        )
        assert mixed.responses[i] == alone.responses[0]


def test_bfloat16_scores_are_those_of_a_forward() -> None:
    base, tuned, ref = (make("llama", seed).bfloat16() for seed in range(3))
    out = cf.generate(
        base, PROMPTS, search=cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref)), **DRAW
    )
    exact = ratio(cf.Model(make("llama", 1)), cf.Model(make("llama", 2)), out)
    plain = ratio(cf.Model(tuned), cf.Model(ref), out)
    error, own = (out.values - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * own + 0.05
