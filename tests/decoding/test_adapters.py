"""Terms over one PEFT model: they share weights, and each sees its own adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from peft import PeftModel
from tiny_models import lora, make
from transformers import PreTrainedModel

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Batch = dict[str, torch.Tensor]


@pytest.fixture
def two() -> PeftModel:
    """One model with adapters `polite`, which is active, and `rude`."""
    model = lora(2, lora(1, make(), "polite"), "rude", modules_to_save=["lm_head"])
    model.set_adapter("polite")
    return model.eval()


def merged(name: str | None) -> PreTrainedModel:
    """The same weights as a model of its own."""
    if name is None:
        return make()
    model = lora(2, lora(1, make(), "polite"), "rude", modules_to_save=["lm_head"])
    model.set_adapter(name)
    return model.merge_and_unload(adapter_names=[name]).eval()


def state(model: PeftModel) -> list[tuple[object, ...]]:
    layers = [m for m in model.modules() if hasattr(m, "_active_adapter")]
    flags = [(m.active_adapters, m.disable_adapters) for m in layers]
    return [*flags, *((n, p.requires_grad) for n, p in model.named_parameters())]


@pytest.mark.parametrize("adapter", ["polite", "rude", None, "active"])
def test_a_term_is_its_merged_model(two: PeftModel, adapter: str | None, batch: Batch) -> None:
    before = state(two)
    ours = cf.generate(cf.Model(two, adapter=adapter), batch, max_new_tokens=10)
    alone = merged("polite" if adapter == "active" else adapter)
    assert torch.equal(ours.sequences, alone.generate(**batch, max_new_tokens=10))
    assert state(two) == before, "the model is left as it was found"


def test_three_terms_over_one_model(two: PeftModel, batch: Batch) -> None:
    base, polite, rude = (cf.Model(two, adapter=a) for a in (None, "polite", "rude"))
    others = [cf.Model(merged(a)) for a in (None, "polite", "rude")]
    before = state(two)
    ours = cf.generate(
        base + 1.2 * (polite - rude), batch, max_new_tokens=10, return_term_logprobs=True
    )
    theirs = cf.generate(
        others[0] + 1.2 * (others[1] - others[2]),
        batch,
        max_new_tokens=10,
        return_term_logprobs=True,
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.term_logprobs, theirs.term_logprobs, atol=1e-4, rtol=0)
    assert state(two) == before


def test_active_follows_the_model(two: PeftModel, batch: Batch) -> None:
    term = cf.Model(two)
    polite = cf.generate(term, batch, max_new_tokens=6)
    two.set_adapter("rude")
    rude = cf.generate(term, batch, max_new_tokens=6)
    assert not torch.equal(polite.sequences, rude.sequences)
    with two.disable_adapter():
        plain = cf.generate(term, batch, max_new_tokens=6)
        named = cf.generate(cf.Model(two, adapter="polite"), batch, max_new_tokens=6)
    assert torch.equal(plain.sequences, make().generate(**batch, max_new_tokens=6))
    assert torch.equal(named.sequences, polite.sequences)


def test_the_model_is_restored_after_an_error(two: PeftModel, batch: Batch) -> None:
    before = state(two)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    handle = two.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        cf.generate(cf.Model(two, adapter=None), batch, max_new_tokens=6)
    handle.remove()
    assert state(two) == before


def test_the_hook_on_a_peft_model(two: PeftModel, batch: Batch) -> None:
    base, polite = cf.Model(two, adapter=None), cf.Model(two, adapter="polite")
    blend = 0.4 * base + 0.6 * polite
    theirs = two.generate(**batch, custom_generate=cf.decode, blend=blend, max_new_tokens=6)
    assert torch.equal(theirs, cf.generate(blend, batch, max_new_tokens=6).sequences)


def test_what_cannot_be_switched(two: PeftModel, batch: Batch) -> None:
    biased = lora(1, make(), "biased", bias="all").eval()
    with pytest.raises(ValueError, match="bias='all'"):
        cf.generate(cf.Model(biased, adapter=None), batch, max_new_tokens=2)
    two.merge_adapter(["polite"])
    with pytest.raises(ValueError, match="merged into its weights"):
        cf.generate(cf.Model(two, adapter="rude"), batch, max_new_tokens=2)
    two.unmerge_adapter()


def test_reloaded_adapters(two: PeftModel, batch: Batch, tmp_path: Path) -> None:
    # Most users do this: they load two saved adapters over one base.
    two.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(make(), tmp_path / "polite", adapter_name="polite")
    model.load_adapter(tmp_path / "rude", adapter_name="rude")
    for name in ("polite", "rude"):
        ours = cf.generate(cf.Model(model.eval(), adapter=name), batch, max_new_tokens=6)
        theirs = cf.generate(cf.Model(two, adapter=name), batch, max_new_tokens=6)
        assert torch.equal(ours.sequences, theirs.sequences)


def test_adapters_that_cannot_be_rows_take_turns(two: PeftModel, batch: Batch) -> None:
    """A module that adapters train whole has a copy for each, which needs its own forward."""
    polite, rude = cf.Model(two, adapter="polite"), cf.Model(two, adapter="rude")
    out = cf.generate(0.4 * polite + 0.6 * rude, batch, max_new_tokens=6)
    theirs = 0.4 * cf.Model(merged("polite")) + 0.6 * cf.Model(merged("rude"))
    assert torch.equal(out.sequences, cf.generate(theirs, batch, max_new_tokens=6).sequences)
    assert len(out.stats.models) == 2
    (note,) = out.stats.notes
    assert note == (
        "adapters of polite take turns: PEFT's ModulesToSaveWrapper layers take one adapter at a "
        "time"
    )


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # the layers have no bias
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "is a variant of LoRA"),
        ({"lora_bias": True}, "has a bias"),
        ({"target_modules": ["embed_tokens"]}, "PEFT's Embedding layers take one adapter"),
    ],
    ids=["dora", "bias", "embedding"],
)
def test_other_adapters_take_turns(options: dict[str, Any], why: str, batch: Batch) -> None:
    modules = options.pop("target_modules", ("q_proj", "down_proj"))
    model = lora(1, make(), "odd", modules=modules, **options).eval()
    blend = cf.Model(model, adapter=None) + 0.5 * cf.Model(model, adapter="odd")
    out = cf.generate(blend, batch, max_new_tokens=6)
    simple = cf.generate(blend, batch, max_new_tokens=6, engine=cf.Engine(simple=True))
    assert torch.equal(out.sequences, simple.sequences)
    assert why in out.stats.notes[0]


def test_dropout_of_an_adapter_is_kept(batch: Batch) -> None:
    """A model in training mode keeps its dropout, so that its adapters take turns."""
    model = lora(1, make(), "odd", lora_dropout=0.5).train()
    blend = cf.Model(model, adapter=None) + 0.5 * cf.Model(model, adapter="odd")
    out = cf.generate(blend, batch, max_new_tokens=2)
    assert "has dropout and is in training mode" in out.stats.notes[0]


def test_several_active_adapters_at_once(batch: Batch) -> None:
    model = lora(2, lora(1, make(), "polite"), "rude").eval()
    model.base_model.set_adapter(["polite", "rude"])
    blend = cf.Model(model) - 0.3 * cf.Model(model, adapter=None)
    out = cf.generate(blend, batch, max_new_tokens=6)
    assert not out.stats.notes
    assert len(out.stats.models) == 1
    both = lora(2, lora(1, make(), "polite"), "rude")
    alone = both.merge_and_unload(adapter_names=["polite", "rude"]).eval()
    theirs = cf.Model(alone) - 0.3 * cf.Model(make())
    assert torch.equal(out.sequences, cf.generate(theirs, batch, max_new_tokens=6).sequences)
