"""An open loop: prompts of several callers share one batch, and have the texts of one call."""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

import crossfade as cf
import pytest
from crossfade.bulk.decode import decode
from crossfade.bulk.open_loop import Item, OpenLoop
from crossfade.bulk.prompts import Line
from crossfade.bulk.records import seed_of
from crossfade.bulk.texts import Texts
from crossfade.loading import Loaded
from tiny_models import make, make_letters, make_tokenizer

FORMULA = "base + w * (tuned - base)"
LINES = [
    Line("great film"),
    Line("the plot was", {"max_new_tokens": 3}),
    Line("very dull", {"weights": {"w": -0.5}}),
    Line("a cast", {"temperature": 1.5, "seed": 7}),
    Line([{"role": "user", "content": "the film"}]),
    Line("bright", {"top_k": 3}),
    Line("awful cast the film was very", {"weights": {"w": 1.5}, "max_new_tokens": 17}),
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    tokenizer = make_tokenizer()
    terms = {n: cf.Model(make("llama", i), tokenizer=tokenizer, name=n) for i, n in enumerate(N)}
    return Loaded(FORMULA, terms, {"w": 0.8}, plain=terms)


N = ("base", "tuned")


def texts(loaded: Loaded, **options: Any) -> Texts:
    common = {"max_new_tokens": 8, **options.pop("common", {})}
    return Texts(loaded, common, faders=True, **options)


def items(lines: list[Line]) -> list[Item]:
    return [
        Item(f"prompt {i}", line.prompt, line, line.settings.get("seed", seed_of(0, i)))
        for i, line in enumerate(lines)
    ]


def records(given: Texts, lines: list[Line], found: list[Any]) -> list[dict[str, Any]]:
    return [
        given.record(i, line.prompt, line, out, "run")
        for i, (line, out) in enumerate(zip(lines, found, strict=True))
    ]


def of_one_call(given: Texts, lines: list[Line]) -> list[dict[str, Any]]:
    """The results of `decode`, which has all prompts from the beginning."""
    seeds = [item.seed for item in items(lines)]
    done = dict(
        decode(
            given.moved(lines),
            [line.prompt for line in lines],
            seed=seeds,
            max_batch=3 * (given.n or 1),
            **given.arguments(lines),
        )
    )
    return records(given, lines, [done[i] for i in range(len(lines))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"common": {"do_sample": True}},
        {"n": 2, "common": {"do_sample": True}, "terms": True, "logprobs": True},
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_results_are_those_of_one_call(loaded: Loaded, options: Any, size: int) -> None:
    given = texts(loaded, **options)
    loop = OpenLoop(given, 3)
    asked = items(LINES)
    for i in range(0, len(asked), size):
        loop.submit(asked[i : i + size])
    found = [item.future.result(60) for item in asked]
    loop.close()
    assert [why for _, why in found] == [None] * len(LINES)
    assert records(given, LINES, [out for out, _ in found]) == of_one_call(given, LINES)


def test_a_search_is_that_of_one_call(loaded: Loaded) -> None:
    base, tuned = loaded.terms.values()
    given = texts(loaded, search=cf.BestOfN(3, cf.LogRatio(tuned, base)), n=2)
    loop = OpenLoop(given, 2)
    asked = items(LINES[:3])
    for item in asked:
        loop.submit([item])
    found = [item.future.result(60)[0] for item in asked]
    loop.close()
    assert records(given, LINES[:3], found) == of_one_call(given, LINES[:3])


def test_a_place_is_taken_before_the_batch_has_ended(loaded: Loaded) -> None:
    """One long text keeps its place, while those of the next call come and go beside it."""
    given = texts(loaded, common={"max_new_tokens": 400, "eos_token_id": 60})
    loop = OpenLoop(given, 2)
    first = items([Line("great film"), Line("the plot", {"max_new_tokens": 2})])
    later = items([Line("very dull", {"max_new_tokens": 2})] * 3)
    loop.submit(first)
    first[1].future.result(60)
    loop.submit(later)
    wait([item.future for item in later], 60)
    assert not first[0].future.done()
    loop.close(drain=False)
    with pytest.raises(RuntimeError, match="closed"):
        loop.submit(later)
    assert isinstance(first[0].future.exception(60), RuntimeError)


def test_a_bad_prompt_fails_alone(loaded: Loaded) -> None:
    given = texts(loaded)
    loop = OpenLoop(given, 4)
    lines = [Line("great"), Line([]), Line("film"), Line("the " * 600)]
    asked = items(lines)
    loop.submit(asked)
    assert "prompt 1 is empty" in str(asked[1].future.exception(60))
    with pytest.warns(RuntimeWarning, match="context"):
        out, why = asked[3].future.result(60)
    loop.close()
    assert bool(out.failed.all())
    assert "its prompt has 600 tokens" in str(why)
    good = [asked[0].future.result(60)[0], asked[2].future.result(60)[0]]
    whole = of_one_call(given, [lines[0], Line("film", {"seed": asked[2].seed})])
    assert [r["text"] for r in records(given, [lines[0], lines[2]], good)] == [
        r["text"] for r in whole
    ]


def test_stop_strings_of_some_prompts_are_another_kind_of_loop() -> None:
    base = cf.Model(make("llama", 0), tokenizer=make_letters(), name="base")
    given = Texts(Loaded("base", {"base": base}, {}), {"max_new_tokens": 20, "do_sample": True})
    lines = [Line("abc"), Line("def", {"stop": ["e", "o"]}), Line("ghi")]
    loop = OpenLoop(given, 1)
    asked = items(lines)
    loop.submit(asked)
    found = records(given, lines, [item.future.result(60)[0] for item in asked])
    loop.close()
    whole = of_one_call(given, lines)
    for one, other in zip(found, whole, strict=True):  # The last digits depend on the batch.
        assert one.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
    assert found == whole


def test_an_error_of_the_models_reaches_whoever_waits(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    loop = OpenLoop(texts(loaded), 2)
    with monkeypatch.context() as patch:
        patch.setattr("crossfade.decoding.loop.Loop.advance", broken)
        asked = items(LINES[:2])
        loop.submit(asked)
        for item in asked:
            assert "the device is gone" in str(item.future.exception(60))
    again = items(LINES[:1])
    loop.submit(again)
    assert again[0].future.result(60)[1] is None
    loop.close()
