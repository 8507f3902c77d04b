"""Whatever a layer asks of attention, decoding honours it.

Each model here does something that the engine's attention, kernels or caches do not know. Then it
runs on the simple path, a note says why, and it writes what `model.generate` writes for each row
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import contract
from strange_models import NEW, PROMPTS, STRANGE, Strange, check, strange
from tiny_models import HEADS, IDS, LONG, SHAPES, SIZES, UNTIED, make
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("kind", STRANGE, ids=lambda kind: kind.__name__)
def test_what_attention_does_not_know(kind: type[Strange]) -> None:
    check(strange(kind), STRANGE[kind])


def family(config: Any, model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    made = model(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def diff_llama() -> PreTrainedModel:
    heads = {**HEADS, "num_key_value_heads": 2}
    return family(DiffLlamaConfig(**SIZES, **heads, **LONG, **IDS), DiffLlamaForCausalLM)


def doge() -> PreTrainedModel:
    return family(DogeConfig(**SIZES, **HEADS, **LONG, **IDS, **UNTIED), DogeForCausalLM)


def phimoe(window: int = 9) -> PreTrainedModel:
    """A model whose window shows in its mask alone."""
    config = PhimoeConfig(
        **SIZES, **HEADS, **LONG, **IDS, sliding_window=window, num_local_experts=2
    )
    return family(config, PhimoeForCausalLM)


def kept_short(window: int = 9) -> PreTrainedModel:
    """A model whose window only the cache knows, as in Moshi. The check's texts are shorter."""
    model = make("llama")
    model.config.sliding_window = window
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (diff_llama, "more than once"),
        (doge, "masks of their own"),
        (phimoe, "of which its layers do not know"),
        (kept_short, "its cache keeps 9 tokens"),
    ],
)
def test_families_that_attend_in_other_ways(model: Any, why: str) -> None:
    check(model(), why)


@pytest.mark.parametrize("model", [phimoe, kept_short])
def test_up_to_its_window_such_a_model_stays_on_the_engine(model: Any) -> None:
    made = model(30)
    check(made, None)
    longer = [PROMPTS[0] * 3]
    out = cf.generate(made, longer, max_new_tokens=NEW)
    assert "its cache keeps 30 tokens" in out.stats.notes[0]
    theirs = made.generate(torch.tensor(longer), max_new_tokens=NEW)
    assert torch.equal(out.sequences[:, : theirs.shape[1]], theirs)


def test_how_far_a_layer_looks_is_asked_of_its_mask() -> None:
    """The check finds up to how many tokens a mask is what the layer says."""
    layer = make("gemma3").model.layers[0].self_attn
    layer.config.sliding_window = 300

    def windowed(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - 300)

    def chunked(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k // 300 == q // 300)

    def table(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return torch.zeros(3)[q] == torch.zeros(3)[k]

    for function, window, expected in (
        (windowed, 300, None),
        (windowed, 0, 300),
        (windowed, 200, 200),
        (chunked, 300, 300),
        (lambda b, h, q, k: k <= q, 0, None),
        (lambda b, h, q, k: k <= q, 300, 300),
        (lambda b, h, q, k: k <= q + 1, 0, 0),
        (table, 0, 0),
    ):
        assert contract._causal_up_to(function, window, layer) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_runs_what_it_knows(shape: str) -> None:
    check(make(shape), None)
