"""Value heads are saved and loaded; files that do not belong to one are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.saved_value_heads import load_value_head, save_value_head
from crossfade.models.value_heads import value_head, value_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, lora, make
from value_head_cases import DRAW, HEADS, PROMPTS, equal, fill, state

# PEFT asks transformers for an attribute that this version of it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", list(HEADS.values())[:3], ids=list(HEADS)[:3])
def test_saved_and_loaded(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base = make("llama")
    base.config.name_or_path = "somewhere/llama"
    model = fill(value_model(base, **options))
    save_value_head(model, tmp_path / "head", dtype=dtype)
    assert {p.name for p in (tmp_path / "head").iterdir()} == {
        "value_head.json",
        "value_head.safetensors",
    }
    stored = load_file(tmp_path / "head" / "value_head.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    loaded = load_value_head(tmp_path / "head", base)
    assert loaded.value_kind == model.value_kind
    assert type(value_head(loaded)) is type(value_head(model))
    for a, b in zip(value_head(loaded).parameters(), value_head(model).parameters(), strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b.to(dtype).float())
    assert loaded.model.norm.weight.data_ptr() == base.model.norm.weight.data_ptr()
    assert json.loads((tmp_path / "head" / "value_head.json").read_text()) == {
        "format": 1,
        "kind": model.value_kind,
        "rank": options.get("rank"),
        "hidden_size": 16,
        "vocabulary": VOCAB,
        "backbone": "somewhere/llama",
        "adapter": False,
    }


def test_the_backbone_is_found_where_it_was(tmp_path: Path) -> None:
    from tiny_models import make_tokenizer
    from transformers import AutoModelForCausalLM

    make("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    model = fill(value_model(base.eval(), rank=2))
    save_value_head(model, tmp_path)  # in the same folder as the backbone
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = load_value_head(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"the backbone '.*' that .*value_head.json names could not"):
        load_value_head(tmp_path)


def test_an_adapter_is_saved_with_the_head(tmp_path: Path) -> None:
    base = make("llama")
    before = state(base)
    model = lora(3, fill(value_model(base, rank=2)), "tone").eval()
    save_value_head(model, tmp_path)
    loaded = load_value_head(tmp_path, base)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, fill(value_model(base, rank=2))(ids).logits)
    assert equal(state(base), before)
    out = cf.generate(
        base, PROMPTS, search=cf.ChunkBeamSearch(2, 2, 3, cf.ValueHead(loaded)), **DRAW
    )
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        q = loaded(torch.tensor([prompt + response])).logits[0, -2, response[-1]].detach()
        torch.testing.assert_close(out.values[i], q, atol=1e-4, rtol=1e-4)
    # the loaded head and adapter can be trained further
    own = {id(p) for p in value_head(loaded).parameters()}
    learn = [n for n, p in loaded.named_parameters() if p.requires_grad and id(p) not in own]
    assert all(p.requires_grad for p in value_head(loaded).parameters())
    assert learn
    assert all("lora_" in name for name in learn)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors; .*\(pickled weights"):
        load_value_head(tmp_path, base)
    lora(4, model, "other")
    with pytest.raises(ValueError, match=r"adapters \['other', 'tone'\]; it must have one"):
        save_value_head(model, tmp_path)


BAD_FILES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format": ({"format": 2}, ValueError, "json has format 2; it must be 1"),
    "kind": ({"kind": "v"}, ValueError, "json has kind 'v'; it must be 'q' or 'scalar'"),
    "rank": ({"rank": "8"}, ValueError, "rank in .*json is '8'; it must be of type int or null"),
    "other rank": ({"rank": 4}, ValueError, r"a in .*safetensors is .* \[3, 16\]; .* \[4, 16\]"),
    "not low rank": ({"rank": None}, ValueError, r"the tensors \['a', 'b'\]; it must have \['w"),
    "hidden": ({"hidden_size": 24}, ValueError, "json has hidden_size 24; it must be 16, as base"),
    "vocabulary": ({"vocabulary": 64}, ValueError, "json has vocabulary 64; it must be 61, as"),
    "no backbone": ({"backbone": None}, ValueError, "backbone in .*json is None; .* type str"),
    "adapter": ({"adapter": True}, FileNotFoundError, "there is no .*adapter_config.json"),
}


@pytest.mark.parametrize("bad", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_wrong_in_a_file_is_named(
    bad: tuple[dict[str, Any], type[Exception], str], tmp_path: Path
) -> None:
    base = make("llama")
    save_value_head(value_model(base, rank=3), tmp_path)
    file = tmp_path / "value_head.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **bad[0]}))
    with pytest.raises(bad[1], match=bad[2]):
        load_value_head(tmp_path, base)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    base = make("llama")
    weights, settings = tmp_path / "value_head.safetensors", tmp_path / "value_head.json"
    with pytest.raises(FileNotFoundError, match=r"there is no .*value_head.json; the folder must"):
        load_value_head(tmp_path, base)
    save_value_head(value_model(base), tmp_path)
    with pytest.raises(ValueError, match="names no backbone; base must be"):
        load_value_head(tmp_path)
    save_file({"weight": torch.zeros(VOCAB, 16, dtype=torch.int8)}, weights)
    with pytest.raises(ValueError, match=r"is torch.int8 \[61, 16\]; it must be floats \[61, 16\]"):
        load_value_head(tmp_path, base)
    weights.write_bytes(b"no tensors")
    with pytest.raises(OSError, match=r"value_head.safetensors cannot be read as safetensors"):
        load_value_head(tmp_path, base)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*value_head.safetensors"):
        load_value_head(tmp_path, base)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"value_head.json: not JSON"):
        load_value_head(tmp_path, base)
    settings.write_text("[]")
    with pytest.raises(ValueError, match=r"json is \[\]; it must be what save_value_head writes"):
        load_value_head(tmp_path, base)
