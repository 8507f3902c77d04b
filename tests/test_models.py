"""Models to decode with: what the small one answers, guides, and adapters that do not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import crossfade as cf
import pytest
import torch
from crossfade import models, small_model
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.model
def test_the_real_model_answers(smollm2_folder: Path) -> None:
    model, tokenizer = models.smollm2()
    assert model.dtype == torch.float32
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = model.generation_config
    assert ids == (1, 2, 2) == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


def test_the_hub_can_be_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="not in the local Hugging Face cache"):
        models.download("crossfade-tests/is-not-there")


def test_the_guides_that_ship() -> None:
    """Under 1 MB each, of safetensors and JSON alone, over the model by its public name."""
    for name in models.GUIDES:
        files = {p.name: p for p in models.guide(name).iterdir()}
        assert {p.suffix for p in files.values()} == {".json", ".safetensors"}
        assert sum(p.stat().st_size for p in files.values()) < 1_000_000
        (settings,) = (json.loads(p.read_text()) for p in files.values() if p.suffix == ".json")
        assert small_model.HUB_ID in settings.values()
    with pytest.raises(ValueError, match="name is 'praise'; it must be one of sentiment"):
        models.guide("praise")


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folders is empty"):
        models.with_adapters(torch.nn.Linear(1, 1), {})
    with pytest.raises(FileNotFoundError, match=r"folders\['a'\] is .* adapter_model.safetensors"):
        models.with_adapters(torch.nn.Linear(1, 1), {"a": tmp_path})


@pytest.mark.parametrize(("layers", "says"), [(1, "weights for what is not there"), (3, "no weig")])
def test_adapters_of_other_models(tmp_path: Path, layers: int, says: str) -> None:
    """Of as wide a model with more layers, or with fewer."""
    peft = pytest.importorskip("peft")
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    two, other = (
        LlamaForCausalLM(LlamaConfig(**shape, **heads, num_hidden_layers=n)) for n in (2, layers)
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of old names and layers without weights
        peft.get_peft_model(two, config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"folders\['a'\] is .*, which has {says}"):
            models.with_adapters(other, {"a": tmp_path})


@pytest.mark.model
def test_a_guide_moves_the_model(smollm2_folder: Path) -> None:
    """Each towards what it was trained for, and the model without it is as it was."""
    from crossfade import training

    good, bad = "A joyful, wonderful film that I loved!", "A dull, awful film that I hated!"
    question = [{"role": "user", "content": "In one sentence: how was the film?"}]
    model, tokenizer = models.load(smollm2_folder)
    with torch.no_grad():
        before = model(torch.tensor([[3, 4, 5]])).logits
    head = training.load_value_head(models.guide("sentiment_value"), model)
    wrapped = models.with_adapters(model, {"praise": models.guide("sentiment")})
    base, praise = (cf.Model(wrapped, tokenizer=tokenizer, adapter=a) for a in (None, "praise"))

    def margin(term: cf.Model) -> float:
        totals = cf.score(term, [question] * 2, [good, bad]).totals
        return float(totals[0] - totals[1])

    assert margin(praise) - margin(base) > 1
    values = cf.ValueHead(head, tokenizer=tokenizer)
    found = cf.generate(base, [question], search=cf.BestOfN(4, values), max_new_tokens=4)
    assert torch.isfinite(found.values).all()
    with torch.no_grad(), wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(torch.tensor([[3, 4, 5]])).logits, before)
