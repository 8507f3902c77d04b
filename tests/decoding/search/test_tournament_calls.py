"""Tournaments beside what else a call may ask for, and what goes wrong in them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade import training
from crossfade.bulk.decode import decode
from crossfade.identity import run_id
from judges import EVEN, Judge, Keeper, writer
from search_cases import PROMPTS, SIMPLE
from tiny_models import make


def longer(context: Any, a: str, b: str) -> float:
    return 0.9 if (len(a), a) > (len(b), b) else 0.1


# ---- a judge that keeps what it has read


@pytest.mark.parametrize("engine", [cf.Engine(), SIMPLE], ids=["engine", "simple"])
def test_a_judge_that_keeps_is_asked_through_what_it_gives(engine: cf.Engine) -> None:
    """All rounds of rows that play together are one block, which is over before others play."""
    judge, plain = Keeper(longer), Judge(longer)
    arguments = {"max_batch": 10, "engine": engine, **EVEN}
    out = cf.generate(writer(), PROMPTS, search=cf.Tournament(judge, 5), **arguments)
    assert judge.events == ["begin", "prefer", "prefer", "prefer", "end"] * 2
    same = cf.generate(writer(), PROMPTS, search=cf.Tournament(plain, 5), **arguments)
    assert str(same.bracket) == str(out.bracket)
    told = {s.names: (s.forwards, s.tokens) for s in out.stats.models}
    assert told["judge.llama",] == (2, 2 * plain.matches), "not mixed up with the policy's own"
    assert len(same.stats.models) == len(out.stats.models) - 1
    assert out.stats.models[0] == same.stats.models[0]


def raising(error: BaseException, after: int) -> Callable[..., float]:
    """A judge's function that raises an error at one of its calls."""
    left = [after]

    def prob(context: Any, a: str, b: str) -> float:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return longer(context, a, b)

    return prob


def test_a_judge_that_raises_leaves_nothing_open() -> None:
    first = cf.generate(
        writer(), PROMPTS, search=cf.Tournament(Judge(longer), 4), return_cache=True, **EVEN
    )
    assert first.cache.rows == 4
    on = [[*p, *r, 9] for p, r in zip(PROMPTS, first.responses, strict=True)]
    judge = Keeper(raising(ValueError("the judge is ill"), 3))
    arguments = {**EVEN, "cache": first.cache}
    with pytest.raises(ValueError, match="the judge is ill"):
        cf.generate(writer(), on, search=cf.Tournament(judge, 4), **arguments)
    assert judge.events[-1] == "end"
    good = cf.Tournament(Judge(longer), 4)
    again = cf.generate(writer(), on, search=good, **arguments)  # The cache is not lent any more.
    anew = cf.generate(writer(), on, search=good, **EVEN)
    assert again.text == anew.text
    assert str(again.bracket) == str(anew.bracket)


@pytest.mark.filterwarnings("ignore:interrupted when:RuntimeWarning")
def test_an_interrupt_keeps_tournaments_that_are_over() -> None:
    judge = Keeper(raising(KeyboardInterrupt(), 8))  # in the second round of the third request
    search = cf.Tournament(judge, 4)
    out = cf.generate(writer(), PROMPTS, search=search, max_batch=4, **EVEN)
    assert out.stats.interrupted
    assert out.ended.tolist() == [True, True, False, False]
    assert judge.events[-1] == "end"
    assert [len(rounds) for rounds in out.bracket] == [2, 2, 0, 0]
    assert out.slots.tolist()[2:] == [0, 0]
    assert out.values.isnan().tolist() == [False, False, True, True]
    assert [m.names for m in out.stats.models][-1] == ("judge.llama",)
    search = cf.Tournament(Keeper(raising(KeyboardInterrupt(), 8)), 4)
    done = decode(writer(), PROMPTS, search=search, max_batch=4, **EVEN)
    assert [len(next(done)[1].bracket[0]) for _ in range(2)] == [2, 2]
    with pytest.raises(KeyboardInterrupt):
        next(done)


def test_time_that_is_up_lets_rows_play_with_what_they_have() -> None:
    judge = Judge(longer)
    search, n = cf.Tournament(judge, 6), 6
    settings = {**EVEN, "max_new_tokens": 40, "num_return_sequences": n}
    out = cf.generate(writer(), PROMPTS, search=search, max_time=0.0, max_batch=24, **settings)
    assert not out.ended.any()
    assert (out.lengths == 1).all()
    assert judge.matches >= 4
    for i, rounds in enumerate(out.bracket):
        assert len(rounds) == 3
        text = out.text[i * n : (i + 1) * n]
        assert text[0] == max(text, key=lambda t: (len(t), t))
    assert not out.values[:, 0].isnan().any()


def test_one_row_plays_nobody() -> None:
    judge = Judge()
    out = cf.generate(
        writer(),
        PROMPTS,
        search=cf.Tournament(judge, 1),
        do_sample=False,
        **{**EVEN, "temperature": 1.0},
    )
    assert out.bracket == [[]] * 4
    assert out.values.isnan().all()
    assert not judge.calls
    assert out.text == cf.generate(writer(), PROMPTS, **{**EVEN, "temperature": 1.0}).text


def test_the_hook_gives_brackets_and_other_searches_none() -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    hook: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "custom_generate": cf.decode,
        "blend": cf.Recipe(writer(), cf.Tournament(Judge(longer), 5)),
        "do_sample": True,
        "top_k": 0,
        "return_dict_in_generate": True,
        "num_return_sequences": 2,
        **EVEN,
    }
    out = writer().model.generate(ids, **hook)
    ours = cf.generate(hook["blend"], ids, num_return_sequences=2, **EVEN)
    assert torch.equal(out.sequences, ours.sequences)
    assert str(out.bracket) == str(ours.bracket)
    assert torch.equal(out.slots, ours.slots.flatten())
    torch.testing.assert_close(out.search_values, ours.values.flatten())
    assert out.search_value_parts is None
    assert ours.value_parts is None
    ranked = cf.generate(writer(), ids, search=cf.BestOfN(3, lambda p, t: [0.0] * len(t)), **EVEN)
    plain = cf.generate(writer(), ids, do_sample=True, **EVEN)
    assert ranked.bracket is ranked.slots is plain.bracket is plain.slots is None


def test_what_is_printed() -> None:
    search = cf.Tournament(Judge(longer), 5)
    assert repr(search) == "Tournament(Judge, n=5)"

    def brief(prompts: list[Any], texts: list[str]) -> list[float]:
        return [float(-len(t)) for t in texts]

    assert repr(cf.Tournament(0.5 * cf.Reward(brief))) == "Tournament(0.5*brief, n=16)"
    out = cf.generate(writer(), PROMPTS[:1], search=search, num_return_sequences=2, **EVEN)
    lines = repr(out).splitlines()
    for i in (0, 1):
        assert (
            f"at its limit, slot {out.slots[0, i]}, value {out.values[0, i]:.4g}: " in lines[i + 1]
        )
    recipe = cf.Recipe(writer(), search)
    assert recipe.value is None
    assert cf.Recipe(writer(), cf.Tournament(brief)).value.names == ("brief",)
    bracket = pickle.loads(pickle.dumps(out.bracket))
    assert str(bracket) == str(out.bracket)
    assert bracket[0][0][0].winner == out.bracket[0][0][0].winner


# ---- what a judge must give


BAD: list[tuple[Any, type[Exception], str]] = [
    ([0.5], ValueError, "judge returned 1 probabilities; it must return 2, one a pair"),
    (None, TypeError, "judge returned None; it must return a number for each pair"),
    (["A", "B"], TypeError, r"judge returned \['A', 'B'\]; it must return a number for each pair"),
    (torch.zeros(2, 2), TypeError, r"(?s)judge returned tensor.*a number for each pair"),
    ([0.5, 1.5], ValueError, r"judge returned 1.5 for a pair; .* within \[0, 1\] or NaN"),
    ([-0.1, 0.5], ValueError, "judge returned -0.1 for a pair"),
    ([math.inf, 0.5], ValueError, "judge returned inf for a pair"),
]


class Saying:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def prefer(self, contexts: list[Any], firsts: list[str], seconds: list[str]) -> Any:
        return self.answer


@pytest.mark.parametrize(("answer", "error", "says"), BAD, ids=[b[2][:30] for b in BAD])
def test_answers_that_are_no_probabilities(answer: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        cf.generate(writer(), PROMPTS[:1], search=cf.Tournament(Saying(answer), 4), **EVEN)


@pytest.mark.parametrize(
    "answer", [(0.25,), np.array([0.25]), torch.tensor([0.25], dtype=torch.float64), [True]]
)
def test_answers_of_every_kind(answer: Any) -> None:
    out = cf.generate(writer(), PROMPTS[:1], search=cf.Tournament(Saying(answer), 2), **EVEN)
    assert out.bracket[0][0][0].prob == float(answer[0])


@pytest.mark.parametrize(("answer", "prob"), [(1.0000001, 1.0), (-1e-7, 0.0)])
def test_rounding_of_sums_is_no_mistake(answer: float, prob: float) -> None:
    out = cf.generate(writer(), PROMPTS[:1], search=cf.Tournament(Saying([answer]), 2), **EVEN)
    assert out.bracket[0][0][0].prob == prob


# ---- settings


def compare(contexts: Any, firsts: Any, seconds: Any) -> list[float]:
    return [0.5 for _ in firsts]


class TakesOne:
    def prefer(self, pairs: Any) -> list[float]:
        return [0.5 for _ in pairs]


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: cf.Tournament(Judge(), 0), ValueError, "n is 0; it must be at least 1"),
    (lambda: cf.Tournament(Judge(), -3), ValueError, "n is -3; it must be at least 1"),
    (lambda: cf.Tournament(Judge(), 2.0), TypeError, "n is 2.0; it must be an int"),
    (lambda: cf.Tournament(Judge(), True), TypeError, "n is True; it must be an int"),
    (lambda: cf.Tournament(Judge(), "16"), TypeError, "n is '16'; it must be an int"),
    (lambda: cf.Tournament(Judge(), 1025), ValueError, "n is 1025; it must be at most 1024 rows"),
    (lambda: cf.Tournament(None), TypeError, "judge is None; it must be a Judge, an object with"),
    (lambda: cf.Tournament(make("llama")), TypeError, r"a bare Llama.*Judge\(model, tokenizer="),
    (
        lambda: cf.Tournament(writer()),
        TypeError,
        r"a blend; .*; Judge\(model, tokenizer=...\) lets",
    ),
    (lambda: cf.Tournament(cf.Reward), TypeError, r"the class Reward; .*; make one: Reward\("),
    (lambda: cf.Tournament(Judge), TypeError, r"the class Judge; .*; make one: Judge\("),
    (lambda: cf.Tournament("judge"), TypeError, "judge is 'judge'; it must be"),
    (lambda: cf.Tournament(0.7), TypeError, "judge is 0.7; it must be"),
    (lambda: cf.Tournament(object()), TypeError, "judge is a object; it must be"),
    (lambda: cf.Tournament(compare), TypeError, "compare, a function; .* is to be a method prefer"),
    (
        lambda: cf.Tournament(TakesOne()),
        TypeError,
        r"judge is a TakesOne, whose prefer is called as prefer\(contexts, firsts, seconds\), with "
        "three lists, and cannot be: too many",
    ),
    (lambda: cf.Tournament(), TypeError, "judge"),
    (lambda: cf.Tournament(Judge(), width=4), TypeError, "'width'; how many rows play is n"),
    (lambda: cf.Tournament(Judge(), chunk_length=5), TypeError, "; whole responses play"),
    (lambda: cf.Tournament(value=Judge()), TypeError, "'value'; here it is judge"),
    (lambda: cf.Tournament(Judge(), principles=[]), TypeError, r"the judge has it: Judge\(model"),
    (lambda: cf.Tournament(Judge(), temperature=1.0), TypeError, "generate takes it"),
    (lambda: cf.Tournament(Judge(), 4, 5), TypeError, "got 3 arguments by position; it takes 2"),
    (lambda: cf.BestOfN(4, Judge()), TypeError, r"compares two .*search=Tournament\(judge, n=16\)"),
    (lambda: cf.Recipe(writer(), Judge()), TypeError, r"search is a Judge.*Tournament\(judge, n="),
    (lambda: cf.Recipe(writer(), cf.Tournament), TypeError, "it must be a search"),
]


@pytest.mark.parametrize(("make_it", "error", "says"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_settings_that_are_wrong(make_it: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make_it()


def test_calls_that_cannot_be() -> None:
    search = cf.Tournament(Judge(), 4)
    for more, says in (
        ({"do_sample": False}, "do_sample is False; a search of 4 rows must sample"),
        ({"num_return_sequences": 5}, "num_return_sequences is 5; it must be at most 4"),
        (
            {"temperature": 0.0},
            "temperature is 0; a search of 4 rows must sample, at a temperature above 0",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            cf.generate(writer(), PROMPTS, search=search, **{**EVEN, **more})
    with pytest.raises(ValueError, match="tokenizer is None; the judge reads texts"):
        cf.generate(writer().model, PROMPTS, search=search, **EVEN)
    with pytest.raises(TypeError, match=r"'judge'; a search takes it: search=crossfade.Tournament"):
        cf.generate(writer(), PROMPTS, judge=Judge(), **EVEN)


# ---- the identity of a run


class Weighted(Judge):
    def __init__(self, model: Any) -> None:
        super().__init__(longer)
        self.model = model


def test_a_run_knows_its_judge(tmp_path: Path) -> None:
    judge = Weighted(make("llama", 3))
    same, other = Weighted(make("llama", 3)), Weighted(make("llama", 4))
    ids = [run_id(search=cf.Tournament(j, 4)) for j in (judge, same, other)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0] != run_id(search=cf.Tournament(judge, 5))
    open_file = Saying((tmp_path / "x").open("w"))
    with pytest.raises(TypeError, match=r"judge of search\['answer'\] is or holds a TextIO"):
        run_id(search=cf.Tournament(open_file, 4))
    open_file.answer.close()
    rewards = {"length": lambda prompts, texts: [float(len(t)) for t in texts]}
    file = tmp_path / "rows.jsonl"
    arguments = {"n": 2, "batch_size": 8, **EVEN}
    prompts = ["w5 w6", "w7"]
    rows = training.rollouts(
        writer(), prompts, rewards, file, search=cf.Tournament(judge, 4), **arguments
    )
    assert [len(row["responses"]) for row in rows] == [2, 2]
    judge.calls.clear()
    again = training.rollouts(
        writer(), prompts, rewards, file, search=cf.Tournament(judge, 4), **arguments
    )
    assert again == rows
    assert not judge.calls
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        training.rollouts(
            writer(), prompts, rewards, file, search=cf.Tournament(other, 4), **arguments
        )
