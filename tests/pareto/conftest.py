"""Three tiny models, prompts and rewards that sweeps are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
from sweep_cases import PROMPTS, REWARDS
from tiny_models import make, make_tokenizer


@pytest.fixture(scope="session")
def terms() -> list[cf.Model]:
    tokenizer = make_tokenizer()
    names = ("base", "a", "b")
    return [cf.Model(make("llama", i), tokenizer=tokenizer, name=n) for i, n in enumerate(names)]


@pytest.fixture(scope="session")
def blended(terms: list[cf.Model]) -> Callable[[dict[str, float]], Any]:
    base, a, b = terms
    return lambda w: base + w["short"] * (a - base) + 0.5 * w["ones"] * (b - base)


@pytest.fixture
def sweep() -> Callable[..., cf.pareto.Front]:
    def call(methods: Any, **options: Any) -> cf.pareto.Front:
        options = {"weights": 3, "max_new_tokens": 5, "do_sample": True, **options}
        return cf.pareto.sweep(
            methods,
            options.pop("prompts", PROMPTS),
            options.pop("rewards", REWARDS),
            progress=False,
            **options,
        )

    return call
