"""Tournaments of sampled rows: who wins, what is asked of the judge, and what comes back."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade.bulk.decode import decode
from judges import EVEN, Judge, writer
from scipy.stats import chi2_contingency
from search_cases import PROMPTS, SIMPLE, few_words
from tiny_models import EOS, make_tokenizer

SIZES = range(1, 18)


def key(text: str) -> bytes:
    """An order of all texts that has nothing to do with how they were made."""
    return hashlib.sha256(text.encode()).digest()


def by_key(context: Any, a: str, b: str) -> float:
    return float(key(a) > key(b))


def hooked(search: cf.Tournament, **settings: Any) -> Any:
    """Through `model.generate`: one request, as prompts of other lengths have other streams."""
    ids = torch.tensor([PROMPTS[0]])
    return writer().model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=cf.decode,
        blend=writer(),
        search=search,
        do_sample=True,
        top_k=0,
        return_dict_in_generate=True,
        **{**EVEN, **settings},
    )


@pytest.mark.parametrize("n", SIZES)
def test_a_judge_of_a_total_order_gets_the_best(n: int) -> None:
    """However the rows are decoded: all together, in batches, on the simple path, by the hook, or
    in bulk, and whatever the seed."""
    judge = Judge(by_key)
    search = cf.Tournament(judge, n)
    for seed in (7, 6, 5):
        judge.calls.clear()
        settings = {**EVEN, "seed": seed}
        at_once = {"max_batch": n * len(PROMPTS), "num_return_sequences": n}
        out = cf.generate(writer(), PROMPTS, search=search, **at_once, **settings)
        for i in range(len(PROMPTS)):
            texts = out.text[i * n : (i + 1) * n]
            assert len(set(texts)) == n, "no two rows are alike"
            assert texts[0] == max(texts, key=key)
        assert judge.matches == len(PROMPTS) * (n - 1)
        assert len(judge.calls) == math.ceil(math.log2(n)), "a round of all requests is one call"
    best = out.text[::n]
    for more in ({"max_batch": 2 * n}, {"engine": SIMPLE, "max_batch": 3 * n}):
        other = cf.generate(writer(), PROMPTS, search=search, **more, **settings)
        assert other.text == best
        assert str(other.bracket) == str(out.bracket)
    ours = hooked(search)
    assert ours.text == best[:1]
    assert str(ours.bracket) == str(out.bracket[:1])
    settings["seed"] = [5 + i for i in range(len(PROMPTS))]
    each = cf.generate(writer(), PROMPTS, search=search, **settings)
    assert each.text[0] == best[0]
    for i, one in decode(writer(), PROMPTS, search=search, max_batch=n, **settings):
        assert one.text == [each.text[i]]
        assert str(one.bracket) == str(each.bracket[i : i + 1])
        assert one.slots.tolist() == [int(each.slots[i])]


def test_rows_come_in_the_order_of_elimination() -> None:
    n = 13
    judge = Judge(by_key)
    every = cf.generate(
        writer(), PROMPTS, search=cf.Tournament(judge, n), num_return_sequences=n, **EVEN
    )
    few = cf.generate(
        writer(), PROMPTS, search=cf.Tournament(judge, n), num_return_sequences=3, **EVEN
    )
    samples = cf.generate(writer(), PROMPTS, num_return_sequences=n, do_sample=True, **EVEN)
    assert every.slots.shape == every.values.shape == (4, n)
    assert few.slots.shape == few.values.shape == (4, 3)
    assert few.text == [t for i in range(4) for t in every.text[i * n : i * n + 3]]
    assert torch.equal(few.slots, every.slots[:, :3])
    assert torch.equal(few.values, every.values[:, :3])
    for i, rounds in enumerate(every.bracket):
        # Slots are those of the samples, whose rows draw from the same streams.
        assert [samples.text[i * n + s] for s in every.slots[i]] == every.text[i * n : (i + 1) * n]
        probs: dict[int, list[float]] = {s: [] for s in range(n)}
        gone = dict.fromkeys(range(n), len(rounds))  # the round in which each lost
        for r, matches in enumerate(rounds):
            for a, b, prob, winner in matches:
                if b is not None:
                    assert prob == by_key(None, *(samples.text[i * n + s] for s in (a, b)))
                    probs[a].append(prob)
                    probs[b].append(1 - prob)
                    gone[b if winner == a else a] = r
        order = every.slots[i].tolist()
        means = torch.tensor([np.mean(probs[s]) for s in order], dtype=torch.float32)
        torch.testing.assert_close(every.values[i], means)
        went = [gone[s] for s in order]
        assert went == sorted(went, reverse=True)
        assert went.count(len(rounds)) == 1


def test_the_order_depends_on_the_seed_of_the_request_alone() -> None:
    """Not on its place in the list, nor on the requests beside it; and it is another one for
    another seed, and for another request of one seed."""
    search = cf.Tournament(Judge(), 7)
    seeds, prompts = [11, 12, 13, 14], list(PROMPTS)
    before, state = [list(p) for p in prompts], random.getstate()
    one = cf.generate(writer(), prompts, search=search, **{**EVEN, "seed": seeds})
    assert (prompts, random.getstate()) == (before, state), "nothing of the caller's is changed"
    assert seeds == [11, 12, 13, 14]
    back = cf.generate(writer(), prompts[::-1], search=search, **{**EVEN, "seed": seeds[::-1]})
    assert str(back.bracket) == str(one.bracket[::-1])
    assert back.text == one.text[::-1]
    alone = cf.generate(writer(), prompts[2:3], search=search, **{**EVEN, "seed": [13]})
    assert str(alone.bracket) == str(one.bracket[2:3])
    first = [[(m.a, m.b) for m in rounds[0]] for rounds in one.bracket]
    assert len({*map(str, first)}) == 4
    same = cf.generate(writer(), [prompts[0]] * 4, search=search, **EVEN)
    assert len({str([(m.a, m.b) for m in rounds[0]]) for rounds in same.bracket}) == 4


def test_a_noisy_judge_wins_as_often_as_in_a_simulation() -> None:
    """Samples of one token, whose tokens have strengths, by Bradley-Terry's probabilities.

    The noise of each match is drawn in a fixed order. The winners of 1500 tournaments of six and of
    a simulation that shares no code are compared by chi-square: p is 0.33 with these seeds, and the
    test asks for 0.01.
    """
    base, n, requests = few_words(7, words=9), 6, 1000
    tokenizer, first = make_tokenizer(), 4  # The tokens before it are special, and have no text.
    strengths = {tokenizer.decode([i]): 0.7 * (i - 6) for i in range(first, 9)}
    noise = np.random.default_rng(3)

    def wins(a: float, b: float) -> float:
        return float(noise.random() < 1 / (1 + math.exp(b - a)))

    judge = Judge(lambda context, a, b: wins(strengths[a.strip()], strengths[b.strip()]))
    out = cf.generate(
        cf.Model(base, tokenizer=tokenizer),
        [[3]] * requests,
        search=cf.Tournament(judge, n),
        max_new_tokens=1,
        eos_token_id=None,
        seed=11,
        max_batch=n * requests,
    )
    assert len(judge.calls) == 3
    ours = Counter(r[0] for r in out.responses)
    p = base(torch.tensor([[3]])).logits[0, -1].detach().double().softmax(-1).numpy()

    def strength(token: int) -> float:
        return -math.inf if token < first else 0.7 * (token - 6)

    theirs: Counter[int] = Counter()
    for tokens in np.random.default_rng(4).choice(9, size=(9000, n), p=p / p.sum()):
        # Six play three matches; of the three that are left the last rests, then plays the other.
        alive = [int(t) for t in tokens]
        while len(alive) > 1:
            rest = alive[len(alive) // 2 * 2 :]
            played = []
            for a, b in zip(alive[::2], alive[1::2], strict=False):
                x, y = strength(a), strength(b)
                of_a = 0.5 if x == y else 1 / (1 + math.exp(min(y - x, 700)))
                played.append(a if noise.random() < of_a else b)
            alive = played + rest
        theirs[alive[0]] += 1
    texts = sorted(t for t in theirs if t >= first)
    assert min(ours[t] for t in texts) > 5
    table = [[count[t] for t in texts] for count in (ours, theirs)]
    assert chi2_contingency(table).pvalue > 0.01


# ---- what is asked, and what is not


@pytest.mark.parametrize("prob", [0.5, float("nan")])
def test_ties_go_to_the_lower_slot(prob: float) -> None:
    out = cf.generate(writer(), PROMPTS, search=cf.Tournament(Judge(lambda *_: prob), 9), **EVEN)
    assert out.slots.tolist() == [0] * 4
    torch.testing.assert_close(out.values, torch.tensor([prob] * 4), equal_nan=True)
    for match in (m for rounds in out.bracket for matches in rounds for m in matches):
        assert match.winner == (match.a if match.b is None else min(match.a, match.b))


def test_rows_of_one_text_and_rows_without_are_not_asked_about() -> None:
    """Half of the tokens are special, so that many rows have no text, and many have one text."""
    base = cf.Model(few_words(3, words=6), tokenizer=make_tokenizer())
    judge = Judge(lambda context, a, b: 0.9 if a < b else 0.1)
    n = 8
    out = cf.generate(
        base,
        [[3]] * 20,
        search=cf.Tournament(judge, n),
        num_return_sequences=n,
        max_new_tokens=1,
        eos_token_id=EOS,
        seed=2,
    )
    asked = [pair for call in judge.calls for pair in call]
    assert all(a.strip() and b.strip() and a != b for _, a, b in asked)
    kinds: Counter[str] = Counter()
    for i, rounds in enumerate(out.bracket):
        text = dict(zip(out.slots[i].tolist(), out.text[i * n : (i + 1) * n], strict=True))
        for a, b, prob, winner in (m for matches in rounds for m in matches):
            one, other = bool(text[a].strip()), bool(text[b].strip())
            if one and other:
                kinds["alike" if text[a] == text[b] else "asked"] += 1
                wanted = 0.5 if text[a] == text[b] else 0.9 if text[a] < text[b] else 0.1
                assert prob == wanted
            elif one or other:
                kinds["one"] += 1
                assert prob == float(one)
                assert winner == (a if one else b)
            else:
                kinds["none"] += 1
                assert math.isnan(prob)
                assert winner == min(a, b)
        value, slot = float(out.values[i, 0]), int(out.slots[i, 0])
        mine = [m for x in rounds for m in x if slot in (m.a, m.b)]
        means = [m.prob if m.a == slot else 1 - m.prob for m in mine if not math.isnan(m.prob)]
        assert value == pytest.approx(np.mean(means))
    assert min(kinds[k] for k in ("alike", "asked", "one", "none")) >= 5
    assert kinds["asked"] == len(asked)


def test_rows_that_failed_lose() -> None:
    """Nothing may follow an odd token that is a row's second."""

    def nothing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        odd = (ids[:, -1] % 2 == 1) & (ids.shape[1] == len(PROMPTS[0]) + 2)
        return scores.masked_fill(odd[:, None], -math.inf)

    judge = Judge(lambda context, a, b: float(len(a) < len(b)))  # It would prefer those.
    n = 6
    with pytest.warns(RuntimeWarning, match="was ended at its token"):
        out = cf.generate(
            writer(),
            PROMPTS[:1],
            search=cf.Tournament(judge, n),
            num_return_sequences=n,
            logits_processor=[nothing],
            **EVEN,
        )
    failed = dict(zip(out.slots[0].tolist(), out.failed.tolist(), strict=True))
    assert 1 < sum(failed.values()) < n
    assert not out.failed[0]
    for a, b, prob, winner in (m for x in out.bracket[0] for m in x if m.b is not None):
        if failed[a] != failed[b]:
            assert prob == float(failed[b])
        elif failed[a]:
            assert (math.isnan(prob), winner) == (True, min(a, b))
    assert judge.matches == sum(
        not (failed[m.a] or failed[m.b]) for x in out.bracket[0] for m in x if m.b is not None
    )


def test_a_judge_sees_prompts_as_rewards_do_and_answers_as_output_has_them() -> None:
    base, n = cf.Model(writer().model, tokenizer=make_tokenizer()), 4
    seen: list[Any] = []

    def reward(prompts: list[Any], texts: list[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(texts)

    for prompt in ("the film was", [{"role": "user", "content": "the plot"}], [9, 10, 11]):
        seen.clear()
        judge = Judge()
        search = cf.Tournament(judge, n)
        out = cf.generate(base, [prompt], search=search, num_return_sequences=n, **EVEN)
        cf.generate(base, [prompt], search=cf.BestOfN(n, reward), **EVEN)
        contexts, firsts, seconds = zip(*judge.calls[0], strict=True)
        assert [*contexts] == seen[: len(contexts)]
        text = dict(zip(out.slots[0].tolist(), out.text, strict=True))
        first = out.bracket[0][0]
        assert [*zip(firsts, seconds, strict=True)] == [(text[m.a], text[m.b]) for m in first]


# ---- values that judge


def test_a_value_gives_its_best_and_its_scores() -> None:
    calls = []

    def score(prompts: list[Any], texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return [int.from_bytes(key(t)[:2], "big") / 7 for t in texts]

    for n in (1, 2, 5, 8):
        calls.clear()
        out = cf.generate(
            writer(), PROMPTS, search=cf.Tournament(score, n), num_return_sequences=n, **EVEN
        )
        assert calls == [4 * n], "all rows are scored once"
        best = cf.generate(writer(), PROMPTS, search=cf.BestOfN(n, score), **EVEN)
        assert out.text[::n] == best.text
        assert torch.equal(out.values.view(4, n)[:, 0], best.values)
        scores = torch.tensor(score([], out.text), dtype=torch.float32)
        assert torch.equal(out.values.flatten(), scores)
        assert torch.equal(out.value_parts.flatten(), scores)
        for i, rounds in enumerate(out.bracket):
            value = dict(
                zip(
                    out.slots.view(4, n)[i].tolist(), out.values.view(4, n)[i].tolist(), strict=True
                )
            )
            for a, b, prob, _ in (m for x in rounds for m in x if m.b is not None):
                assert prob == float(value[a] > value[b])


def test_values_that_are_equal_tie_and_nan_is_the_worst() -> None:
    def score(prompts: list[Any], texts: list[str]) -> list[float]:
        return [float("nan") if key(t)[0] % 2 else 1.0 for t in texts]

    out = cf.generate(
        writer(), PROMPTS, search=cf.Tournament(score, 8), num_return_sequences=8, **EVEN
    )
    assert out.values[:, 0].tolist() == [1.0] * 4
    for i, rounds in enumerate(out.bracket):
        value = dict(zip(out.slots[i].tolist(), out.values[i].tolist(), strict=True))
        good = [s for s in value if value[s] == 1]
        assert 0 < len(good) < 8
        assert out.slots[i, 0] == min(good) or rounds
        for a, b, prob, winner in (m for x in rounds for m in x):
            one, other = a in good, b in good
            wanted = 0.5 if one and other else float(one) if one or other else float("nan")
            assert prob == wanted or (math.isnan(prob) and math.isnan(wanted))
            assert winner == (min(a, b) if one == other else a if one else b)
