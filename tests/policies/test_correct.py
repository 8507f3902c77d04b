"""Corrections are what the aligner writes after its prompt, in any batch, round after round."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import lora, make, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
QUERIES: list[Any] = [
    "the film was",
    [{"role": "user", "content": "the plot"}],
    [{"role": "system", "content": "a cast"}, {"role": "user", "content": "w1 the cast"}],
    "w7 w8",
]
ANSWERS = ["a bright plot", "dull dull w9", "w3", "the cast was very very bright"]
SETS: list[Any] = [
    ["bright"],
    {"plain": "w3 w4 film"},
    ["bright", "dull"],
    ["brevity", {"own": "very w5"}],
]
OWN = {"bright": "the film very bright", "dull": "not dull"}
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


def aligner_of(model: Any = None, **options: Any) -> cf.MetaAligner:
    model = make() if model is None else model
    return cf.MetaAligner(model, make_tokenizer(), **{"objectives": OWN, **options})


def by_hand(aligner: cf.MetaAligner, prompts: list[str], steps: int = 7) -> list[list[int]]:
    """What the official loop gives: one prompt at a time, `model.generate`, greedy."""
    model, found = aligner.blend.terms[0].model, []
    for prompt in prompts:
        ids = torch.tensor([aligner.tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma3"])
def test_a_batch_of_mixed_objectives_is_the_official_loop(shape: str) -> None:
    aligner = aligner_of(make(shape))
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, **GREEDY)
    prompts = [aligner.prompt(*each) for each in zip(QUERIES, ANSWERS, SETS, strict=True)]
    assert out.responses == by_hand(aligner, prompts)
    assert len(set(map(tuple, out.responses))) > 2, "the queries differ"
    assert out.rounds == [out.text]
    assert out.answers == ANSWERS
    assert not out.failed.any()
    assert isinstance(out, cf.Output)
    assert repr(out).startswith("Corrections(4 rows")
    for i, each in enumerate(zip(QUERIES, ANSWERS, SETS, strict=True)):
        query, answer, objectives = each
        alone = cf.correct(aligner, query, answer, objectives, **GREEDY)
        assert alone.text == [out.text[i]]
        assert torch.allclose(
            alone.logprobs[0], out.logprobs[i, : alone.logprobs.shape[1]], atol=1e-5
        )


def test_one_set_of_objectives_is_for_all_queries() -> None:
    aligner = aligner_of()
    out = cf.correct(aligner, QUERIES, ANSWERS, ["bright", "dull"], **GREEDY)
    same = cf.correct(aligner, QUERIES, ANSWERS, [["bright", "dull"]] * 4, **GREEDY)
    assert out.text == same.text
    other = cf.correct(aligner, QUERIES, ANSWERS, "dull", **GREEDY)
    assert other.text != out.text


def test_each_round_edits_the_text_of_the_last() -> None:
    aligner = aligner_of()
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=3, **GREEDY)
    texts, tokens = ANSWERS, 0
    for i in range(3):
        once = cf.correct(aligner, QUERIES, texts, SETS, **GREEDY)
        assert out.rounds[i] == once.text
        texts, tokens = once.text, tokens + once.stats.tokens
    assert out.text == texts
    assert out.answers == ANSWERS
    assert out.stats.tokens == tokens, "of all rounds"
    assert len({*map(tuple, out.rounds)}) == 3


def test_the_noun_and_new_objectives_change_the_prompt() -> None:
    aligner = aligner_of(noun="query")
    assert " | Query: the film was | Answer: w3 | Edit: " in aligner.prompt(
        "the film was", "w3", "bright"
    )
    assert "these aspects: Bright: the film very bright; New: w1 |" in aligner.prompt(
        "a", "w3", ["bright", {"new": "w1"}]
    )
    assert "to make it equal considering" in aligner.prompt("a", "w3", "bright", goal="equal")
    assert "Brevity: " in aligner.prompt("a", "w3", "brevity"), "the registry is known too"


def test_an_adapter_and_a_blend_are_aligners() -> None:
    pytest.importorskip("peft")
    wrapped = lora(3, make(), "aligner")
    on = aligner_of(cf.Model(wrapped, adapter="aligner"))
    off = aligner_of(cf.Model(wrapped, adapter=None))
    texts = [cf.correct(a, QUERIES, ANSWERS, SETS, **GREEDY).text for a in (on, off)]
    assert texts[1] == cf.correct(aligner_of(), QUERIES, ANSWERS, SETS, **GREEDY).text != texts[0]
    a, b = on.blend.terms[0], off.blend.terms[0]
    both = aligner_of(b + 0.7 * (a - b))
    out = cf.correct(both, QUERIES, ANSWERS, SETS, return_term_logprobs=True, **GREEDY)
    assert out.term_logprobs is not None
    assert out.term_logprobs.shape[-1] == 2
    assert out.text not in texts


def test_a_policy_writes_the_answers_first() -> None:
    aligner, policy = aligner_of(), make(seed=3)
    answers = cf.generate(
        cf.Model(policy, tokenizer=make_tokenizer()), QUERIES, max_new_tokens=7
    ).text
    for own in (None, {"max_new_tokens": 3}, {"do_sample": True, "temperature": 0.5}):
        out = cf.correct(aligner, QUERIES, policy, SETS, policy_generation=own, seed=1, **GREEDY)
        if own is None:
            assert out.answers == [text.strip() for text in answers]
        else:
            assert out.answers != [text.strip() for text in answers]
        same = cf.correct(aligner, QUERIES, out.answers, SETS, **GREEDY)
        assert out.text == same.text
        assert out.stats.tokens > same.stats.tokens


def test_seeds_decide_and_the_first_round_draws_as_generate_does() -> None:
    aligner = aligner_of()
    draw: dict[str, Any] = {"max_new_tokens": 7, "do_sample": True}
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=2, seed=5, **draw)
    prompts = [aligner.prompt(*each) for each in zip(QUERIES, ANSWERS, SETS, strict=True)]
    first = cf.generate(aligner.blend, prompts, tokenizer=aligner.tokenizer, seed=5, **draw)
    assert out.rounds[0] == first.text
    again = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=2, seed=5, **draw)
    assert again.rounds == out.rounds
    each = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=2, seed=[1, 2, 3, 4], **draw)
    order = [2, 0, 3, 1]
    moved = cf.correct(
        aligner, *([x[i] for i in order] for x in (QUERIES, ANSWERS, SETS)), rounds=2,
        seed=[[1, 2, 3, 4][i] for i in order], **draw,
    )  # fmt: skip
    assert moved.text == [each.text[i] for i in order]
    policy = make(seed=3)
    by_policy = [
        cf.correct(
            aligner, QUERIES, policy, SETS, seed=s, policy_generation={"do_sample": True}, **draw
        ).answers
        for s in (1, 1, 2)
    ]
    assert by_policy[0] == by_policy[1] != by_policy[2]


def test_the_last_round_returns_several_rows() -> None:
    aligner = aligner_of()
    draw: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "seed": 2}
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=2, num_return_sequences=3, **draw)
    assert [len(texts) for texts in out.rounds] == [4, 12]
    assert len(out.text) == len(out.unchanged) == len(out.edit_distance) == 12
    assert out.rounds[0] == cf.correct(aligner, QUERIES, ANSWERS, SETS, **draw).text


@pytest.mark.parametrize("kind", ["best", "chunks", "tournament"])
def test_searches_see_the_query_and_not_the_template(kind: str) -> None:
    seen: list[Any] = []

    def longest(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.extend(prompts)
        return [float(len(r)) for r in responses]

    search: Any = {
        "best": lambda: cf.BestOfN(4, longest),
        "chunks": lambda: cf.ChunkBeamSearch(2, 2, 3, longest),
        "tournament": lambda: cf.Tournament(cf.Reward(longest), n=4),
    }[kind]()
    out = cf.correct(
        aligner_of(), QUERIES, ANSWERS, SETS, rounds=2, search=search, seed=3, max_new_tokens=6
    )
    assert out.values is not None
    assert out.values.tolist() == [float(len(t)) for t in out.text]
    assert all(x in QUERIES for x in seen)
    assert all(q in seen for q in QUERIES)


def test_models_of_a_search_read_the_query() -> None:
    tokenizer = make_tokenizer()
    tuned, ref = (cf.Model(make(seed=s), tokenizer=tokenizer) for s in (1, 2))
    value = cf.LogRatio(tuned, ref)
    out = cf.correct(
        aligner_of(), QUERIES, ANSWERS, SETS, search=cf.BestOfN(3, value), seed=3, max_new_tokens=6
    )
    a, b = (cf.score(m, QUERIES, out.responses).totals for m in (tuned, ref))
    assert out.values is not None
    assert torch.allclose(out.values, a - b, atol=1e-4)


def test_candidates_share_the_reading_of_their_prompt() -> None:
    def short(prompts: list[Any], responses: list[str]) -> list[float]:
        return [-float(len(r)) for r in responses]

    aligner = aligner_of()
    one, many = (
        cf.correct(
            aligner, QUERIES, ANSWERS, SETS, seed=1, do_sample=True, max_new_tokens=1,
            num_return_sequences=n,
        ).stats.models[0].tokens
        for n in (1, 8)
    )  # fmt: skip
    assert one > 100
    assert many == one + 4 * 7, "of each copy, the prompt's last token alone is read again"
    for search in (cf.BestOfN(8, short), cf.ChunkBeamSearch(2, 4, 1, short)):
        out = cf.correct(aligner, QUERIES, ANSWERS, SETS, seed=1, search=search, max_new_tokens=1)
        assert out.stats.models[0].tokens == many, "those of a search share it too"


def test_a_divergence_is_to_what_reads_the_same_prompt() -> None:
    aligner = aligner_of()
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, kl_to=make(), rounds=2, **GREEDY)
    assert out.kl is not None
    assert float(out.kl.abs().max()) < 1e-5, "an equal model reads the same"
