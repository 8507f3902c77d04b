"""Policies that follow weights are methods as they are: all weightings are rows of one forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
from crossfade.bulk import decode as bulk
from crossfade.bulk.records import seed_of
from crossfade.policies.conditioned import DecodedPolicy, PromptedPolicy, SoupPolicy
from sweep_cases import PROMPTS, REWARDS
from tiny_models import lora, make, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LENGTH = 5
GRID = [{"short": s, "ones": 1 - s} for s in (0.0, 0.25, 0.5, 1.0)]
WITH_KL = [{"short": 1.0}, {"short": 0.5, "ones": 0.25, "kl": 0.25}, {"kl": 1.0}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> cf.ConditionedPolicy:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(REWARDS):
        model = lora(seed, make(), name, 2 + seed, ["q_proj", "v_proj"])
        model.save_pretrained(folder, save_embedding_layers=False)
    adapters = {name: folder / name for name in REWARDS}
    return cf.ConditionedPolicy.from_adapters(make(), adapters, tokenizer=make_tokenizer())


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of each call that decodes what its last output says that all of it took."""
    found: list[Any] = []
    decode = bulk.decode

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        found.append(None)
        for place, out in decode(*args, **options):
            found[-1] = out.stats
            yield place, out

    monkeypatch.setattr(bulk, "decode", watched)
    return found


def check_alone(front: cf.pareto.Front, method: Any, weightings: Any, **options: Any) -> None:
    """Each point has the texts that its weighting writes by itself."""
    seeds = [seed_of(0, i) for i in range(len(PROMPTS))]
    for weights, texts in zip(weightings, front.texts, strict=True):
        alone = cf.generate(method(weights), PROMPTS, seed=seeds, do_sample=True, **options)
        assert [text for (text,) in texts] == alone.text


@pytest.mark.parametrize("weightings", [GRID, WITH_KL], ids=["grid", "kl"])
def test_all_weightings_of_a_policy_are_rows_of_one_forward(
    weightings: list[dict[str, float]], policy: Any, sweep: Any, last: list[Any]
) -> None:
    options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    front = sweep({"clp": policy.at}, weights=weightings, kl_to=policy.reference, **options)
    (stats,) = last
    assert [model.forwards for model in stats.models] == [1 + LENGTH], "as many as for one prompt"
    check_alone(front, policy.at, weightings, **options)
    assert len({str(texts) for texts in front.texts}) == len(weightings)
    divergence = [point["kl"] for point in front.points]
    if weightings is WITH_KL:
        assert front.rewards == ("short", "ones", "kl")
        assert divergence[0] > 0.01
        assert divergence[2] == pytest.approx(0, abs=1e-5)  # it is the reference itself


def test_other_policies_are_swept_as_well(policy: Any, sweep: Any, last: list[Any]) -> None:
    ends = {name: policy.merged({name: 1.0}) for name in REWARDS}
    terms = {n: cf.Model(policy.model, adapter=n, tokenizer=policy.tokenizer) for n in REWARDS}
    methods = {
        "mod": DecodedPolicy(policy.reference, terms).at,
        "prompted": PromptedPolicy(policy.reference, list(REWARDS)).at,
        "soup": SoupPolicy(policy.base, ends, policy.tokenizer).at,
    }
    weightings = WITH_KL[:2]
    for (name, method), calls in zip(methods.items(), (1, 1, len(weightings)), strict=True):
        last.clear()
        front = sweep({name: method}, weights=weightings, kl_to=policy.reference)
        assert len(last) == calls, name
        check_alone(front, method, weightings, max_new_tokens=LENGTH)
