"""Sweeps write what separate calls write, in few calls, and name what is wrong with arguments."""

from __future__ import annotations

import math
from typing import Any

import crossfade as cf
import pytest
from crossfade import metrics
from crossfade.bulk import decode as bulk
from crossfade.bulk.records import seed_of
from sweep_cases import PROMPTS, ones, short

W = [{"short": s, "ones": 1 - s} for s in (0.0, 0.5, 1.0)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of requests of each call that decodes."""
    found: list[int] = []
    decode = bulk.decode

    def counted(blend: Any, prompts: Any, **options: Any) -> Any:
        found.append(len(prompts))
        return decode(blend, prompts, **options)

    monkeypatch.setattr(bulk, "decode", counted)
    return found


def forms(terms: list[cf.Model]) -> dict[str, Any]:
    """Methods of all forms, of which `calls` says how many calls three weightings take."""
    base, a, b = terms
    system = [cf.Model(base.model, tokenizer=base.tokenizer, system=s) for s in ("w1", "w2", "w3")]
    values = cf.Reward(short), cf.Reward(ones)
    return {
        "sum": (lambda w: base + w["short"] * (a - base) + w["ones"] * (2 * b), 1),
        "ends": (lambda w: w["short"] * a + w["ones"] * b, 1),
        "cut": (lambda w: (base + w["short"] * a).within(cf.Support(top_k=9)), 1),
        "mean": (lambda w: cf.power_mean([a, b], weights=[w["short"], w["ones"]], r=1.0), 1),
        "prompts": (lambda w: system[round(2 * w["short"])], 1),
        "own": (lambda w: cf.Model(a.model, tokenizer=a.tokenizer, prompt=f"w{w['ones']:g}"), 1),
        "soups": (lambda w: (base, a, b)[round(2 * w["short"])], 3),
        "search": (
            lambda w: cf.Recipe(
                base, cf.BestOfN(3, w["short"] * values[0] + w["ones"] * values[1])
            ),
            1,
        ),
        "dict": (lambda w: {"blend": a, "temperature": 0.5 + w["short"]}, 3),
        "same": (lambda w: {"blend": a, "search": cf.BestOfN(2, short), "top_k": 5}, 1),
    }


NAMES = ["sum", "ends", "cut", "mean", "prompts", "own", "soups", "search", "dict", "same"]


@pytest.mark.parametrize("name", NAMES)
def test_weightings_in_one_call_write_what_separate_calls_write(
    name: str, terms: list[cf.Model], sweep: Any, calls: list[int]
) -> None:
    method, expected = forms(terms)[name]
    front = sweep({name: method})
    assert len(calls) == expected
    assert sum(calls) == len(W) * len(PROMPTS)
    seeds = [seed_of(0, i) for i in range(len(PROMPTS))]
    for i, w in enumerate(W):
        made = method(w)
        options = made if isinstance(made, dict) else {"blend": made}
        alone = cf.generate(**options, inputs=PROMPTS, seed=seeds, max_new_tokens=5, do_sample=True)
        assert front.points[i]["weights"] == w
        assert [text for (text,) in front.texts[i]] == alone.text


def test_points_have_means_intervals_and_what_the_reference_says(
    terms: list[cf.Model], blended: Any, sweep: Any
) -> None:
    front = sweep({"blend": blended}, kl_to=terms[0], num_return_sequences=2)
    seeds = [seed_of(0, i) for i in range(len(PROMPTS))]
    for i, w in enumerate(W):
        out: Any = cf.generate(
            blended(w),
            PROMPTS,
            seed=seeds,
            kl_to=terms[0],
            num_return_sequences=2,
            max_new_tokens=5,
            do_sample=True,
        )
        point = front.points[i]
        assert [text for own in front.texts[i] for text in own] == out.text
        each = [(a + b) / 2 for a, b in zip(*[iter(short([], out.text))] * 2, strict=True)]
        found = point["rewards"]["short"], point["intervals"]["short"]
        assert found == pytest.approx(metrics.mean_interval(each))
        kl = out.kl.sum(dim=1).view(-1, 2).mean(dim=1).tolist()
        assert (point["kl"], point["kl_interval"]) == pytest.approx(metrics.mean_interval(kl))
        prompts = [p for p in PROMPTS for _ in range(2)]
        scores = cf.score(terms[0], prompts, out.responses)
        assert point["perplexity"] == pytest.approx(
            metrics.perplexity(scores.totals.sum().item(), scores.lengths.sum().item()), rel=1e-5
        )


def test_without_a_reference_there_is_no_divergence(blended: Any, sweep: Any) -> None:
    (point, *_) = sweep({"blend": blended}, weights=W[:1], prompts=PROMPTS[:1]).points
    assert point["kl"] is None is point["perplexity"]
    assert point["intervals"] == {"short": None, "ones": None}  # there is a single prompt


def test_a_weight_of_the_divergence_makes_it_an_objective(
    terms: list[cf.Model], sweep: Any
) -> None:
    base, a, _ = terms
    weights = [{"short": 1.0}, {"short": 0.5, "kl": 0.5}, {"kl": 1.0}]
    front = sweep(
        {"dera": lambda w: (1 - w["kl"]) * a + w["kl"] * base},
        rewards={"short": short},
        weights=weights,
        kl_to=base,
    )
    assert front.rewards == ("short", "kl")
    assert [p["rewards"]["kl"] for p in front.points] == [-p["kl"] for p in front.points]
    assert front.points[2]["kl"] == pytest.approx(0, abs=1e-5)
    assert front.correlations["dera"]["kl"] == pytest.approx(1)


def test_writers_write_texts_themselves(terms: list[cf.Model], blended: Any, sweep: Any) -> None:
    front = sweep(
        {
            "blend": blended,
            "output": lambda w: lambda prompts, **g: cf.generate(blended(w), prompts, **g),
            "texts": lambda w: lambda prompts, **g: [f"w1 {w['ones']}" for _ in prompts],
        },
        kl_to=terms[0],
    )
    assert front.texts[3:6] == front.texts[:3]
    assert front.texts[6:] == [[["w1 1.0"]] * 3, [["w1 0.5"]] * 3, [["w1 0.0"]] * 3]
    assert [p["kl"] is None for p in front.points] == [False] * 6 + [True] * 3
    assert all(p["perplexity"] is not None for p in front.points)


def test_chats_and_values_with_models_are_taken(terms: list[cf.Model], sweep: Any) -> None:
    base, a, _ = terms
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    ratio = cf.LogRatio(a, base)
    front = sweep({"a": lambda w: a}, prompts=chats, rewards={"ratio": ratio}, weights=[{}])
    assert front.prompts == chats
    assert math.isfinite(front.points[0]["rewards"]["ratio"])


def test_the_grid_has_all_weightings_that_sum_to_one() -> None:
    from crossfade.pareto.weightings import weightings

    three = weightings(11, ["a", "b", "c"])
    assert len(three) == 66
    assert all(sum(w.values()) == pytest.approx(1) for w in three)
    assert [w["a"] for w in weightings(11, ["a", "b"])] == [k / 10 for k in range(11)]
    assert weightings(3, ["a"]) == [{"a": 1.0}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "methods is {}; it must be a mapping of names to functions of weights"),
        ({"methods": {"a": "x"}}, r"methods\['a'\] is a str; it must be a function of a weighting"),
        ({"methods": {"": max}}, "methods has the name ''"),
        ({"methods": {"a": lambda w: 3}}, r"methods\['a'\] at short=0, ones=1: it gives a int; it"),
        ({"methods": {"a": lambda w: w["x"]}}, r"\['a'\] at short=0, ones=1 failed \(KeyError"),
        ({"methods": {"a": lambda w: {"top_k": 3}}}, r"it gives a dict with the keys \['top_k'\]"),
        (
            {"methods": {"a": lambda w: lambda p, **g: ["x"]}},
            r"methods\['a'\]: it gave 1 texts; it must be 3, one a prompt",
        ),
        ({"prompts": "hi"}, "prompts is 'hi'; it must be a list of texts or chats"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1, 2]]}, r"prompts\[0\] is \[1, 2\]; it must be a text or a chat"),
        ({"rewards": {}}, "rewards is {}; it must be a mapping of names to functions"),
        ({"rewards": {"a": 3}}, r"rewards\['a'\] is 3; it must be"),
        ({"weights": 1}, "weights is 1; it must be at least 2"),
        ({"weights": []}, "weights is empty"),
        ({"weights": {"short": 1}}, "one weighting; it must be a list of them"),
        ({"weights": [{"shrt": 1}]}, r"weights\[0\] has 'shrt'; .* did you mean 'short'"),
        ({"weights": [{"short": math.nan}]}, r"weights\[0\]\['short'\] is nan"),
        ({"weights": [{"short": 1}, {"short": 1, "ones": 0}]}, r"weights\[1\] .* as weights\[0\]"),
        ({"weights": [{"kl": 1.0}]}, 'weights have "kl", and kl_to is not given'),
        ({"seed": None}, "seed is None"),
        ({"temperature": [0.1, 0.2]}, "temperature is .*; in a sweep it must be one for all"),
        ({"search": cf.BestOfN(2, short)}, "search is not supported by crossfade.pareto; a method"),
        ({"max_tokens": 3}, "max_tokens.*max_new_tokens"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], message: str, terms: list[cf.Model], sweep: Any
) -> None:
    options = {"methods": {"a": lambda w: terms[0]}, **options}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        sweep(options.pop("methods"), **options)


def test_a_reward_that_fails_is_named_and_the_rest_is_kept(blended: Any, sweep: Any) -> None:
    count = iter(range(9))

    def flaky(prompts: list[Any], responses: list[str]) -> list[float]:
        if next(count) == 1:
            raise OSError("no server")
        return [1.0] * len(responses)

    with pytest.warns(RuntimeWarning, match=r"the reward 'ones' of 'b' at .*ones=0.5 failed \(OSE"):
        front = sweep({"b": blended}, rewards={"short": short, "ones": flaky})
    assert [p["rewards"]["ones"] for p in front.points] == [1.0, None, 1.0]
    assert all(p["rewards"]["short"] is not None for p in front.points)
    assert front.whole("b") == [0, 2]
    assert "1 without all rewards" in repr(front)
    with pytest.raises(ValueError, match=r"rewards\['ones'\], of 'b' at .*, failed \(ZeroDiv"):
        sweep({"b": blended}, rewards={"short": short, "ones": lambda p, r: [1 / 0]})
    with pytest.raises(ValueError, match=r"rewards\['ones'\], of 'b' .* 1 scores"):
        sweep({"b": blended}, rewards={"short": short, "ones": lambda p, r: [1.0]})


def test_a_reward_of_nan_is_named(blended: Any, sweep: Any) -> None:
    def odd(prompts: list[Any], responses: list[str]) -> list[float]:
        return [math.nan if p == PROMPTS[1] else 1.0 for p in prompts]

    with pytest.warns(RuntimeWarning, match="the reward 'ones' of 'b' at .* is nan for prompt 1"):
        front = sweep({"b": blended}, rewards={"short": short, "ones": odd}, weights=2)
    assert front.points[0]["rewards"]["ones"] is None
    assert front.scores[0]["ones"] == [[1.0], [None], [1.0]]
