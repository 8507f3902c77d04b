"""What is there when Ctrl-C comes, and what a streamer is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import numpy as np
import pytest
from crossfade.progress import OnStep
from test_correct import ANSWERS, GREEDY, QUERIES, SETS, aligner_of
from tiny_models import make
from torch import Tensor


class Words:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ends = 0

    def put(self, tokens: Tensor) -> None:
        self.told.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def interrupt_at(call: int) -> Callable[[list[Any], list[str]], list[float]]:
    """A reward that prefers new texts, and at one of its calls is interrupted."""
    calls = iter(range(1, 99))

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        if next(calls) == call:
            raise KeyboardInterrupt
        return [float(r not in ANSWERS) for r in responses]

    return reward


def after(steps: int) -> Any:
    """A streamer that is interrupted after some steps."""
    left = iter(range(steps, -1, -1))

    def step() -> None:
        if next(left) == 0:
            raise KeyboardInterrupt

    return OnStep(step)


def test_a_streamer_is_told_of_the_last_round() -> None:
    aligner = aligner_of()
    for rounds in (1, 2):
        words = Words()
        out = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=rounds, streamer=words, **GREEDY)
        plain = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=rounds, **GREEDY)
        assert out.rounds == plain.rounds
        assert words.ends == 1
        assert len(words.told) == 1 + int(out.lengths.max())
        assert words.told[1] == [row[0] for row in out.responses]
    policy = make(seed=3)
    words, own = Words(), Words()
    out = cf.correct(aligner, QUERIES, policy, SETS, streamer=words,
                     policy_generation={"streamer": own}, **GREEDY)  # fmt: skip
    assert words.ends == own.ends == 1
    assert words.told[0] != own.told[0]
    with pytest.warns(RuntimeWarning, match="query 1 was not corrected"):
        out = cf.correct(aligner, ["a", "b"], ["w1", ""], "bright", streamer=words, **GREEDY)
    assert out.failed.tolist() == [False, True]


def test_an_interrupt_keeps_what_had_ended_and_the_other_answers() -> None:
    aligner, limits = aligner_of(), [2, 9, 2, 9]
    asked: dict[str, Any] = {"max_new_tokens": limits, "do_sample": False}
    whole = cf.correct(aligner, QUERIES, ANSWERS, SETS, **asked)
    with pytest.warns(RuntimeWarning, match="interrupted when 2 of 4 rows had ended"):
        out = cf.correct(aligner, QUERIES, ANSWERS, SETS, streamer=after(5), **asked)
    assert out.stats.interrupted
    assert out.text == [whole.text[0], ANSWERS[1], whole.text[2], ANSWERS[3]]
    assert out.rounds == [out.text]
    assert not out.failed.any()
    assert out.unchanged.tolist() == [False, True, False, True]
    assert out.ended.tolist() == [True, False, True, False]
    assert out.responses[1] == whole.responses[1][: len(out.responses[1])] != []


def test_an_interrupt_in_a_later_round_keeps_the_rounds_before() -> None:
    aligner = aligner_of()
    first = cf.correct(aligner, QUERIES, ANSWERS, SETS, **GREEDY).text
    for call, rounds in ((1, [ANSWERS]), (2, [first, first])):
        with pytest.warns(RuntimeWarning, match=f"interrupted in round {call} of 3"):
            out = cf.correct(
                aligner, QUERIES, ANSWERS, SETS, rounds=3, accept=interrupt_at(call), **GREEDY
            )
        assert out.stats.interrupted
        assert out.rounds == rounds, "no correction stands that was not scored"
        assert out.text == rounds[-1]
        assert out.scores is not None
        assert bool(out.scores.isnan().all()) == (call == 1)


def test_an_interrupt_before_there_is_anything_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = aligner_of()
    monkeypatch.setattr(cf.MetaAligner, "reading", lambda *args: interrupt_at(1)([], []))
    with pytest.raises(KeyboardInterrupt):
        cf.correct(aligner, QUERIES, ANSWERS, SETS, **GREEDY)


def test_an_interrupt_while_a_policy_writes_keeps_its_answers() -> None:
    policy = make(seed=3)
    asked: dict[str, Any] = {"max_new_tokens": [2, 9, 2, 9]}
    whole: Any = cf.generate(aligner_of(policy).blend, QUERIES, tokenizer=aligner_of().tokenizer,
                        do_sample=False, **asked)  # fmt: skip
    with pytest.warns(RuntimeWarning, match="interrupted when 2 of 4 rows had ended"):
        out = cf.correct(
            aligner_of(), QUERIES, policy, SETS, accept=interrupt_at(9), rounds=2,
            policy_generation={"streamer": after(5), **asked}, **GREEDY,
        )  # fmt: skip
    assert out.stats.interrupted
    assert out.rounds == []
    assert out.text == out.answers
    assert [out.answers[i] for i in (0, 2)] == [whole.text[i].strip() for i in (0, 2)]
    assert not out.failed.any()
    assert out.responses[0] == whole.responses[0]


def test_arrays_of_texts_are_lists() -> None:
    queries, answers = ["the film", "a plot"], ["w1", "w2 w3"]
    out = cf.correct(aligner_of(), np.array(queries), np.array(answers), "bright", **GREEDY)
    same = cf.correct(aligner_of(), queries, answers, "bright", **GREEDY)
    assert out.text == same.text
