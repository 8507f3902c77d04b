"""Rows of one batch with settings of their own: each is as it is alone."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from sweeps import product
from tiny_models import EOS, VOCAB, make, make_letters
from transformers import PreTrainedModel

LENGTHS = (4, 1, 9, 2, 6, 3, 5)
GENERATOR = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(5, VOCAB, (n,), generator=GENERATOR).tolist() for n in LENGTHS]
N = len(PROMPTS)
COMMON: dict[str, Any] = {"do_sample": True, "eos_token_id": [EOS, 20], "progress": False}
LIMIT = {"max_new_tokens": 9}
SEEDS = list(range(40, 40 + N))

LISTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": [0.0, 1.0, 0.0, 0.5, 1.5, 0, 1]},
    "top_k": {"top_k": [0, 1, 2, 3, 61, 5, 200]},
    "top_p": {"top_p": [1.0, 0.0, 0.3, 0.9, 1, 0.99, 0.5]},
    "min_p": {"min_p": [0.0, 1.0, 0.1, 0.5, 0, 0.02, 1]},
    "max_new_tokens": {"max_new_tokens": [1, 9, 3, 30, 2, 1, 12]},
    "stop_strings": {"stop_strings": [None, ["e", "th"], "a", [], ["nd"], ["e"], None]},
}
LISTS["all"] = {name: x for each in LISTS.values() for name, x in each.items()}
ENGINES = pytest.mark.parametrize("simple", [False, True], ids=["engine", "simple path"])


def blend(base: PreTrainedModel) -> Any:
    return cf.Model(base) + 0.6 * (cf.Model(make("gpt2", 1)) - cf.Model(make("qwen3", 2)))


def one(options: dict[str, Any], i: int) -> dict[str, Any]:
    """What request i has, as it is given for it alone."""
    found = {}
    for name, each in options.items():
        found[name] = each[i] if isinstance(each, (list, tuple)) else each
        if name == "stop_strings" and not found[name]:
            del found[name]
        if name == "temperature" and found[name] == 0:
            del found[name]
            found["do_sample"] = False
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if found.get("do_sample") is False:
            found.pop(name, None)
    return found


def check_alone(x: Any, options: dict[str, Any], **more: Any) -> None:
    """A call of all requests gives each what a call of it alone does."""
    whole = cf.generate(x, PROMPTS, seed=SEEDS, **COMMON, **{**LIMIT, **options}, **more)
    for i, prompt in enumerate(PROMPTS):
        arguments = {**COMMON, **LIMIT, **one(options, i), **more}
        alone = cf.generate(x, [prompt], seed=[SEEDS[i]], **arguments)
        assert whole.responses[i] == alone.responses[0], (i, arguments)
        assert bool(whole.finished[i]) == bool(alone.finished[0])
        n = int(alone.lengths[0])
        for name in ("logprobs", "sampled_logprobs"):
            torch.testing.assert_close(getattr(whole, name)[i, :n], getattr(alone, name)[0])


@pytest.mark.parametrize(
    ("name", "simple"),
    [*product(list(LISTS)[:-1], [False, True], together=1), ("all", False), ("all", True)],
)
def test_rows_are_as_they_are_alone(name: str, simple: bool, base: PreTrainedModel) -> None:
    more = {"engine": cf.Engine(simple=simple), "tokenizer": make_letters()}
    check_alone(blend(base), LISTS[name], **more)


PLACES: dict[str, dict[str, Any]] = {
    "two places": {"max_batch": 2},
    "reference": {"max_batch": 2, "engine": cf.Engine(kernels=False)},
    "terms": {"return_term_logprobs": True, "engine": cf.Engine(share_weights=False)},
    "heads": {"engine": cf.Engine(share_head=False)},
}


@pytest.mark.parametrize(
    ("more", "name"), product(list(PLACES), ["all", "temperature"], together=1)
)
def test_places_and_backends(name: str, more: str, base: PreTrainedModel) -> None:
    check_alone(blend(base), LISTS[name], tokenizer=make_letters(), **PLACES[more])


@pytest.mark.parametrize("power", [1.0, -1.0])
def test_means(power: float, base: PreTrainedModel) -> None:
    """Blends that are no products take two passes over the logits."""
    mean = cf.power_mean([base, make("gpt2", 1)], weights=[0.5, 0.5], r=power)
    check_alone(mean, LISTS["temperature"])


def test_supports(base: PreTrainedModel) -> None:
    check_alone(blend(base).within(cf.Support(min_p=0.1)), LISTS["temperature"])


@pytest.mark.parametrize(
    ("name", "simple"),
    product(["temperature", "max_new_tokens", "stop_strings", "top_p"], [False, True], together=1),
)
def test_beside_processors(name: str, simple: bool, base: PreTrainedModel) -> None:
    """They read all rows at one step, and what each row has of its own comes after them."""
    more = {"engine": cf.Engine(simple=simple), "tokenizer": make_letters()}
    check_alone(blend(base), LISTS[name], repetition_penalty=1.3, **more)


def test_samples_share_what_their_request_has(base: PreTrainedModel) -> None:
    options = {"num_return_sequences": 2, **LISTS["temperature"], **LISTS["max_new_tokens"]}
    whole = cf.generate(base, PROMPTS, seed=SEEDS, **COMMON, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = cf.generate(
            base,
            [prompt],
            seed=[SEEDS[i]],
            **{**COMMON, **one(options, i), "num_return_sequences": 1},
        )
        assert whole.responses[2 * i] == alone.responses[0]
        if LISTS["temperature"]["temperature"][i] == 0:
            assert whole.responses[2 * i + 1] == whole.responses[2 * i]


def test_searches(base: PreTrainedModel) -> None:
    """Limits and temperatures of a search's rows: those of temperature 0 all write the same."""
    ratio = cf.LogRatio(cf.Model(make("gpt2", 1)), cf.Model(make("qwen3", 2)))
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=3, value=ratio)
    options = {**LISTS["temperature"], **LISTS["max_new_tokens"]}
    whole = cf.generate(base, PROMPTS, seed=SEEDS, search=search, **COMMON, **options)
    for i, prompt in enumerate(PROMPTS):
        own = one(options, i)
        if own.get("do_sample") is False:  # what a search refuses for all its rows
            greedy = cf.generate(base, [prompt], **{**COMMON, **own})
            assert whole.responses[i] == greedy.responses[0]
            continue
        alone = cf.generate(base, [prompt], seed=[SEEDS[i]], search=search, **{**COMMON, **own})
        assert whole.responses[i] == alone.responses[0]
        torch.testing.assert_close(whole.values[i], alone.values[0])


@ENGINES
@pytest.mark.parametrize("temperature", [0, 0.0])
def test_temperature_0_is_greedy(temperature: float, simple: bool, base: PreTrainedModel) -> None:
    engine = cf.Engine(simple=simple)
    zero = cf.generate(base, PROMPTS, temperature=temperature, engine=engine, **COMMON, **LIMIT)
    greedy = cf.generate(base, PROMPTS, engine=engine, **{**COMMON, "do_sample": False}, **LIMIT)
    assert zero.responses == greedy.responses
    assert torch.equal(zero.logprobs, greedy.logprobs)
    assert torch.equal(zero.sampled_logprobs, greedy.sampled_logprobs)
    all_zero = cf.generate(
        base, PROMPTS, temperature=[temperature] * N, engine=engine, **COMMON, **LIMIT
    )
    assert all_zero.responses == greedy.responses


def test_greedy_rows_leave_the_draws_of_others(base: PreTrainedModel) -> None:
    """With one seed for all, request i draws from stream i, whatever its neighbours do."""
    sampled = cf.generate(base, PROMPTS, temperature=[1.0] * N, seed=3, **COMMON, **LIMIT)
    mixed = cf.generate(
        base, PROMPTS, temperature=[0.0, 1.0] * (N // 2) + [0.0], seed=3, **COMMON, **LIMIT
    )
    for i in range(1, N, 2):
        assert mixed.responses[i] == sampled.responses[i]
    greedy = cf.generate(base, PROMPTS, **{**COMMON, "do_sample": False}, **LIMIT)
    for i in range(0, N, 2):
        assert mixed.responses[i] == greedy.responses[i]


@pytest.mark.parametrize("name", ["temperature", "max_new_tokens", "stop_strings"])
def test_tuples_are_lists(name: str, base: PreTrainedModel) -> None:
    options = LISTS[name]
    given = {**COMMON, **LIMIT, **options, "tokenizer": make_letters(), "seed": 3}
    ours = cf.generate(base, PROMPTS, **given)
    theirs = cf.generate(base, PROMPTS, **{**given, name: tuple(options[name])})
    assert ours.responses == theirs.responses


def test_one_text_for_all_requests_stays_so(base: PreTrainedModel) -> None:
    """A list of texts alone means what it means in Hugging Face: all of them, for all rows."""
    given = {**COMMON, **LIMIT, "tokenizer": make_letters(), "seed": 3}
    flat = cf.generate(base, PROMPTS, stop_strings=["e", "a"], **given)
    each = cf.generate(base, PROMPTS, stop_strings=[["e", "a"]] * N, **given)
    assert flat.responses == each.responses
    assert flat.finished.tolist() == each.finished.tolist()


def test_a_search_of_no_lists_still_refuses_to_be_greedy(base: PreTrainedModel) -> None:
    search = cf.BestOfN(2, value=cf.LogRatio(cf.Model(base), cf.Model(make("gpt2", 1))))
    with pytest.raises(ValueError, match="do_sample is False; a search of 2 rows must sample"):
        cf.generate(base, PROMPTS, search=search, do_sample=False, **LIMIT)


HALF = [0.5] * N
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": [1.0] * (N - 1)}, ValueError, rf"temperature has {N - 1} entries.*{N}"),
    ({"top_k": [1] * (N + 1)}, ValueError, rf"top_k has {N + 1} entries; it must have {N}"),
    ({"top_p": []}, ValueError, r"top_p has 0 entries"),
    ({"min_p": ()}, ValueError, r"min_p has 0 entries"),
    ({"max_new_tokens": []}, ValueError, r"max_new_tokens is empty"),
    ({"max_new_tokens": [3] * (N - 1)}, ValueError, rf"max_new_tokens has {N - 1} entries"),
    ({"stop_strings": [None]}, ValueError, rf"stop_strings has 1 entries; it must have {N}"),
    ({"temperature": [1.0, -0.5, *HALF[2:]]}, ValueError, r"temperature\[1\] is -0.5; it must be"),
    ({"temperature": [1.0, None, *HALF[2:]]}, TypeError, r"temperature\[1\] is None"),
    ({"temperature": [1.0, True, *HALF[2:]]}, TypeError, r"temperature\[1\] is True"),
    ({"temperature": [1.0, "1", *HALF[2:]]}, TypeError, r"temperature\[1\] is '1'"),
    ({"temperature": [float("nan"), *HALF[1:]]}, ValueError, r"temperature\[0\] is nan"),
    ({"temperature": [float("inf"), *HALF[1:]]}, ValueError, r"temperature\[0\] is inf"),
    ({"temperature": [[1.0], *HALF[1:]]}, TypeError, r"temperature\[0\] is \[1.0\]"),
    ({"temperature": [torch.tensor(1.0)] * N}, TypeError, r"temperature\[0\] is a tensor"),
    ({"temperature": torch.ones(N)}, TypeError, r"temperature is a tensor; it must be a number"),
    ({"top_p": torch.ones(N)}, TypeError, r"top_p is a tensor"),
    ({"max_new_tokens": torch.ones(N)}, TypeError, r"max_new_tokens is tensor"),
    ({"top_k": [1.5, *[1] * (N - 1)]}, TypeError, r"top_k\[0\] is 1.5; it must be an int"),
    ({"top_k": [1, -1, *[1] * (N - 2)]}, ValueError, r"top_k\[1\] is -1"),
    ({"top_p": [1.01, *HALF[1:]]}, ValueError, r"top_p\[0\] is 1.01"),
    ({"min_p": [*HALF[1:], -0.1]}, ValueError, rf"min_p\[{N - 1}\] is -0.1"),
    ({"max_new_tokens": [1, 0, *[1] * (N - 2)]}, ValueError, r"max_new_tokens\[1\] is 0"),
    ({"max_new_tokens": [1, None, *[1] * (N - 2)]}, TypeError, r"max_new_tokens\[1\] is None"),
    ({"max_new_tokens": [1, 2.0, *[1] * (N - 2)]}, TypeError, r"max_new_tokens\[1\] is 2.0"),
    ({"max_new_tokens": [1, True, *[1] * (N - 2)]}, TypeError, r"max_new_tokens\[1\] is True"),
    ({"stop_strings": [None, "", *[None] * (N - 2)]}, ValueError, r"stop_strings has ''"),
    ({"stop_strings": [None, [3], *[None] * (N - 2)]}, ValueError, r"stop_strings has 3"),
    ({"stop_strings": [None, 3, *[None] * (N - 2)]}, ValueError, r"stop_strings has 3"),
    ({"do_sample": False, "temperature": HALF}, ValueError, r"temperature is a list, and"),
    ({"do_sample": False, "top_k": [3] * N}, ValueError, r"top_k is a list, and do_sample"),
    ({"typical_p": 0.5, "temperature": HALF}, NotImplementedError, r"typical_p is 0.5"),
    ({"epsilon_cutoff": 0.1, "top_k": [3] * N}, NotImplementedError, r"epsilon_cutoff is 0.1"),
    ({"eta_cutoff": 0.1, "top_p": HALF}, NotImplementedError, r"eta_cutoff is 0.1"),
    ({"repetition_penalty": [1.2] * N}, Exception, r"repetition_penalty|penalty"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[b[2][:28] for b in BAD])
def test_refusals(
    options: dict[str, Any], error: type[Exception], message: str, base: PreTrainedModel
) -> None:
    with pytest.raises(error, match=message):
        cf.generate(
            base, PROMPTS, **{"tokenizer": make_letters(), "seed": 3, **COMMON, **LIMIT, **options}
        )


def test_limits_do_not_mind_do_sample(base: PreTrainedModel) -> None:
    """Limits and stop strings of each request go with greedy decoding too."""
    options = {**LISTS["max_new_tokens"], **LISTS["stop_strings"], "do_sample": False}
    whole = cf.generate(base, PROMPTS, tokenizer=make_letters(), **{**COMMON, **options})
    for i, prompt in enumerate(PROMPTS):
        own = {**COMMON, **one(options, i)}
        alone = cf.generate(base, [prompt], tokenizer=make_letters(), **own)
        assert whole.responses[i] == alone.responses[0]
