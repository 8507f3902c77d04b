"""Values and their algebra, and the settings of searches."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.blends.values import as_value, formula_value
from crossfade.training import value_model
from tiny_models import make, make_tokenizer
from transformers import LlamaForSequenceClassification


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [make("llama", seed) for seed in range(4)]


def length(prompts: list[Any], texts: list[str]) -> list[float]:
    return [float(len(t)) for t in texts]


def test_sums(models: list[Any]) -> None:
    a, b = cf.LogRatio(models[0], models[1]), cf.Reward(length)
    value = 0.5 * a + b / 4 - a
    assert value.values == (a, b)
    assert value.weights == (-0.5, 0.25)
    assert str(value) == "-0.5*log_ratio + 0.25*length"
    assert str(sum([a, b])) == "log_ratio + length"
    assert str(-a) == "-log_ratio"
    assert (a - a + b).values == (b,)
    for zero in (0.0 * a, 0.0 * cf.ValueHead(models[2])):
        assert (zero + b).values == (b + zero).values == (b - zero).values == (b,)
    with pytest.raises(ValueError, match="value has no part whose weight is not 0"):
        cf.BestOfN(2, 0.0 * a)


def test_value_heads_are_values_and_terms(models: list[Any]) -> None:
    """A sum of value heads alone is a blend, which a search takes as a value too."""
    q, a = cf.ValueHead(models[2], name="q"), cf.LogRatio(models[0], models[1])
    assert str(a + 2 * q) == str(as_value(a + 2 * q)) == "log_ratio + 2*q"
    assert str(2 * q + a) == "2*q + log_ratio"
    assert str(q - a) == "q - log_ratio"
    assert as_value(q).values == as_value(0.5 * q).values == (q,)
    assert cf.ChunkBeamSearch(value=0.5 * q).value.weights == (0.5,)


def test_weights_of_requests(models: list[Any]) -> None:
    a, b = cf.LogRatio(models[0], models[1]), cf.Reward(length)
    w = torch.tensor([0.0, 1.0, 0.5])
    rows = (w * a + (1 - w) * b).row_weights(3)
    assert rows.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]
    with pytest.raises(ValueError, match="the weight of log_ratio is a tensor"):
        (w * a).row_weights(2)
    with pytest.raises(ValueError, match=r"weight is \[2\]; it must be \[3\]"):
        torch.ones(2) * (w * a)


def test_a_formula_of_log_probs_is_a_value(models: list[Any]) -> None:
    a, b, ref = (cf.Model(m, name=n) for m, n in zip(models, ("a", "b", "ref"), strict=False))
    value = formula_value(0.5 * (a - ref) + 0.25 * (b - ref))
    assert value.values == (cf.LogRatio(a, ref), cf.LogRatio(b, ref))
    assert value.weights == (0.5, 0.25)
    head = cf.ValueHead(models[3], name="head")
    assert formula_value(2 * head._blend()).values == (head,)
    both = formula_value(2 * head + (a - ref))
    assert both.values == (head, cf.LogRatio(a, ref))
    assert both.weights == (2.0, 1.0)
    for bad in (a + b, a - 0.5 * ref, a - b - ref, head + a):
        with pytest.raises(ValueError, match="less one reference"):
            formula_value(bad)


def test_names_are_distinct(models: list[Any]) -> None:
    a = cf.LogRatio(models[0], models[1])
    b = cf.LogRatio(models[0], models[1], beta=0.1)
    c = cf.Reward(lambda prompts, texts: [0.0])
    assert (a + b + c).names == ("log_ratio", "log_ratio_2", "reward")
    named = cf.LogRatio(models[0], models[2], name="tone")
    assert (a + named).names == ("log_ratio", "tone")


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda m: cf.LogRatio(m[0], m[0]), ValueError, "their ratio is 1 everywhere"),
    (lambda m: cf.LogRatio(m[0], 3), TypeError, "ref has a int"),
    (lambda m: cf.LogRatio(m[0], m[1], beta="x"), TypeError, "beta is 'x'"),
    (lambda m: cf.LogRatio(m[0], m[1], normalize=1), TypeError, "normalize is 1"),
    (lambda m: cf.Reward(3), TypeError, "fn is a int; it must be a function"),
    (lambda m: cf.LogRatio(m[0], m[1]) + 1, TypeError, "a int cannot be added to a value"),
    (lambda m: cf.LogRatio(m[0], m[1]) + m[0], TypeError, "cannot be added to a value"),
    (lambda m: cf.LogRatio(m[0], m[1], beta=[1, 2]), TypeError, "beta is .1, 2.; .* is a weight"),
    (lambda m: cf.LogRatio(m[0], m[1]) + None, TypeError, "a NoneType cannot be added"),
    (lambda m: cf.ChunkBeamSearch(value=m[0]), TypeError, "value is a bare LlamaForCausalLM"),
    (lambda m: cf.ChunkBeamSearch(value=cf.Model(m[0])), TypeError, r"such as LogRatio\(model0, r"),
    (
        lambda m: cf.BestOfN(4, 0.5 * (cf.Model(m[0], name="a") - cf.Model(m[1], name="b"))),
        TypeError,
        r"value is 0.5\*a - 0.5\*b, .* such as LogRatio\(a, b, beta=0.5\)",
    ),
    (lambda m: cf.BestOfN(4, "length"), TypeError, "value is 'length'; it must be"),
    (lambda m: cf.BestOfN(4, cf.Reward), TypeError, "value is the class Reward"),
    (lambda m: cf.BestOfN(4, classifier(m[0])), TypeError, r"RewardModel\(model, tokenizer\)"),
    (
        lambda m: cf.BestOfN(4, SimpleNamespace(model=m[0], tokenizer=None)),
        TypeError,
        r"RewardModel\(x.model, x.tokenizer\)",
    ),
    (lambda m: cf.BestOfN(cf.Reward(length), 4), TypeError, r"n is Reward\(length\); it must be"),
    (lambda m: cf.ChunkBeamSearch(), TypeError, "value is None"),
    (lambda m: cf.ChunkBeamSearch(value=0 * cf.Reward(length)), ValueError, "value has no part"),
    (lambda m: cf.ChunkBeamSearch(0, 4, 5, cf.Reward(length)), ValueError, "width is 0"),
    (lambda m: cf.ChunkBeamSearch(4, 2.0, 5, cf.Reward(length)), TypeError, "samples is 2.0"),
    (lambda m: cf.ChunkBeamSearch(4, 4, 0, cf.Reward(length)), ValueError, "chunk_length is 0"),
    (lambda m: cf.ChunkBeamSearch(64, 64, 5, cf.Reward(length)), ValueError, "is 4096; it must"),
    (lambda m: cf.ChunkBeamSearch(4, 4, 5, cf.Reward(length), "."), TypeError, "chunk_end is a"),
    (lambda m: cf.BestOfN(0, cf.Reward(length)), ValueError, "n is 0"),
    (lambda m: cf.Recipe(m[0], 3), TypeError, "search is a int"),
    (lambda m: cf.RewardModel(m[0], 3), TypeError, "tokenizer is a int"),
    (lambda m: cf.RewardModel(m[0], make_tokenizer()), ValueError, "label is None"),
    (lambda m: cf.RewardModel(m[0], make_tokenizer(), label=9), ValueError, "label is 9"),
    (lambda m: cf.RewardModel(m[0], make_tokenizer(), label=0, template=1), TypeError, "template"),
]


@pytest.mark.parametrize(("make_it", "error", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_what_is_wrong_is_named(
    models: list[Any], make_it: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_it(models)


def classifier(model: Any) -> Any:
    config = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    return LlamaForSequenceClassification(config)


def test_functions_are_rewards() -> None:
    for value in (length, partial(length), Length().scores):
        assert cf.BestOfN(4, value).value.values == (cf.Reward(value),)
    assert str(0.5 * cf.Reward(length) + length) == "1.5*length"


class Length:
    def scores(self, prompts: list[Any], texts: list[str]) -> list[float]:
        return length(prompts, texts)


def test_what_scores_texts_is_no_part_of_a_blend(models: list[Any]) -> None:
    base = cf.Model(models[0], name="base")
    ratio = cf.LogRatio(models[1], models[2])
    reward = cf.RewardModel(classifier(models[0]), make_tokenizer(), name="judge")
    blends = (base, 0.5 * base, base + cf.ValueHead(models[3]))
    for value, says in (
        (cf.Reward(length), "length scores what"),
        (0.5 * cf.Reward(length), "0.5\\*length scores what"),
        (torch.ones(2) * reward, "judge scores what"),
        (ratio, "log_ratio scores what"),
        (ratio + cf.ValueHead(models[3], name="q"), "log_ratio \\+ q scores what"),
    ):
        for blend in blends:
            for f in (lambda b, v: b + v, lambda b, v: v + b, lambda b, v: b - v):
                with pytest.raises(TypeError, match=f"{says}.*search=BestOfN") as error:
                    f(blend, value)
                assert ("add the log-probs" in str(error.value)) == ("log_ratio" in says)


def test_a_head_of_one_number_is_no_part_of_a_blend(models: list[Any]) -> None:
    base, head = cf.Model(models[0]), cf.ValueHead(value_model(make("llama", 5), "scalar"))
    for f in (lambda: base + head, lambda: 2 * head + base, lambda: base - 0.5 * head):
        with pytest.raises(TypeError, match=r"one number for a text.*search=BestOfN"):
            f()
    assert as_value(0.5 * head).values == (head,)


def test_best_of_n_is_a_search_of_one_chunk() -> None:
    search = cf.BestOfN(16, cf.Reward(length))
    assert (search.rows, search.width, search.chunk_length) == (16, 16, None)
