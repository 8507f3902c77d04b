"""Drafted corrections are those without a draft, and an answer that is copied drafts them."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS, make, make_tokenizer
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
QUERIES: list[Any] = ["the film was", [{"role": "user", "content": "the plot"}], "w7 w8"]
ANSWERS = ["a bright plot w9 w12 very bright", "dull dull w9", "the cast was very very bright"]
SETS: list[Any] = [["bright"], {"plain": "w3 w4 film"}, ["brevity"]]
DRAW: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "seed": 5}


def aligner_of(model: Any = None) -> cf.MetaAligner:
    model = make() if model is None else model
    return cf.MetaAligner(model, make_tokenizer(), objectives={"bright": "the film very bright"})


def drafts(aligner: cf.MetaAligner) -> dict[str, Any]:
    return {
        "answer": "answer",
        "answer of a length": cf.Draft("answer", length=4),
        "prompt": cf.Draft("prompt", length=3),
        "texts": cf.Draft(texts=["w9", None, "the cast was"], length=3),
        "the aligner itself": cf.Draft(aligner.blend.terms[0], length=3),
        "another model": cf.Draft(make("gpt2", 1), length=3),
    }


KINDS = list(drafts(aligner_of()))


@pytest.mark.parametrize("kind", KINDS)
def test_corrections_are_the_same(kind: str) -> None:
    aligner = aligner_of()
    asked = {**DRAW, "rounds": 2, "num_return_sequences": 2}
    plain = cf.correct(aligner, QUERIES, ANSWERS, SETS, **asked)
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, draft=drafts(aligner)[kind], **asked)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.rounds == plain.rounds
    torch.testing.assert_close(out.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)
    assert plain.tokens_by_draft is None
    assert out.tokens_by_draft is not None
    assert out.tokens_by_draft.shape == (6,)
    if kind == "the aligner itself":  # It draws with the same noise, and reads the same prompts.
        assert out.stats.acceptance == 1.0
        assert (out.tokens_by_draft > 0).all()


def copying() -> PreTrainedModel:
    """An aligner whose next word depends on the last one alone, so that it writes the same words
    whatever it is given, and the corrections of its corrections are copies."""
    model = make()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.lm_head.weight[:8].zero_()  # It writes no special token, which texts do not show.
    return model


GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


def test_a_copy_is_drafted_by_the_answer() -> None:
    aligner = aligner_of(copying())
    written = cf.correct(aligner, QUERIES, ANSWERS, SETS, **GREEDY)
    out = cf.correct(aligner, QUERIES, written.text, SETS, draft="answer", **GREEDY)
    assert out.unchanged.all()
    assert out.tokens_by_draft is not None
    assert (out.tokens_by_draft > 0).all()
    assert out.stats.right == out.tokens_by_draft.sum() <= out.stats.guessed


def test_each_round_is_drafted_by_the_answer_that_it_edits() -> None:
    aligner, draft = aligner_of(copying()), cf.Draft("answer", length=4)
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=2, draft=draft, **GREEDY)
    assert out.rounds[0] == out.rounds[1] != ANSWERS
    # 1 + 4 tokens, then 1 + 3: the last one is read by nobody, so that nothing is guessed after it.
    assert out.tokens_by_draft.tolist() == [7, 7, 7]
    first = cf.correct(aligner, QUERIES, ANSWERS, SETS, draft=draft, **GREEDY)
    assert out.stats.guessed == first.stats.guessed + 21, "of all rounds"
    assert out.stats.right == first.stats.right + 21
    assert out.stats.rounds == first.stats.rounds + 2


def test_the_answers_of_a_policy_draft() -> None:
    aligner, policy = aligner_of(copying()), cf.Model(make(seed=3), tokenizer=make_tokenizer())
    plain = cf.correct(aligner, QUERIES, policy, SETS, **GREEDY)
    own = {"draft": cf.Draft("prompt", length=2)}
    out = cf.correct(
        aligner, QUERIES, policy, SETS, draft="answer", policy_generation=own, rounds=2, **GREEDY
    )
    assert out.answers == plain.answers
    assert out.text == plain.text
    assert (out.tokens_by_draft > 0).all()


@pytest.mark.filterwarnings("ignore:query 1 was not corrected")
def test_a_row_that_fails_needs_no_draft() -> None:
    aligner, answers = aligner_of(copying()), [ANSWERS[0], " ", ANSWERS[2]]
    plain = cf.correct(aligner, QUERIES, answers, SETS, rounds=2, **GREEDY)
    out = cf.correct(aligner, QUERIES, answers, SETS, rounds=2, draft="answer", **GREEDY)
    assert out.text == plain.text
    assert out.failed.tolist() == [False, True, False]
    assert out.tokens_by_draft[1] == 0


def test_rows_that_end_are_drafted_up_to_their_ends() -> None:
    aligner = aligner_of()
    asked: dict[str, Any] = {**DRAW, "eos_token_id": [EOS, *range(20, 40)], "rounds": 2}
    plain = cf.correct(aligner, QUERIES, ANSWERS, SETS, **asked)
    out = cf.correct(aligner, QUERIES, ANSWERS, SETS, draft="answer", **asked)
    assert out.text == plain.text
    assert out.finished.tolist() == plain.finished.tolist()
    assert out.finished.any()


def test_an_answer_drafts_corrections_alone() -> None:
    with pytest.raises(ValueError, match="which crossfade"):
        cf.generate(make(), [[5, 6]], draft=cf.Draft("answer"), max_new_tokens=2)
