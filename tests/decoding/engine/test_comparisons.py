"""When a model is compared with its own path: once, and again after a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import contract
from crossfade.decoding.simple import structure
from strange_models import NEW, PROMPTS, STRANGE, Counting, Shifted, Strange, Twice, strange
from tiny_models import lora, make
from torch import nn
from transformers import LlamaForSequenceClassification

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are compared, while everything runs as ever."""
    found: list[str] = []
    own = contract._compare

    def compare(models: Any, *others: Any) -> Any:
        found.append("+".join(m.name for m in models))
        return own(models, *others)

    monkeypatch.setattr(contract, "_compare", compare)
    return found


def test_a_model_is_compared_once_until_it_changes(compared: list[str]) -> None:
    model = make("llama")
    for _ in range(3):
        cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
    assert compared == ["m"]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # A change of weights, as in training, needs no comparison.
    cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
    assert compared == ["m"]
    changes: list[Callable[[], Any]] = [
        lambda: model.train(),
        lambda: model.to(torch.bfloat16),
        lambda: setattr(model.config, "rms_norm_eps", 0.1),
        lambda: model.set_attn_implementation("eager"),
        lambda: setattr(model.model, "norm", nn.LayerNorm(16, dtype=torch.bfloat16)),
    ]
    for n, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
        assert compared == ["m"] * n


def test_a_call_looks_at_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[nn.Module] = []
    own = structure._of_module

    def of_module(module: nn.Module) -> Any:
        looks.append(module)
        return own(module)

    monkeypatch.setattr(structure, "_of_module", of_module)
    model = lora(1, lora(2, make("llama"), "one"), "two")
    terms = [cf.Model(model, adapter=a, name=a or "base") for a in (None, "one", "two")]
    blends = (
        terms[0] + 0.5 * (terms[1] - terms[2]),  # The terms share a head.
        cf.presets.contrastive(make("llama"), make("llama", 1)),  # few columns of a head
    )
    for blend in blends:
        cf.generate(blend, PROMPTS, max_new_tokens=2)  # This compares each model with its own path.
        looks.clear()
        cf.generate(blend, PROMPTS, max_new_tokens=2)
        assert len(looks) == len(set(looks))


def test_what_is_found_of_a_model_does_not_keep_it() -> None:
    import gc
    import weakref

    model = make("llama")
    cf.generate(model, PROMPTS, max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_adapters_are_compared_together_and_anew(compared: list[str]) -> None:
    model = lora(1, lora(0, make("llama"), "first"), "second").eval()
    terms = [cf.Model(model, adapter=name, name=name) for name in ("first", "second")]
    out = cf.generate(terms[0] + 0.5 * terms[1], PROMPTS, max_new_tokens=4)
    assert compared == ["first+second"]
    assert out.stats.notes == ()
    cf.generate(terms[1], PROMPTS, max_new_tokens=2)
    assert compared == ["first+second", "second"]


def test_every_adapter_is_compared() -> None:
    """Only one of the adapters changes a layer which the engine would run wrongly."""
    model = lora(
        1, lora(0, make("llama"), "first", modules=["q_proj"]), "second", modules=["up_proj"]
    )
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["second"].forward = lambda x: -x[..., :2]
    terms = [cf.Model(model.eval(), adapter=name, name=name) for name in ("first", "second")]
    blend = terms[0] + terms[1]
    theirs = cf.generate(blend, PROMPTS, max_new_tokens=NEW, engine=cf.Engine(simple=True))
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs.responses
    assert out.stats.notes != ()


@pytest.mark.parametrize("kind", [Twice, Counting])
def test_value_heads_over_other_bodies(kind: type[Strange]) -> None:
    from crossfade.training import value_model

    base = make("llama", 3)
    q = value_model(strange(kind), rank=2)
    nn.init.normal_(q.get_output_embeddings().b)
    blend = cf.Model(base) + cf.ValueHead(q, name="q")
    theirs = cf.generate(blend, PROMPTS, max_new_tokens=NEW, engine=cf.Engine(simple=True))
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs.responses
    assert STRANGE[kind] in out.stats.notes[0]


@pytest.mark.parametrize("kind", [Twice, Counting, None])
def test_reward_models_with_other_bodies(kind: type[Strange] | None, tokenizer: Any) -> None:
    torch.manual_seed(2)
    config = make("llama").config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    if kind is not None:
        strange(kind, model)
    search = cf.BestOfN(4, cf.RewardModel(model, tokenizer))
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 1, "search": search}
    options["tokenizer"] = tokenizer
    base = make("llama", 4)
    theirs = cf.generate(base, ["the film was", "a"], engine=cf.Engine(simple=True), **options)
    out = cf.generate(base, ["the film was", "a"], **options)
    torch.testing.assert_close(out.values, theirs.values)
    assert bool(out.stats.notes) == (kind is not None)
    assert kind is None or STRANGE[kind] in out.stats.notes[0]


def test_a_value_of_zeros_is_compared_again(compared: list[str]) -> None:
    """A new head is all zeros, and shows nothing of the body under it."""
    from crossfade.training import value_model

    q = value_model(strange(Shifted), rank=2)
    blend = cf.Model(make("llama", 3), name="m") + cf.ValueHead(q, name="q")
    assert cf.generate(blend, PROMPTS, max_new_tokens=2).stats.notes == ()
    nn.init.normal_(q.get_output_embeddings().b)
    out = cf.generate(blend, PROMPTS, max_new_tokens=2)
    assert compared == ["m", "q", "q"]
    assert "not its own" in out.stats.notes[0]


def test_the_callers_draws_stay_where_they_were() -> None:
    model = make("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    contract._compare([cf.decoding.simple.term_model.TermModel(model, "m")], None, True)
    assert torch.equal(torch.rand(3), expected)
