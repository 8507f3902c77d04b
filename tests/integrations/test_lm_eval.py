"""A blend gives the evaluation harness what `HFLM` gives for one model, and what it is for more."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest

pytest.importorskip("lm_eval", reason='it needs "crossfade[lm-eval]"')

from crossfade.integrations.lm_eval import CrossfadeLM
from harness import KINDS, hflm, model_of, requests
from tokenizer_kinds import TEXTS, tokenizer_of

LONG = "the film was a very bright one, and the answer is dull. " * 3
PAIRS = [
    ("The film was", " dull"),
    ("The film was", " very bright"),
    ("The film was ", "bright"),  # The space goes to the continuation.
    ("The film was \n\n", "bright"),
    ("hello", "world"),
    ("", "The answer is yes"),
    ("", "<s>hello"),  # It begins with the prefix token.
    ("<s>The plot", " walking"),
    (LONG, " yes"),  # It is longer than the context, as is the next one.
    (LONG, LONG[:40]),
]


def ours(kind: str, **options: Any) -> CrossfadeLM:
    return CrossfadeLM(cf.Model(model_of(kind), tokenizer=tokenizer_of(kind)), **options)


def greedy_pairs(kind: str) -> list[tuple[str, str]]:
    """Contexts with what greedy decoding writes after them, and with its first token alone."""
    tokenizer = tokenizer_of(kind)
    found = []
    for context in ("The film was", "A cast", "hello", "walking and"):
        encode = ours(kind).tok_encode
        out = cf.generate(model_of(kind), [encode(context)], max_new_tokens=3, eos_token_id=None)
        (ids,) = out.responses
        for n in (1, 3):
            text = tokenizer.decode([*encode(context), *ids[:n]], skip_special_tokens=True)
            found.append((context, text[len(context) :]))
    return [(context, text) for context, text in found if text.strip()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_hflm(kind: str, batch_size: int) -> None:
    asked = requests("loglikelihood", [*PAIRS, *greedy_pairs(kind)])
    theirs = hflm(kind, max_length=24, batch_size=batch_size)
    own = ours(kind, max_length=24, batch_size=batch_size)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = own.loglikelihood(asked, disable_tqdm=True)
    for (a, a_greedy), (b, b_greedy) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert a_greedy == b_greedy
    assert {greedy for _, greedy in found} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_special_tokens_and_the_prefix_are_those_of_hflm(kind: str, add_bos_token: bool) -> None:
    options: dict[str, Any] = {"add_bos_token": add_bos_token, "prefix_token_id": 3}
    theirs, own = hflm(kind, **options), ours(kind, **options)
    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = own.loglikelihood(asked, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_log_likelihoods_are_those_of_hflm(kind: str) -> None:
    """The last text is longer than the context, by which it is cut into windows."""
    asked = requests("loglikelihood_rolling", [("",), ("hello world",), (LONG,)])
    expected = hflm(kind, max_length=20, batch_size=2).loglikelihood_rolling(asked, True)
    found = ours(kind, max_length=20).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[2] < found[1] < found[0] <= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_those_of_hflm(kind: str, batch_size: int) -> None:
    """Stops are texts, special tokens, or none; contexts are cut; the order is kept.

    `HFLM` writes one text at a time: beside others it writes on after a stop that is a special
    token, which its text does not show.
    """
    asked = requests(
        "generate_until",
        [
            (context, dict(settings))
            for context in ("hello", "The film was very", LONG, "A cast of players")
            for settings in (
                {"until": ["e", "\n"], "max_gen_toks": 9},
                {"until": ["<|user|>"], "max_gen_toks": 12, "do_sample": False, "temperature": 1},
                {"until": [], "max_gen_toks": 10, "repetition_penalty": 1.3},
            )
        ],
    )
    expected = hflm(kind, max_length=24).generate_until(asked, disable_tqdm=True)
    found = ours(kind, max_length=24, batch_size=batch_size).generate_until(asked, True)
    assert found == expected
    assert len(set(found)) > 6


def test_what_hflm_cannot_do() -> None:
    """Empty continuations, and continuations without a token of their own."""
    tokenizer, own = tokenizer_of("bytes"), ours("bytes")
    joined = next(
        t
        for t in TEXTS[0].split()
        if len(tokenizer.encode(t)) == len(tokenizer.encode(t[:-1])) == 1 and len(t) > 1
    )
    pairs = [("hello", ""), ("", ""), (joined[:-1], joined[-1])]
    found = own.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert found[:2] == [(0.0, True)] * 2
    before, after = (tokenizer.encode(t) for t in pairs[2])
    scores = cf.score(model_of("bytes"), [before], [after])
    assert found[2][0] == pytest.approx(float(scores.totals[0]), abs=1e-4)
    (text,) = own.generate_until(requests("generate_until", [("", {"max_gen_toks": 3})]), True)
    assert isinstance(text, str)
    with pytest.raises(ValueError, match=r"continuation of \d+ tokens; max_length is 4"):
        ours("bytes", max_length=4).loglikelihood(requests("loglikelihood", [("a", LONG)]), True)
    with pytest.raises(ValueError, match="max_gen_toks is 8; it must be below max_length, 8"):
        ours("bytes", max_length=8, max_gen_toks=8).generate_until(
            requests("generate_until", [("a", {})]), True
        )
